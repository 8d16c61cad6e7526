//! Many and long things through real mounts: they behave, and what they cost the process that serves is bounded.
//!
//! Each runs three times: with passthrough, without, and through the node cache, which is empty at first.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;
mod supervised;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;

use common::*;
use envfabric::environment::Digest;
use envfabric::mount::{Stats, stats};
use envfabric::store::Codec;
use nix::fcntl::{OFlag, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, mkdirat};
use supervised::Supervised;

/// Memory that the process which serves may take, in bytes: it has some 40 MB when it begins.
const MEMORY_MAX: u64 = 512 << 20;

/// How a store is served.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Passthrough,
    Plain,
    Cached,
}

impl Way {
    const ALL: [Way; 3] = [Way::Passthrough, Way::Plain, Way::Cached];

    fn fixture(self) -> Fixture {
        Fixture::with(if self == Way::Cached { Codec::Zstd } else { Codec::Raw })
    }

    fn mount(self, fixture: &Fixture) -> Supervised {
        let flags: &[&str] = if self == Way::Plain { &["--no-passthrough"] } else { &[] };
        Supervised::start(fixture, "m", flags, &[])
    }
}

fn site(mount: &Supervised) -> PathBuf {
    mount.dir.join("demo/a/.versions/1/.venv").join(SITE)
}

/// Every bounded memory within its bound, and the rest of what the mount tells within what is said of it.
fn within_bounds(mount: &Supervised) -> Stats {
    let told = stats(&mount.dir).unwrap();
    for (name, memory) in &told.memories {
        assert!(memory.held <= memory.most, "{name}: {memory:?}");
    }
    assert!(told.open_files <= told.open_files_most, "{told:?}");
    assert!(told.process_threads <= told.process_threads_most, "{told:?}");
    assert!(told.resident_bytes < MEMORY_MAX, "{told:?}");
    told
}

/// An environment of so many layers, written by several threads, as each waits for the disk most of the time.
fn publish_layers(fixture: &Fixture, count: u64, content: impl Fn(u64) -> String + Sync) {
    const THREADS: u64 = 16;
    let layer = |n: u64| {
        let text = |name: String| file(format!("{SITE}/{name}"), content(n));
        fixture.layer(&format!("p{n}"), vec![text(format!("p{n}/__init__.py")), text(format!("shared/m{n}.py"))])
    };
    let layer = &layer;
    let layers = std::thread::scope(|scope| {
        let part = |first| scope.spawn(move || (first..count).step_by(THREADS as usize).map(layer).collect::<Vec<_>>());
        let parts: Vec<_> = (0..THREADS).map(part).collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    });
    fixture.publish("demo/a", layers);
}

#[test]
fn an_environment_of_2000_layers_is_shown_whole_and_few_catalogs_stay_open() {
    needs_mounts!();
    const LAYERS: u64 = 2000;
    let content = |n: u64| format!("{n}\n").repeat(50);
    let fixtures = [Codec::Raw, Codec::Zstd].map(Fixture::with);
    fixtures.iter().for_each(|fixture| publish_layers(fixture, LAYERS, content));
    for way in Way::ALL {
        let mount = way.mount(&fixtures[usize::from(way == Way::Cached)]);
        let site = site(&mount);
        let names = |dir: &Path| -> BTreeSet<String> {
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let packages: BTreeSet<String> = (0..LAYERS).map(|n| format!("p{n}")).chain(["shared".into()]).collect();
        assert_eq!(names(&site), packages, "{way:?}");
        assert_eq!(names(&site.join("shared")), (0..LAYERS).map(|n| format!("m{n}.py")).collect(), "{way:?}");
        // Some twice, as what is read first has been forgotten when it comes again.
        for step in [1, 7] {
            for n in (0..LAYERS).step_by(step) {
                for path in [format!("p{n}/__init__.py"), format!("shared/m{n}.py")] {
                    assert_eq!(fs::read_to_string(site.join(&path)).unwrap(), content(n), "{way:?} {path}");
                }
            }
            let told = within_bounds(&mount);
            assert!(told.memories["catalogs"].most < LAYERS, "{told:?}");
            assert!(told.open_files < 1_500, "{way:?}: {} open files", told.open_files);
            assert!(told.memories["layer numbers"].held > LAYERS, "{told:?}");
        }
        mount.umount();
    }
}

#[test]
fn a_listing_of_100000_names_through_a_mount_meets_each_once() {
    needs_mounts!();
    let fixture = Fixture::new();
    let many = |from: u32| (from..from + 60_000).map(|i| file(format!("{SITE}/many/{i:06}"), "")).collect();
    fixture.publish("demo/a", vec![fixture.layer("one", many(0)), fixture.layer("two", many(40_000))]);
    let mount = Way::Plain.mount(&fixture);
    let mut met = vec![false; 100_000];
    for entry in fs::read_dir(site(&mount).join("many")).unwrap() {
        let number: usize = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        assert!(!std::mem::replace(&mut met[number], true), "{number} twice");
    }
    assert!(met.into_iter().all(|met| met));
    within_bounds(&mount);
    mount.umount();
}

/// The directory at the end of `parts` below `root`, opened part by part, as no path of its length could be.
fn walk(root: &Path, parts: &[String], make: bool) -> OwnedFd {
    let mut dir = OwnedFd::from(File::open(root).unwrap());
    for part in parts {
        if make {
            mkdirat(&dir, part.as_str(), Mode::S_IRWXU).unwrap();
        }
        dir = openat(&dir, part.as_str(), OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
    }
    dir
}

/// What a read of the file at `path` gives: its first byte, or the error.
fn looked_at(path: &Path) -> Result<u8, Option<i32>> {
    let mut byte = [0];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut byte, 0));
    read.map(|()| byte[0]).map_err(|error| error.raw_os_error())
}

