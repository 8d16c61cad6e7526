//! Crashes: what is on disk after a power failure at any moment of any command that writes to a store.
//!
//! Every change that a command makes to a store is recorded ([`disk::watch`]), with the bytes of files at the moment they
//! were made durable. Then the disk of every moment is made up, in a fresh directory, from what was there before and a
//! part of what was recorded:
//!
//! - everything up to that moment (a file system that keeps order);
//! - only what a `fsync` has made durable (names by that of their directory, bytes by that of their file);
//! - that, and some of the rest, chosen at random (names that come without others, files without their bytes).
//!
//! Each is opened: every version that can be seen is whole, every environment is in its old or its new state, and the
//! command can be run again and a collector after it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::*;
use envfabric::environment::EnvName;
use envfabric::store::disk::{self, Op, Verdict, Watch};
use envfabric::store::{Codec, GcOptions, Keep, Severity, Store};

const HOUR: Duration = Duration::from_secs(3600);

/// What was done, in order; with a file's bytes where they were made durable.
#[derive(Default)]
struct Recorder(Mutex<Vec<(Op, Option<Vec<u8>>)>>);

impl Watch for Recorder {
    fn before(&self, _: &Op) -> Verdict {
        Verdict::Do
    }

    fn done(&self, op: &Op) {
        let bytes = match op {
            Op::Sync(path) => fs::read(path).ok(),
            _ => None,
        };
        self.0.lock().unwrap().push((op.clone(), bytes));
    }
}

/// A file: its durable bytes, those of which half may be there, and whether it is old.
#[derive(Debug, Clone)]
struct Inode {
    bytes: Vec<u8>,
    modified: SystemTime,
}

/// A directory tree in memory. Directories are there by their names alone.
#[derive(Debug, Clone, Default)]
struct Disk {
    inodes: Vec<Inode>,
    files: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
}

impl Disk {
    fn of(root: &Path) -> Disk {
        fn walk(disk: &mut Disk, root: &Path, dir: &Path) {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                let below = entry.path().strip_prefix(root).unwrap().to_path_buf();
                if entry.file_type().unwrap().is_dir() {
                    disk.dirs.insert(below);
                    walk(disk, root, &entry.path());
                } else {
                    let modified = entry.metadata().unwrap().modified().unwrap();
                    disk.files.insert(below, disk.inodes.len());
                    disk.inodes.push(Inode { bytes: fs::read(entry.path()).unwrap(), modified });
                }
            }
        }
        let mut disk = Disk::default();
        walk(&mut disk, root, root);
        disk
    }

    /// Does `op` if it makes sense on this disk; what it needs may not have become durable.
    fn apply(&mut self, root: &Path, op: &Op, bytes: Option<&Vec<u8>>) {
        let below = |path: &PathBuf| path.strip_prefix(root).unwrap().to_path_buf();
        let has_parent = |disk: &Disk, path: &Path| {
            path.parent().is_none_or(|parent| parent.as_os_str().is_empty() || disk.dirs.contains(parent))
        };
        match op {
            Op::Create(path) => {
                if has_parent(self, &below(path)) {
                    self.files.insert(below(path), self.inodes.len());
                    self.inodes.push(Inode { bytes: vec![], modified: SystemTime::now() });
                }
            }
            Op::Sync(path) => {
                if let (Some(at), Some(bytes)) = (self.files.get(&below(path)), bytes) {
                    self.inodes[*at].bytes.clone_from(bytes);
                }
            }
            Op::Link(from, to) | Op::RenameNew(from, to) | Op::Rename(from, to) => {
                let (from, to) = (below(from), below(to));
                let Some(at) = self.files.get(&from).copied().filter(|_| has_parent(self, &to)) else { return };
                if !matches!(op, Op::Link(..)) {
                    self.files.remove(&from);
                }
                self.files.insert(to, at);
            }
            Op::Remove(path) => drop(self.files.remove(&below(path))),
            Op::MakeDir(path) => {
                if has_parent(self, &below(path)) {
                    self.dirs.insert(below(path));
                }
            }
            Op::RemoveDir(path) => {
                let path = below(path);
                let is_empty = !self.files.keys().chain(&self.dirs).any(|p| p != &path && p.starts_with(&path));
                if is_empty {
                    self.dirs.remove(&path);
                }
            }
            Op::Touch(path) => {
                if let Some(at) = self.files.get(&below(path)) {
                    self.inodes[*at].modified = SystemTime::now();
                }
            }
            Op::Write(..) | Op::Seal(_) | Op::SyncDir(_) => {}
        }
    }

    fn write_to(&self, root: &Path) {
        fs::create_dir_all(root).unwrap();
        for dir in &self.dirs {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for (path, at) in &self.files {
            let inode = &self.inodes[*at];
            fs::write(root.join(path), &inode.bytes).unwrap();
            File::open(root.join(path)).unwrap().set_modified(inode.modified).unwrap();
        }
    }
}

