//! A distant store that hangs: what is known is told, nobody waits for ever, and all goes on when it is back.
//!
//! A file that hangs whoever opens it is a FIFO that nobody writes to.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::*;
use envfabric::environment::{Mode, Owner};
use envfabric::error::{Error, Kind};
use envfabric::mount::{Mounted, Options, mount, stats};
use envfabric::patience::at_once;
use envfabric::view::{Attr, Ino, Tree};

/// One test at a time: the threads that hang are those of the whole process, and so is the log.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).try_init();
    LOG.lock().unwrap().clear();
    alone
}

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn logged() -> Vec<String> {
    String::from_utf8(LOG.lock().unwrap().clone()).unwrap().lines().map(String::from).collect()
}

/// A file of the store that hangs whoever opens it, until dropped.
struct Hung {
    path: PathBuf,
    fifo: PathBuf,
    was: PathBuf,
}

impl Hung {
    fn file(fixture: &Fixture, path: &str) -> Hung {
        let dir = fixture.place(&format!("hung-{}", path.replace('/', "-")));
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
    fixture.publish("demo/a", vec![]);
    let tree = distant(&fixture);
    assert_eq!(kind(at_once(|| walk(&tree, "demo/a"))), Some(Kind::WouldWait), "nothing is known yet");
    let known = walk(&tree, "demo/a/.venv").unwrap().unwrap();
    tree.list(Ino::ROOT).unwrap();
    assert_eq!(at_once(|| walk(&tree, "demo/a/.venv")).unwrap(), Some(known), "it is fresh");

    // All that is asked for to see whether anything has changed.
    let hung = ["fabric.json", "envs/demo/a/current/3.json"].map(|file| Hung::file(&fixture, file));
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

/// Served by one thread.
fn served(fixture: &Fixture, patience: Duration) -> Mounted {
    let options =
        Options { threads: 1, distant: Some(true), patience, ..Options::at(fixture.dir.path().join("mounted")) };
    mount(fixture.store.clone(), fixture.index.clone(), &options).unwrap()
}

fn lookups(mounted: &Mounted) -> u64 {
    stats(mounted.mount_point()).unwrap().requests["LOOKUP"]
}

/// What somebody does who works with the environment.
fn work(root: &Path) {
    let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
    assert_eq!(names(root), 1);
    assert_eq!(names(&root.join("demo")), 1);
    assert_eq!(names(&root.join("demo/a")), 6);
    let site = root.join("demo/a/.venv").join(SITE);
    assert_eq!(fs::read_to_string(site.join("alpha/__init__.py")).unwrap(), "name = \"alpha\"\n");
    assert_eq!(fs::read(site.join("alpha/data/big.bin")).unwrap(), noise(700_000, 100));
    assert!(fs::read_to_string(root.join("demo/a/.venv/pyvenv.cfg")).unwrap().starts_with("home = "));
    nix::sys::statvfs::statvfs(root).unwrap();
}

#[test]
fn one_thread_serves_what_is_known_while_hundreds_wait_for_a_store_that_hangs() {
    needs_mounts!();
    const MANY: usize = 200;
    let patience = Duration::from_secs(6);
    let _alone = alone();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, patience);
    let root = mounted.mount_point();
    work(root);
    let site = fs::File::open(root.join("demo/a/.venv").join(SITE)).unwrap();
    let hung = Hung::file(&fixture, "fabric.json");
    let before = lookups(&mounted);
    std::thread::scope(|scope| {
        let ask = |n| move || fs::metadata(root.join("demo").join(format!("unknown{n}"))).unwrap_err().raw_os_error();
        let waiting: Vec<_> = (0..MANY).map(|n| scope.spawn(ask(n))).collect();
        // That the mount tells of itself meanwhile is part of the promise.
        until("all have asked", || lookups(&mounted) >= before + MANY as u64);
        // What is inside a version and what is told of the mount needs nobody to notice anything first.
        let begun = Instant::now();
        let inside = format!("/proc/self/fd/{}/beta/data/small.bin", site.as_raw_fd());
        assert_eq!(fs::read(inside).unwrap(), noise(5_000, 201));
        stats(root).unwrap();
        assert!(begun.elapsed() < patience / 4);
        // The first to notice waits as long as the others.
        work(root);
        for thread in waiting {
            assert_eq!(thread.join().unwrap(), Some(libc::EIO));
        }
        let told = logged();
        assert_eq!(told.len(), 1, "{told:#?}");
        assert!(told[0].contains("the store has not answered for 6 s"), "{told:?}");

        let waiting: Vec<_> = (0..MANY).map(|n| scope.spawn(ask(n))).collect();
        until("all have asked again", || lookups(&mounted) >= before + 2 * MANY as u64);
        let begun = Instant::now();
        for _ in 0..3 {
            work(root);
        }
        assert!(begun.elapsed() < patience / 2, "{:?}", begun.elapsed());
        assert!(waiting.iter().all(|thread| !thread.is_finished()), "they wait meanwhile");

        drop(hung);
        for thread in waiting {
            assert!(matches!(thread.join().unwrap(), Some(libc::EIO | libc::ENOENT)));
        }
    });
    until("names are told anew", || {
        fs::metadata(root.join("demo/unknown")).is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT))
    });
    fixture.publish("demo/unknown0", vec![]);
    drop(site);
    until("a new environment is shown", || root.join("demo/unknown0/.venv/bin/activate").exists());
    let told = logged().iter().filter(|line| line.contains("the store answers again")).count();
    assert_eq!(told, 1, "{:#?}", logged());
    mounted.unmount().unwrap();
}