#[test]
fn names_and_paths_may_be_as_long_as_on_a_local_disk_and_no_longer() {
    needs_mounts!();
    for way in Way::ALL {
        let fixture = way.fixture();
        let mounted = fixture.dir.path().join("m/demo/a/.versions/1/.venv");
        let local = fixture.place("local");
        // A name of 255 bytes; a path of 4,095 bytes and the zero behind it; one of a byte more.
        let parts_to = |root: &Path, length: usize| -> Vec<String> {
            let mut left = length - root.as_os_str().len();
            let mut parts = Vec::new();
            while left > 0 {
                let take = match left {
                    ..=256 => left - 1,
                    257 => 100,
                    _ => 255,
                };
                parts.push("d".repeat(take));
                left -= take + 1;
            }
            parts
        };
        let paths = |root: &Path| [parts_to(root, 4095), parts_to(root, 4096), vec!["n".repeat(255)]];
        let staged = paths(&mounted).map(|parts| file(parts.join("/"), "x"));
        fixture.publish("demo/a", vec![fixture.layer("deep", staged.into())]);
        let mount = way.mount(&fixture);
        for parts in paths(&local) {
            let (name, dirs) = parts.split_last().unwrap();
            let dir = match dirs.is_empty() {
                true => walk(&local, &[], false),
                // The two long paths part ways only at their end.
                false => walk(&local, dirs, !local.join(&dirs[0]).exists()),
            };
            let made = openat(&dir, name.as_str(), OFlag::O_CREAT | OFlag::O_WRONLY, Mode::S_IRUSR).unwrap();
            File::from(made).write_all(b"x").unwrap();
        }
        for (root, what) in [(&mounted, "mounted"), (&local, "local")] {
            let [longest, longer, name] = paths(root).map(|parts| root.join(parts.join("/")));
            assert_eq!((longest.as_os_str().len(), longer.as_os_str().len()), (4095, 4096));
            assert_eq!(looked_at(&longest), Ok(b'x'), "{way:?} {what}");
            assert_eq!(looked_at(&longer), Err(Some(libc::ENAMETOOLONG)), "{way:?} {what}");
            assert_eq!(looked_at(&name), Ok(b'x'), "{way:?} {what}");
            assert_eq!(looked_at(&root.join("n".repeat(254))), Err(Some(libc::ENOENT)), "{way:?} {what}");
            assert_eq!(looked_at(&root.join("n".repeat(256))), Err(Some(libc::ENAMETOOLONG)), "{way:?} {what}");
            // What no path leads to can be reached step by step.
            let parts = parts_to(root, 4096);
            let (last, dirs) = parts.split_last().unwrap();
            let opened = openat(walk(root, dirs, false), last.as_str(), OFlag::O_RDONLY, Mode::empty()).unwrap();
            let mut byte = [0];
            File::from(opened).read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(&byte, b"x", "{way:?} {what}");
            let listed: Vec<usize> =
                fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().as_bytes().len()).collect();
            assert!(listed.contains(&255), "{way:?} {what}");
        }
        mount.umount();
    }
}

/// A layer of many files: small ones, and some that the kernel may read by itself.
struct Many {
    files: Vec<(String, Vec<u8>)>,
}

impl Many {
    fn new(count: u64, large_every: u64) -> Many {
        let content = |n: u64| noise(if n.is_multiple_of(large_every) { 140_000 } else { 300 }, n + 1);
        Many { files: (0..count).map(|n| (format!("{n:05}.bin"), content(n))).collect() }
    }

