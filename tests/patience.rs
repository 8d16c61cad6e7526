//! A distant store that hangs: what is known is told, nobody waits for ever, and all goes on when it is back.
//!
//! A file that hangs whoever opens it is a FIFO that nobody writes to.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::*;
use envfabric::error::{Error, Kind};
use envfabric::patience::at_once;
use envfabric::view::{Attr, Ino, Tree};

/// One test at a time: the threads that hang are those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of the store that hangs whoever opens it, until dropped.
struct Hung {
    path: PathBuf,
    fifo: PathBuf,
    was: PathBuf,
}

impl Hung {
    fn file(fixture: &Fixture, path: &str) -> Hung {
        let dir = fixture.place("hung");
        let hung = Hung { path: fixture.store.root().join(path), fifo: dir.join("fifo"), was: dir.join("was") };
        // Whoever asks meanwhile finds the one or the other.
        nix::unistd::mkfifo(&hung.fifo, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
        if hung.path.exists() {
            fs::hard_link(&hung.path, &hung.was).unwrap();
        }
        let next = dir.join("next");
        fs::hard_link(&hung.fifo, &next).unwrap();
        fs::rename(next, &hung.path).unwrap();
        hung
    }
}

impl Drop for Hung {
    /// Whoever hangs finds an empty file, whoever opens it from now on finds it as it was.
    fn drop(&mut self) {
        if self.was.exists() {
            let _ = fs::rename(&self.was, &self.path);
        } else {
            let _ = fs::remove_file(&self.path);
        }
        let _ = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&self.fifo);
        let _ = fs::remove_file(&self.fifo);
    }
}

const LIMIT: Duration = Duration::from_millis(300);

fn distant(fixture: &Fixture) -> Tree {
    Tree::new(fixture.store.clone(), fixture.index.clone()).distant(LIMIT)
}

fn walk(tree: &Tree, path: &str) -> Result<Option<Attr>, Error> {
    let mut found = Some(tree.attr(Ino::ROOT)?);
    for name in Path::new(path) {
        let Some(dir) = found else { return Ok(None) };
        found = tree.lookup(dir.ino, name.to_str().unwrap().as_bytes())?;
    }
    Ok(found)
}

fn kind<T>(result: Result<T, Error>) -> Option<Kind> {
    result.err().map(|error| error.kind())
}

#[test]
fn what_is_known_is_told_at_once_while_the_store_hangs() {
    let _alone = alone();
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    let tree = distant(&fixture);
    assert_eq!(kind(at_once(|| walk(&tree, "demo/a"))), Some(Kind::WouldWait), "nothing is known yet");
    let known = walk(&tree, "demo/a/.venv").unwrap().unwrap();
    tree.list(Ino::ROOT).unwrap();
    assert_eq!(at_once(|| walk(&tree, "demo/a/.venv")).unwrap(), Some(known), "it is fresh");

    let hung = Hung::file(&fixture, "fabric.json");
    until("the answer is too old", || kind(at_once(|| walk(&tree, "demo/a"))) == Some(Kind::WouldWait));
    assert!(!tree.is_cut_off());
    assert_eq!(walk(&tree, "demo/a/.venv").unwrap(), Some(known), "waited for, and then as before");
    assert!(tree.is_cut_off());
    assert_eq!(at_once(|| walk(&tree, "demo/a/.venv")).unwrap(), Some(known));
    assert_eq!(at_once(|| tree.list(Ino::ROOT)).unwrap().len(), 3);
    // The refresher waits for nothing, and goes on.
    assert!(at_once(|| tree.refresh()) && tree.take_changes().is_empty());
    for _ in 0..2 {
        assert_eq!(kind(walk(&tree, "demo/unknown")), Some(Kind::TimedOut));
        assert_eq!(kind(walk(&tree, "unknown")), Some(Kind::TimedOut));
    }
    assert_eq!(kind(at_once(|| walk(&tree, "demo/unknown"))), Some(Kind::WouldWait));

    drop(hung);
    until("the outage ends", || {
        tree.refresh();
        !tree.is_cut_off()
    });
    assert_eq!(walk(&tree, "demo/unknown").unwrap(), None);
    fixture.publish("demo/a", vec![]);
    until("the new version is shown", || walk(&tree, "demo/a/.venv").unwrap().unwrap().ino != known.ino);
}

#[test]
fn one_document_that_hangs_keeps_nothing_else_from_being_told_anew() {
    let _alone = alone();
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    fixture.publish("demo/b", vec![]);
    let tree = distant(&fixture);
    let a = walk(&tree, "demo/a/.venv").unwrap().unwrap();
    let b = walk(&tree, "demo/b/.venv").unwrap().unwrap();
    fixture.publish("demo/a", vec![]);
    let hung = Hung::file(&fixture, "envs/demo/a/current/2.json");
    fixture.publish("demo/b", vec![]);
    until("the other environment is told anew", || {
        tree.refresh();
        assert_eq!(walk(&tree, "demo/a/.venv").unwrap().unwrap().ino, a.ino);
        walk(&tree, "demo/b/.venv").unwrap().unwrap().ino != b.ino
    });
    until("nobody waits for the one that hangs", || {
        tree.refresh();
        at_once(|| walk(&tree, "demo/a/.venv")).is_ok()
    });
    drop(hung);
    until("it is told anew, too", || walk(&tree, "demo/a/.venv").unwrap().unwrap().ino != a.ino);
}

#[test]
fn a_version_whose_document_hangs_can_be_shown_later() {
    let _alone = alone();
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    let tree = distant(&fixture);
    let names = walk(&tree, "demo/a").unwrap().unwrap();
    fixture.publish("demo/a", vec![]);
    let hung = Hung::file(&fixture, "envs/demo/a/versions/2.json");
    let look = || tree.lookup(tree.lookup(names.ino, b".versions")?.unwrap().ino, b"2");
    assert_eq!(kind(look()), Some(Kind::TimedOut));
    drop(hung);
    until("it is shown", || look().is_ok_and(|found| found.is_some()));
}