/// Directories whose names an operation changes.
fn changes(op: &Op) -> Vec<&Path> {
    match op {
        Op::Create(path) | Op::Remove(path) | Op::MakeDir(path) | Op::RemoveDir(path) => {
            path.parent().into_iter().collect()
        }
        Op::Link(_, to) => to.parent().into_iter().collect(),
        Op::RenameNew(from, to) | Op::Rename(from, to) => [from.parent(), to.parent()].into_iter().flatten().collect(),
        _ => vec![],
    }
}

/// True for each of `ops` that is surely on disk after all of them: its directories were made durable afterwards.
fn durable(ops: &[(Op, Option<Vec<u8>>)]) -> Vec<bool> {
    let synced = |dir: &Path, after: usize| {
        ops[after..].iter().any(|(op, _)| matches!(op, Op::SyncDir(synced) if synced == dir))
    };
    let is_durable = |at: usize, op: &Op| match op {
        Op::Sync(_) | Op::SyncDir(_) => true,
        Op::Write(..) | Op::Seal(_) | Op::Touch(_) => false,
        // A name in tmp/ is never made durable, but the file is what a link elsewhere leads to.
        Op::Create(_) => true,
        op => changes(op).iter().all(|dir| synced(dir, at)),
    };
    ops.iter().enumerate().map(|(at, (op, _))| is_durable(at, op)).collect()
}

/// A small random number generator: which parts are chosen must not change from run to run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What can be seen of an environment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    current: Option<u64>,
    versions: Vec<u64>,
}

fn seen(store: &Store, names: &[EnvName]) -> Vec<Seen> {
    let of = |name: &EnvName| Seen {
        current: store.pointer(name).unwrap().and_then(|pointer| pointer.version),
        versions: store.version_numbers(name).unwrap(),
    };
    names.iter().map(of).collect()
}

/// Runs `command` on a store as `prepare` leaves it, and looks at the disk after a crash at every moment of it.
fn crash_everywhere(
    what: &str,
    codec: Codec,
    prepare: impl Fn(&Fixture),
    command: impl Fn(&Fixture, &Store),
    again: impl Fn(&Store),
) {
    let fixture = Fixture::with(codec);
    prepare(&fixture);
    let root = fixture.store.root().to_path_buf();
    let names: Vec<EnvName> = ["demo/a", "demo/b"].map(|name| name.parse().unwrap()).into();
    let (before, old) = (Disk::of(&root), seen(&fixture.store, &names));
    let recorder = Arc::new(Recorder::default());
    {
        let _watching = disk::watch(&root, recorder.clone());
        command(&fixture, &fixture.store);
    }
    let new = seen(&fixture.store, &names);
    let ops = std::mem::take(&mut *recorder.0.lock().unwrap());
    assert!(ops.len() > 5, "{what} was recorded");
    // Where nothing is waited for.
    let shared = Path::new("/dev/shm");
    let memory = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() }.unwrap();
    let mut random = Random(0x9E37_79B9);
    let mut looked = 0;
    for end in 0..=ops.len() {
        let ops = &ops[..end];
        let sure = durable(ops);
        let mut kept: Vec<Vec<bool>> = vec![vec![true; end], sure.clone()];
        for _ in 0..2 {
            kept.push(sure.iter().map(|sure| *sure || random.below(2) == 0).collect());
        }
        // One name alone did not get there.
        if let Some(lost) = (0..end).rev().filter(|at| !sure[*at]).nth(random.below(4) as usize) {
            kept.push((0..end).map(|at| at != lost).collect());
        }
        kept.dedup();
        for kept in kept {
            let mut disk = before.clone();
            for ((op, bytes), _) in ops.iter().zip(&kept).filter(|(_, kept)| **kept) {
                disk.apply(&root, op, bytes.as_ref());
            }
            let dir = memory.path().join("crashed");
            disk.write_to(&dir);
            let store = Store::open(&dir).unwrap();
            let told = || {
                let lost: Vec<&Op> = ops.iter().zip(&kept).filter(|(_, kept)| !**kept).map(|((op, _), _)| op).collect();
                format!("{what}, crashed after {end} operations, the last of them {:?}, without {lost:?}", ops.last())
            };
            for (name, (now, (old, new))) in names.iter().zip(seen(&store, &names).iter().zip(old.iter().zip(&new))) {
                let states = [old.current, new.current];
                assert!(states.contains(&now.current), "{name} is at {:?}: {}", now.current, told());
                // Of several versions that are retired some may be and others not.
                let (mut all, mut both) = (old.versions.clone(), old.versions.clone());
                all.extend(&new.versions);
                both.retain(|number| new.versions.contains(number));
                assert!(now.versions.iter().all(|number| all.contains(number)), "{name} {now:?}: {}", told());
                assert!(both.iter().all(|number| now.versions.contains(number)), "{name} {now:?}: {}", told());
            }
            let report = store.fsck(&|_, _| {}).unwrap();
            let broken = report.findings.iter().filter(|f| f.severity == Severity::Error && !f.affects.is_empty());
            let broken: Vec<_> = broken.collect();
            assert!(broken.is_empty(), "{broken:#?}: {}", told());
            again(&store);
            let report = store.fsck(&|_, _| {}).unwrap();
            assert!(report.is_clean(), "{:#?} after it was done again: {}", report.findings, told());
            fs::remove_dir_all(&dir).unwrap();
            looked += 1;
        }
    }
    println!("{what}: {} operations, {looked} disks", ops.len());
}