    fn publish(&self, fixture: &Fixture) {
        let staged = self.files.iter().map(|(name, content)| file(format!("{SITE}/many/{name}"), content.clone()));
        fixture.publish("demo/a", vec![fixture.layer("many", staged.collect())]);
    }
}

/// Opens the files that it is told of, tells the digest of what each has, and holds them until its input ends.
const HOLDER: &str = "
import hashlib, os, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
root, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = [os.open(f'{root}/{n:05}.bin', os.O_RDONLY) for n in range(first, end)]
whole = hashlib.sha256()
for fd in held:
    while part := os.read(fd, 1 << 20):
        whole.update(part)
print(whole.hexdigest(), flush=True)
sys.stdin.read()
";

/// Has all files open in so many processes, and returns these; what each has read is right.
fn hold_all(many: &Many, dir: &Path, processes: usize) -> Vec<Child> {
    let share = many.files.len().div_ceil(processes);
    let begin = |(at, files): (usize, &[(String, Vec<u8>)])| {
        let range = [at * share, at * share + files.len()].map(|n| n.to_string());
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-c", HOLDER]).arg(dir).args(range).stdin(Stdio::piped()).stdout(Stdio::piped());
        python.spawn().unwrap()
    };
    let mut holders: Vec<Child> = many.files.chunks(share).enumerate().map(begin).collect();
    for (holder, files) in holders.iter_mut().zip(many.files.chunks(share)) {
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let whole: Vec<u8> = files.iter().flat_map(|(_, content)| content.clone()).collect();
        assert_eq!(line.trim(), Digest::of(&whole).to_string());
    }
    holders
}

fn let_go(holders: Vec<Child>) {
    for mut holder in holders {
        drop(holder.stdin.take());
        assert!(holder.wait().unwrap().success());
    }
}

#[test]
fn ten_thousand_files_are_open_at_once_and_cost_the_mount_no_descriptor_when_they_are_closed() {
    needs_mounts!();
    let many = Many::new(10_000, 20);
    for way in Way::ALL {
        let fixture = way.fixture();
        many.publish(&fixture);
        let mount = way.mount(&fixture);
        let dir = site(&mount).join("many");
        let released = || {
            let told = stats(&mount.dir).unwrap();
            told.requests["RELEASE"] == told.opens.passthrough + told.opens.cached + told.opens.direct
        };
        // Whatever stays open by design, within its bound, is open after the first time.
        let_go(hold_all(&many, &dir, 4));
        until("all is closed", released);
        let before = within_bounds(&mount).open_files;
        let holders = hold_all(&many, &dir, 4);
        let held = within_bounds(&mount);
        assert!(held.opens.passthrough + held.opens.cached >= 20_000, "{held:?}");
        if way == Way::Passthrough && held.passthrough.used {
            assert!(held.opens.passthrough >= 500, "{held:?}");
        }
        // Compressed, files of this size are in packs.
        assert!(way == Way::Cached || held.memories["open large files"].held >= 500, "{held:?}");
        let_go(holders);
        until("all is closed", released);
        assert_eq!(within_bounds(&mount).memories["open large files"].held, 0, "{way:?}");
        until("no descriptor more than before", || within_bounds(&mount).open_files <= before);
        assert!(before < 1_500, "{way:?}: {before} open files");
        mount.umount();
    }
}

#[test]
fn a_thousand_readers_at_once_get_the_right_bytes_and_the_mount_stays_within_its_bounds() {
    needs_mounts!();
    const READERS: usize = 1000;
    let many = Many::new(400, 4);
    for way in Way::ALL {
        let fixture = way.fixture();
        many.publish(&fixture);
        let mount = way.mount(&fixture);
        let dir = site(&mount).join("many");
        let begin = Barrier::new(READERS);
        std::thread::scope(|scope| {
            let reader = |n: usize| {
                let (begin, many, dir) = (&begin, &many, &dir);
                move || {
                    begin.wait();
                    for step in 0..5 {
                        let (name, content) = &many.files[(n * 7 + step * 131) % many.files.len()];
                        assert_eq!(fs::read(dir.join(name)).unwrap(), *content, "{way:?} {name}");
                    }
                }
            };
            for n in 0..READERS {
                std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, reader(n)).unwrap();
            }
        });
        let told = within_bounds(&mount);
        assert!(told.bytes_read > 0, "{told:?}");
        mount.umount();
    }
}

#[test]
fn a_mount_raises_its_limit_of_open_files_and_tells_it() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.min(500), hard).unwrap();
    let mount = Way::Plain.mount(&fixture);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    let told = within_bounds(&mount);
    assert_eq!(told.open_files_most, hard);
    let limits = fs::read_to_string(format!("/proc/{}/limits", told.pid)).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some(hard.to_string().as_str()));
    mount.umount();
}
