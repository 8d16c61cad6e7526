//! What the processes of a mount may do: nothing for a caller that the caller may not, and, where an ordinary user serves,
//! nothing that this user may not.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;
mod supervised;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::*;
use envfabric::mount::{Stats, stats};
use envfabric::store::Codec;
use nix::sys::signal::Signal;
use supervised::*;

/// Who serves without privilege.
const USER: &str = "nobody";
const USER_ID: u32 = 65_534;
/// An ordinary user.
const ALICE: u32 = 4_001;

/// A script of user `uid`.
fn asked(uid: u32, script: &str) -> Output {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}")).arg("--clear-groups");
    command.args(["sh", "-c", script]).current_dir("/").output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A store that ordinary users may read, and places beside it that [`USER`] may write to.
fn fixture(codec: Codec) -> Fixture {
    let fixture = Fixture::with(codec);
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for place in ["XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        chown(fixture.place(place), Some(USER_ID), Some(USER_ID)).unwrap();
    }
    fixture
}

/// A line of `/proc/<pid>/status`.
fn status_of(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Has [`USER`] serve files of the store in place, or of a cache.
fn flags(fixture: &Fixture, cached: bool) -> Vec<String> {
    let cache = fixture.dir.path().join("XDG_CACHE_HOME/files");
    let cache = cached.then(|| format!("--cache={}", cache.display()));
    [format!("--user={USER}")].into_iter().chain(cache).collect()
}

/// Whether a mount that root serves has passthrough here.
fn is_passed_to_root() -> bool {
    let fixture = fixture(Codec::Raw);
    let mount = Supervised::start(&fixture, "m", &[], &[]);
    let used = stats_of(&mount).passthrough.used;
    mount.umount();
    used
}

fn stats_of(mount: &Supervised) -> Stats {
    stats(&mount.dir).unwrap()
}

#[test]
fn a_worker_of_an_ordinary_user_has_no_privilege_and_its_files_are_passed_through_all_the_same() {
    needs_mounts!();
    for cached in [false, true] {
        let fixture = fixture(Codec::Raw);
        let flags = flags(&fixture, cached);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        fixture.publish("demo/a", fixture.packages());
        let mount = Supervised::start(&fixture, "m", &flags, &[]);
        let worker = mount.status().worker.unwrap();
        let ids = [USER_ID; 4].map(|id| id.to_string()).join(" ");
        assert_eq!((status_of(worker, "Uid"), status_of(worker, "Gid")), (ids.clone(), ids));
        assert_eq!(status_of(worker, "NoNewPrivs"), "1");
        for set in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status_of(worker, set), "0000000000000000", "{set}");
        }
        assert_eq!(status_of(mount.status().supervisor, "Uid"), "0 0 0 0");
        // Nor may another process of that user take what it has.
        assert!(!asked(USER_ID, &format!("ls /proc/{worker}/fd")).status.success());
        let venv = mount.dir.join("demo/a/.versions/1/.venv");
        let passes = stats_of(&mount).passthrough.used;
        assert_eq!(passes, is_passed_to_root(), "{:?}", stats_of(&mount).passthrough);
        let big = venv.join(SITE).join("alpha/data/big.bin");
        until("it is passed through", || {
            assert!(fs::read(&big).unwrap() == noise(700_000, 100));
            stats_of(&mount).opens.passthrough > 0 || !passes
        });
        assert_eq!(stats_of(&mount).pid, worker);
        // Others are let in as before, and nothing belongs to who serves.
        let read = asked(ALICE, &format!("cat {}/{SITE}/alpha/__init__.py; head -1 {0}/pyvenv.cfg", venv.display()));
        let home = venv.with_file_name(".python/bin");
        assert_eq!(said(&read), format!("name = \"alpha\"\nhome = {}\n", home.display()));
        assert_eq!(fs::metadata(venv.join(SITE)).unwrap().uid(), 0);
        fixture
            .store
            .set_owner("demo", serde_json::from_str(r#"{"uid":4001,"gid":4001,"mode":"0700"}"#).unwrap())
            .unwrap();
        until("it is for its owner alone", || !asked(USER_ID, &format!("cat {}", big.display())).status.success());
        assert!(asked(ALICE, &format!("cat {}", big.display())).status.success());
        mount.umount();
    }
}

#[test]
fn whoever_uses_a_mount_does_not_notice_that_its_worker_without_privilege_is_killed() {
    needs_mounts!();
    let kills = std::env::var("ENVFABRIC_TEST_KILLS").map_or(15, |text| text.parse().unwrap());
    for cached in [false, true] {
        let fixture = fixture(Codec::Raw);
        let load = Load::publish(&fixture);
        let flags = flags(&fixture, cached);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mount = Supervised::start(&fixture, "m", &flags, &[("ENVFABRIC_FAULTS", "delay=6")]);
        // All of it is in the cache, and is passed through from the first.
        for _ in 0..2 {
            let all = walk(&mount.dir.join("demo/a/.versions/1/.venv"));
            // A link to a directory is among them.
            all.iter().for_each(|path| drop(fs::read(path)));
        }
        let before = mount.status();
        let memory = mount.resident(before.supervisor);
        let (done, longest) = load.run(&fixture, &mount, |progress| {
            for turn in 0..kills {
                progress.wait_for_all(2);
                std::thread::sleep(Duration::from_micros(
                    noise(2, turn + 1).iter().map(|byte| u64::from(*byte) * 60).sum(),
                ));
                mount.kill_worker(Signal::SIGKILL);
            }
            progress.wait_for_all(5);
        });
        let after = mount.status();
        let told = stats_of(&mount);
        eprintln!("{kills} kills, {done} operations, longest {longest:?}, {:?}, {after:?}", told.opens);
        assert_eq!((after.deaths, after.hangs, after.poisoned, after.failures), (kills, 0, 0, 0));
        assert!(after.deaths_in_flight > 0, "the kills proved nothing: no request was in flight");
        assert_eq!(after.open_files, before.open_files, "descriptors of the supervisor");
        assert!(mount.resident(after.supervisor) < memory + (4 << 20), "memory of the supervisor");
        assert!(!told.passthrough.used || told.opens.passthrough > 0, "{told:?}");
        mount.umount();
    }
}

/// A mount of a large file by [`USER`], whose cache lies on a file system of its own, on which can be seen whether
/// something holds a file that has no name any more.
struct Held {
    _small: Unmounted,
    at: PathBuf,
    content: Vec<u8>,
    mount: Supervised,
    fixture: Fixture,
}

impl Held {
    const BYTES: usize = 9_000_000;

    /// None where nothing is passed through.
    fn new() -> Option<Held> {
        let fixture = fixture(Codec::Raw);
        let at = fixture.place("small");
        assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&at).status().unwrap().success());
        let small = Unmounted(at.clone());
        chown(&at, Some(USER_ID), Some(USER_ID)).unwrap();
        let content = noise(Held::BYTES, 42);
        let files =
            ["big", "other"].map(|name| file(format!("{SITE}/{name}.so"), [name.as_bytes(), &content].concat()));
        fixture.publish("demo/a", vec![fixture.layer("big", files.into())]);
        let flags = [&format!("--cache={}", at.display()), "--cache-free=0B", &format!("--user={USER}")];
        let mount = Supervised::start(&fixture, "m", &flags, &[]);
        let held = Held { _small: small, at, content, mount, fixture };
        if !stats_of(&held.mount).passthrough.used {
            eprintln!("skipped: no passthrough here");
            return None;
        }
        until("all of it is here", || {
            let before = held.passed();
            for name in ["big", "other"] {
                assert!(fs::read(held.path(name)).unwrap()[name.len()..] == held.content);
            }
            held.passed() >= before + 2
        });
        Some(held)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mount.dir.join("demo/a/.versions/1/.venv").join(SITE).join(format!("{name}.so"))
    }

    fn passed(&self) -> u64 {
        stats_of(&self.mount).opens.passthrough
    }

    fn used(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.at).map(|s| (s.blocks() - s.blocks_free()) * s.fragment_size()).unwrap()
    }

    /// Takes the names of the large files of the cache away.
    fn evict(&self) {
        for entry in walk(&self.at) {
            if entry.metadata().unwrap().len() >= Held::BYTES as u64 {
                fs::remove_file(entry).unwrap();
            }
        }
    }

    fn reads(&self, file: &fs::File, name: &str) {
        let mut part = vec![0; 5_000];
        file.read_exact_at(&mut part, (8_000_000 + name.len()) as u64).unwrap();
        assert!(part == self.content[8_000_000..8_005_000]);
    }
}