#[test]
fn an_owner_that_is_known_counts_while_the_store_hangs() {
    let _alone = alone();
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    fixture.publish("other/a", vec![]);
    fixture.store.set_owner("demo", Some(Owner { uid: 5, gid: 6, mode: Mode::GROUP })).unwrap();
    let tree = distant(&fixture);
    let shown = |path: &str| walk(&tree, path).map(|found| found.map(|attr| (attr.owner, attr.mode)));
    let known = Some((Some((5, 6)), 0o750));
    for file in ["owners/demo/2.json", "fabric.json"] {
        for path in ["demo", "demo/a", "demo/a/.versions"] {
            assert_eq!(shown(path).unwrap(), known, "{path}");
        }
        let hung = Hung::file(&fixture, file);
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            assert_eq!((shown("demo").unwrap(), shown("demo/a").unwrap()), (known, known), "{file}");
        }
        drop(hung);
        // Who was hanging has found an empty file, which is a damaged one, until it is looked at again.
        std::thread::sleep(Duration::from_millis(600));
        until("it answers again", || {
            tree.refresh();
            !tree.is_cut_off() && shown("demo").is_ok_and(|shown| shown == known)
        });
    }
    // Where nothing is known, nobody is let in.
    fs::create_dir(fixture.store.root().join("owners/other")).unwrap();
    let hung = Hung::file(&fixture, "owners/other/1.json");
    assert_eq!(kind(shown("other")), Some(Kind::TimedOut));
    drop(hung);
    until("it answers again", || {
        tree.refresh();
        shown("other").is_ok_and(|shown| shown == Some((None, 0o755)))
    });
}

/// Run by the next test, in a process of its own.
#[test]
#[ignore = "part of another test"]
fn ends_with_threads_that_hang() {
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    let hung = Hung::file(&fixture, "fabric.json");
    let mounted = served(&fixture, LIMIT);
    assert!(fs::metadata(mounted.mount_point().join("demo")).is_err());
    mounted.unmount().unwrap();
    std::mem::forget(hung);
}

#[test]
fn a_process_ends_whatever_hangs_in_it() {
    needs_mounts!();
    let _alone = alone();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "ends_with_threads_that_hang"])
        .spawn()
        .unwrap();
    let mut ended = None;
    until("it ends", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success());
}