fn gc(keep: Keep) -> impl Fn(&Store) {
    move |store| drop(store.gc(&GcOptions { grace: HOUR, keep, ..GcOptions::default() }, &|_| {}).unwrap())
}

/// Small layers, one with a large file.
fn layers(fixture: &Fixture, names: &[&str]) -> Vec<envfabric::environment::Digest> {
    let layer = |name: &&str| {
        fixture.layer(
            name,
            vec![
                file(format!("{SITE}/{name}.py"), format!("# {name}\n")),
                file(format!("{SITE}/{name}.bin"), noise(300_000, name.len() as u64)),
            ],
        )
    };
    names.iter().map(layer).collect()
}

fn older(store: &Store, time: Duration) {
    let disk = Disk::of(store.root());
    for (path, at) in &disk.files {
        let file = File::open(store.root().join(path)).unwrap();
        file.set_modified(disk.inodes[*at].modified - time).unwrap();
    }
}

#[test]
fn creating_leaves_the_old_or_the_new_state() {
    for codec in [Codec::Raw, Codec::Zstd] {
        crash_everywhere(
            "create",
            codec,
            |fixture| {
                fixture.publish("demo/a", layers(fixture, &["one"]));
            },
            |fixture, _| {
                let layers = layers(fixture, &["one", "three"]);
                fixture.publish("demo/a", layers.clone());
                fixture.publish("demo/b", layers);
            },
            |store| {
                let a: EnvName = "demo/a".parse().unwrap();
                let current = store.current(&a).unwrap();
                let next = store.publish_version(current).unwrap().version().number;
                assert_eq!(store.current_number(&a).unwrap(), next);
            },
        );
    }
}

#[test]
fn rolling_back_and_removing_leave_the_old_or_the_new_state() {
    let prepare = |fixture: &Fixture| {
        fixture.publish("demo/a", layers(fixture, &["one"]));
        fixture.publish("demo/a", vec![]);
        fixture.publish("demo/b", vec![]);
    };
    let a = || "demo/a".parse::<EnvName>().unwrap();
    let back = |_: &Fixture, store: &Store| drop(store.rollback(&a(), 1).unwrap());
    crash_everywhere("rollback", Codec::Raw, prepare, back, |store| drop(store.rollback(&a(), 2).unwrap()));
    let remove = |_: &Fixture, store: &Store| drop(store.remove(&a()).unwrap());
    crash_everywhere("remove", Codec::Raw, prepare, remove, |store| {
        let _ = store.remove(&a());
        assert_eq!(store.undo_remove(&a()).unwrap().version, Some(2));
    });
}

#[test]
fn collecting_leaves_everything_that_is_needed() {
    let a = || "demo/a".parse::<EnvName>().unwrap();
    let prepare = |fixture: &Fixture| {
        for name in ["one", "two2", "three"] {
            fixture.publish("demo/a", layers(fixture, &[name, "shared"]));
        }
        fixture.publish("demo/b", layers(fixture, &["only in b", "shared"]));
        layers(fixture, &["idle layer"]);
        older(&fixture.store, HOUR * 2);
    };
    // Retires two versions and takes an idle layer.
    let keep = Keep::Newest(1);
    crash_everywhere("gc", Codec::Raw, prepare, |_, store| gc(keep)(store), gc(keep));
    // Ends what lies in the trash, and takes what only that needed.
    let prepared = |fixture: &Fixture| {
        prepare(fixture);
        gc(keep)(&fixture.store);
        older(&fixture.store, HOUR * 2);
    };
    crash_everywhere(
        "gc of the trash",
        Codec::Raw,
        prepared,
        |_, store| gc(keep)(store),
        |store| {
            older(store, HOUR * 2);
            gc(keep)(store);
            gc(keep)(store);
        },
    );
    // A version comes back while a collector has it in the trash, and another is removed.
    let undo = |_: &Fixture, store: &Store| {
        store.rollback(&a(), 1).unwrap();
        gc(Keep::All)(store);
    };
    let trashed = |fixture: &Fixture| {
        prepare(fixture);
        gc(keep)(&fixture.store);
    };
    crash_everywhere("undo", Codec::Raw, trashed, undo, |store| {
        gc(Keep::All)(store);
        store.current(&a()).unwrap();
    });
}