#[test]
fn what_a_worker_without_privilege_had_passed_through_is_let_go_of_by_whoever_serves_then() {
    needs_mounts!();
    let Some(held) = Held::new() else { return };
    let mut files: Vec<fs::File> = Vec::new();
    for turn in 0..6 {
        files.extend((0..3).map(|_| fs::File::open(held.path("big")).unwrap()));
        match turn % 3 {
            // With privilege, and without again.
            1 => assert!(
                held.mount
                    .replace(Path::new(PROGRAM), &["--cache", held.at.to_str().unwrap(), "--cache-free=0B"])
                    .status
                    .success()
            ),
            2 => {
                let flags = ["--cache", held.at.to_str().unwrap(), "--cache-free=0B", "--user", USER];
                assert!(held.mount.replace(Path::new(PROGRAM), &flags).status.success());
            }
            _ => held.mount.kill_worker(Signal::SIGKILL),
        }
        files.truncate(files.len() - 2);
        files.iter().for_each(|file| held.reads(file, "big"));
    }
    let full = held.used();
    held.evict();
    held.mount.kill_worker(Signal::SIGKILL);
    assert!(full.saturating_sub(held.used()) < Held::BYTES as u64 * 2, "who has it open keeps it");
    files.iter().for_each(|file| held.reads(file, "big"));
    drop(files);
    until("nobody has it any more", || full.saturating_sub(held.used()) >= Held::BYTES as u64 * 2);
    held.mount.umount();
}

