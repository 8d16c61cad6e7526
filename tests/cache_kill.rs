//! The program is killed while it fills its cache: what is left is right, or is found to be wrong and fetched again.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::*;
use envfabric::cache::{Cache, Options, Whole};
use envfabric::mount::{stats, umount};
use envfabric::store::{Chunks, Object, Room};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The program, with a mount that goes when this does.
struct Program {
    child: Child,
    mount_point: PathBuf,
}

impl Program {
    fn start(fixture: &Fixture, cache: &Path, limit: &str) -> Program {
        let at = |name: &str| fixture.dir.path().join(name);
        let child = Command::new(env!("CARGO_BIN_EXE_envfabric"))
            .arg("--store")
            .arg(fixture.store.root())
            .args(["mount", "--foreground", "--cache-free=0B", "--threads=2"])
            .arg(format!("--cache={}", cache.display()))
            .arg(format!("--cache-size={limit}"))
            .arg(at("mounted"))
            .env("XDG_STATE_HOME", at("state"))
            .env("XDG_CONFIG_HOME", at("config"))
            .env_remove("ENVFABRIC_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let program = Program { child, mount_point: at("mounted") };
        until("it is mounted", || stats(&program.mount_point).is_ok());
        program
    }

    /// Kills who serves and who would replace it.
    fn kill(&mut self) {
        let worker = stats(&self.mount_point).ok().map(|stats| stats.pid);
        let _ = self.child.kill();
        self.child.wait().unwrap();
        if let Some(worker) = worker {
            let _ = kill(Pid::from_raw(worker as i32), Signal::SIGKILL);
            let exe = PathBuf::from(format!("/proc/{worker}/exe"));
            until("the worker is gone", || fs::read_link(&exe).is_err());
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        let _ = umount(&self.mount_point, true);
    }
}

/// Reads every object of the store through the cache in `dir`, and compares; returns how many bytes had to be fetched.
fn verify(fixture: &Fixture, dir: &Path) -> u64 {
    let cache = Cache::open(Options { keep_free: 0, ..Options::at(dir) }, fixture.store.clone()).unwrap();
    for room in Room::ALL {
        for entry in fs::read_dir(fixture.store.root().join(room.name())).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let digest = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let object = Object { room, digest, size: bytes.len() as u64 };
            if room == Room::Catalogs {
                match cache.whole(&object).unwrap() {
                    Whole::File(path, _held) => assert!(fs::read(path).unwrap() == bytes),
                    Whole::Bytes(read) => assert!(read == bytes),
                }
            } else {
                assert!(cache.read(&object, || Ok(Chunks::of(&bytes)), 0, object.size).unwrap() == bytes);
            }
        }
    }
    until("what it holds is on the disk", || {
        let files = walk(dir).into_iter().filter(|path| path.components().any(|part| part.as_os_str() != "trash"));
        let rooms = files.filter(|path| Room::ALL.iter().any(|room| path.starts_with(dir.join(room.name()))));
        cache.stats().held == rooms.map(|path| fs::metadata(path).unwrap().blocks() * 512).sum::<u64>()
    });
    cache.stats().unpacked_bytes
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(walk(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

#[test]
fn a_mount_killed_at_any_moment_leaves_a_cache_that_serves_nothing_wrong() {
    needs_mounts!();
    const PACKAGES: u64 = 12;
    let fixture = Fixture::new();
    let layers = (0..PACKAGES).map(|n| {
        let small = (0..10).map(|m| file(format!("{SITE}/p{n}/{m}.py"), noise(7_000, 1_000 + n * 10 + m)));
        let big = file(format!("{SITE}/p{n}/big.bin"), noise(900_000, n + 1));
        fixture.layer(&format!("p{n}"), small.chain([big]).collect())
    });
    fixture.publish("demo/a", layers.collect());
    let total: u64 = walk(fixture.store.root()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    let big: Vec<Vec<u8>> = (0..PACKAGES).map(|n| noise(900_000, n + 1)).collect();
    let mut kept = 0;
    // A small cache evicts all the time; a large one is found again by the next.
    for (round, limit) in ["1GiB", "3MiB", "1GiB", "3MiB"].into_iter().enumerate() {
        let cache = fixture.place(&format!("cache{round}"));
        for life in 0..4u64 {
            let mut program = Program::start(&fixture, &cache, limit);
            let site = program.mount_point.join("demo/a/.versions/1/.venv").join(SITE);
            // It dies after so many files were read, somewhere between two others.
            let last = 1 + (round as u64 * 29 + life * 17) % 40;
            let (read, killed) = (AtomicU64::new(0), AtomicBool::new(false));
            thread::scope(|scope| {
                for reader in 0..6 {
                    let (site, read, killed, big) = (&site, &read, &killed, &big);
                    scope.spawn(move || {
                        for turn in 0.. {
                            let n = (turn * 5 + reader * 7 + life) % PACKAGES;
                            let of_big = fs::read(site.join(format!("p{n}/big.bin")));
                            let of_small = fs::read(site.join(format!("p{n}/{}.py", turn % 10)));
                            match (&of_big, &of_small) {
                                (Ok(of_big), Ok(of_small)) => {
                                    assert!(*of_big == big[n as usize]);
                                    assert!(*of_small == noise(7_000, 1_000 + n * 10 + turn % 10));
                                }
                                _ => {
                                    assert!(killed.load(Ordering::SeqCst), "a read failed before");
                                    return;
                                }
                            }
                            read.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
                until("it is time", || read.load(Ordering::SeqCst) >= last);
                killed.store(true, Ordering::SeqCst);
                program.kill();
            });
        }
        let fetched = verify(&fixture, &cache);
        kept += total.saturating_sub(fetched);
    }
    assert!(kept > 0, "nothing at all was found again");
}