#[test]
fn a_supervisor_that_has_no_time_keeps_nobody_waiting_and_what_is_to_be_let_go_of_is_let_go_of_later() {
    needs_mounts!();
    let Some(held) = Held::new() else { return };
    let first = fs::File::open(held.path("big")).unwrap();
    let full = held.used();
    held.mount.signal(Signal::SIGSTOP);
    let begun = Instant::now();
    // One question waits for a second, the next ones for nothing; what is open is passed through as it was.
    let other = fs::File::open(held.path("other")).unwrap();
    let again = fs::File::open(held.path("big")).unwrap();
    held.reads(&other, "other");
    held.reads(&again, "big");
    drop((first, again));
    for _ in 0..20 {
        held.reads(&fs::File::open(held.path("big")).unwrap(), "big");
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(other);
    held.mount.signal(Signal::SIGCONT);
    let before = held.passed();
    until("files are passed through again", || {
        held.reads(&fs::File::open(held.path("other")).unwrap(), "other");
        held.passed() > before
    });
    held.evict();
    // The worker has them open for itself. The next one knows only what was written down: a number that was given too late
    // and not given back would stay.
    held.mount.kill_worker(Signal::SIGKILL);
    until("nobody has them any more", || full.saturating_sub(held.used()) >= Held::BYTES as u64 * 2);
    held.mount.umount();
    drop(held.fixture);
}

#[test]
fn who_mounts_again_or_replaces_is_told_when_another_user_serves_than_was_asked_for() {
    needs_mounts!();
    let fixture = fixture(Codec::Raw);
    fixture.publish("demo/a", fixture.packages());
    let mount = Supervised::start(&fixture, "m", &[&format!("--user={USER}")], &[]);
    let run = |flags: &[&str]| {
        let output =
            mount.command(Path::new(PROGRAM)).arg("mount").args(flags).arg(&mount.dir).stdin(Stdio::null()).output();
        let output = output.unwrap();
        (output.status.code(), said(&output))
    };
    let already = format!("already mounted at {}\n", mount.dir.display());
    assert_eq!(run(&["--user", USER]), (Some(0), already.clone()));
    let (code, told) = run(&["--replace"]);
    assert!(code == Some(0) && told.contains(&format!("was by user {USER_ID}")), "{told}");
    let (code, told) = run(&["--user", USER]);
    assert!(code == Some(1) && told.contains("is served by user 0") && told.contains("--replace --user"), "{told}");
    assert_eq!(run(&[]), (Some(0), already));
    mount.umount();
}

#[test]
fn only_root_can_let_another_serve_and_only_an_ordinary_user() {
    needs_mounts!();
    let fixture = fixture(Codec::Raw);
    fixture.publish("demo/a", fixture.packages());
    let mount = |user: &str, by: &str| {
        let program = fixture.dir.path().join("program");
        fs::copy(PROGRAM, &program).unwrap();
        let command = format!(
            "{by} {} --store {} mount --user {user} {}",
            program.display(),
            fixture.store.root().display(),
            fixture.dir.path().join("m").display()
        );
        let output = Command::new("sh").args(["-c", &command]).env("HOME", fixture.dir.path()).output().unwrap();
        (output.status.code(), said(&output))
    };
    for (user, says) in [
        ("root", "root is no ordinary user"),
        ("0", "root is no ordinary user"),
        ("nobody-of-that-name", "knows no user"),
    ] {
        let (code, told) = mount(user, "");
        assert!(code == Some(2) && told.contains(says), "{told}");
    }
    let (code, told) = mount(USER, "setpriv --reuid=4001 --regid=4001 --clear-groups");
    assert!(code == Some(2) && told.contains("only root"), "{told}");
}

#[test]
fn pyvenv_cfg_names_the_path_of_readers_that_a_worker_without_privilege_may_not_see() {
    needs_mounts!();
    let fixture = fixture(Codec::Raw);
    fixture.publish("demo/a", fixture.packages());
    let at = |name: &str| fixture.dir.path().join(name).display().to_string();
    fs::create_dir(at("bound")).unwrap();
    // A mount namespace whose /proc hides the processes of others.
    let script = format!(
        "mount -t proc -o hidepid=2 proc /proc && {PROGRAM} --store {} mount --user={USER} {m} \
         && mount --bind {m}/demo {b} && head -qn1 {m}/demo/a/.venv/pyvenv.cfg \
         && unshare -m sh -c 'umount -l {m} && head -qn1 {b}/a/.venv/pyvenv.cfg' \
         && setpriv --reuid={USER_ID} --regid={USER_ID} --clear-groups sh -c '[ ! -e /proc/1 ]' && echo hidden; \
         umount {b}; {PROGRAM} --store {} umount {m}",
        fixture.store.root().display(),
        fixture.store.root().display(),
        m = at("m"),
        b = at("bound"),
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script]).env_remove("ENVFABRIC_CONFIG");
    for variable in ["XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HOME"] {
        command.env(variable, at(variable));
    }
    let output = command.output().unwrap();
    let told = said(&output);
    let homes = [at("m/demo"), at("bound")].map(|dir| format!("home = {dir}/a/.versions/1/.python/bin\n"));
    assert!(told.contains(&format!("{}{}hidden\n", homes[0], homes[1])), "{told}");
}

#[test]
fn whoever_is_let_into_a_mount_cannot_tell_its_supervisor_anything() {
    needs_mounts!();
    let fixture = fixture(Codec::Raw);
    fixture.publish("demo/a", fixture.packages());
    let mount = Supervised::start(&fixture, "m", &[], &[]);
    let before = mount.status();
    let program = fixture.dir.path().join("program");
    fs::copy(PROGRAM, &program).unwrap();
    let shown = mount.dir.display();
    let home = fixture.place("home");
    chown(&home, Some(ALICE), Some(ALICE)).unwrap();
    let envfabric =
        format!("env HOME={} {} --store {}", home.display(), program.display(), fixture.store.root().display());
    for refused in [
        format!("{envfabric} mount --replace {shown}"),
        format!("{envfabric} umount {shown}"),
        format!("umount {shown}"),
    ] {
        let output = asked(ALICE, &refused);
        assert!(!output.status.success(), "{refused}: {}", said(&output));
    }
    // By the socket itself, with a program that would be root's, again and again.
    let dev = fs::metadata(&mount.dir).unwrap().dev();
    let script = format!(
        r#"
import array, socket
answers = 0
for turn in range(50):
    asks = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asks.settimeout(5)
    asks.connect("\0envfabric-mount-{}:{}")
    with open("{}", "rb") as shell:
        rights = array.array("i", [shell.fileno()])
        try:
            asks.sendmsg([b'{{"Replace":{{"args":[],"env":[]}}}}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            answers += len(asks.recv(65536)) > 0
        except (BrokenPipeError, ConnectionResetError):
            pass
print(answers)
"#,
        nix::sys::stat::major(dev),
        nix::sys::stat::minor(dev),
        program.display(),
    );
    let path = fixture.dir.path().join("asks.py");
    fs::write(&path, script).unwrap();
    let output = asked(ALICE, &format!("/usr/bin/python3 {}", path.display()));
    assert_eq!(said(&output), "0\n");
    let after = mount.status();
    assert_eq!((after.worker, after.workers, after.replacements), (before.worker, before.workers, 0));
    let log = mount.log();
    assert_eq!(log.matches("somebody else wants to tell this mount what to do").count(), 1, "{log}");
    // What it may: read, and ask how the mount does.
    let told = asked(ALICE, &format!("getfattr --only-values -n user.envfabric.stats {shown}"));
    assert!(said(&told).contains("\"requests\""), "{}", said(&told));
    mount.umount();
}

#[test]
fn what_a_machine_keeps_of_a_store_is_its_users_alone() {
    needs_mounts!();
    for codec in [Codec::Raw, Codec::Zstd] {
        let fixture = fixture(codec);
        fixture.publish("demo/a", fixture.packages());
        let mount = Supervised::start(&fixture, "m", &[], &[]);
        let venv = mount.dir.join("demo/a/.versions/1/.venv");
        assert!(fs::read(venv.join(SITE).join("alpha/data/big.bin")).unwrap() == noise(700_000, 100));
        mount.umount();
        let kept: Vec<PathBuf> =
            ["XDG_STATE_HOME", "XDG_CACHE_HOME"].iter().flat_map(|dir| walk(&fixture.dir.path().join(dir))).collect();
        let is_open = |path: &&PathBuf| fs::metadata(path).unwrap().mode() & 0o077 != 0;
        // What says nothing about any layer.
        let says_nothing = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with("ledger.sqlite") || name.ends_with("lock") || fs::metadata(path).unwrap().len() == 0
        };
        assert!(kept.iter().any(|path| path.to_string_lossy().contains("index-")), "{kept:?}");
        assert!(codec == Codec::Raw || kept.iter().any(|path| path.to_string_lossy().contains("/packs/")), "{kept:?}");
        let open: Vec<&PathBuf> = kept.iter().filter(is_open).filter(|path| !says_nothing(path)).collect();
        assert!(open.is_empty(), "{open:?}");
    }
}
