//! Mounts served by a process of their own: signals, ordinary users, dead servers.
//!
//! The process is this test program again, told by its environment what to do: [`child`].

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::*;
use envfabric::mount::{Ended, Options, clear_dead_trials, end_trials, find, mount, mounts, trial, umount};
use envfabric::store::{Index, Store};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Serves a mount when told to by the environment; otherwise no test.
#[test]
fn child() {
    let Ok(dir) = std::env::var("TEST_MOUNT") else { return };
    if std::env::var("TEST_TRIAL").is_ok() {
        return child_in_trial();
    }
    let store = Store::open(Path::new(&std::env::var("TEST_STORE").unwrap())).unwrap();
    let index = Index::open(Path::new(&std::env::var("TEST_INDEX").unwrap()), &store).unwrap();
    let signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).unwrap();
    let mounted = match mount(store, Arc::new(index), &Options::at(dir)) {
        Ok(mounted) => mounted,
        Err(error) => {
            println!("\nREFUSED {error:?}");
            std::process::exit(3);
        }
    };
    println!("\nMOUNTED");
    let ended = mounted.wait(signals).unwrap();
    std::process::exit(if ended == Ended::Unmounted { 0 } else { 7 });
}

fn child_in_trial() {
    let store = Store::open(Path::new(&std::env::var("TEST_STORE").unwrap())).unwrap();
    let index = Index::open(Path::new(&std::env::var("TEST_INDEX").unwrap()), &store).unwrap();
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM]).unwrap();
    std::thread::spawn(move || {
        signals.forever().next();
        end_trials();
        std::process::exit(130);
    });
    let draft = store.current(&"demo/a".parse().unwrap()).unwrap();
    let ended = trial(&store, Arc::new(index), &draft, |_| -> envfabric::error::Result<()> {
        println!("\nMOUNTED");
        loop {
            std::thread::sleep(std::time::Duration::from_secs(100));
        }
    });
    panic!("{ended:?}");
}

/// A server in a process of its own; killed, and its mount taken away, at the latest when dropped.
struct Server {
    child: Child,
    dir: std::path::PathBuf,
    /// Kept open: a server that cannot print fails.
    _output: BufReader<std::process::ChildStdout>,
}

impl Server {
    fn start(fixture: &Fixture, dir: &Path, user: Option<u32>) -> (Server, String) {
        Server::start_with(fixture, dir, user, &[])
    }

    fn start_with(fixture: &Fixture, dir: &Path, user: Option<u32>, vars: &[(&str, &Path)]) -> (Server, String) {
        let exe = std::env::current_exe().unwrap();
        let index = dir.with_extension("index");
        fs::create_dir_all(&index).unwrap();
        let mut command = match user {
            None => Command::new(&exe),
            Some(id) => {
                chown(&index, Some(id), Some(id)).unwrap();
                let mut command = Command::new("setpriv");
                command.args([&format!("--reuid={id}"), &format!("--regid={id}"), "--clear-groups", "--"]).arg(&exe);
                command
            }
        };
        command.args(["--exact", "child", "--nocapture"]);
        command.env("TEST_MOUNT", dir).env("TEST_STORE", fixture.store.root()).env("TEST_INDEX", &index);
        command.envs(vars.iter().copied());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let said = |line: &String| line.starts_with("MOUNTED") || line.starts_with("REFUSED");
        let said = output.by_ref().lines().map_while(Result::ok).find(said).unwrap_or_default();
        (Server { child, dir: dir.to_path_buf(), _output: output }, said)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn ends_with(&mut self) -> Option<i32> {
        until("the server ends", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = nix::mount::umount2(&self.dir, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Unmounted lazily when dropped.
struct Unmounted(std::path::PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn is_mounted(dir: &Path) -> bool {
    mounts().unwrap().iter().any(|info| info.mount_point == dir)
}

#[test]
fn a_signal_unmounts() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let dir = fixture.dir.path().join("m");
        let (mut server, said) = Server::start(&fixture, &dir, None);
        assert_eq!(said, "MOUNTED");
        assert!(dir.join("demo/a/.venv/bin/activate").exists());
        server.signal(signal);
        assert_eq!(server.ends_with(), Some(0));
        assert!(!is_mounted(&dir));
    }
}

#[test]
fn a_busy_mount_is_served_until_its_last_user_is_gone_or_a_second_signal_comes() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let dir = fixture.dir.path().join("m");
    let site = dir.join("demo/a/.venv/lib/python3.11/site-packages");

    let (mut server, _) = Server::start(&fixture, &dir, None);
    let inside = fs::File::open(&site).unwrap();
    server.signal(Signal::SIGTERM);
    until("the name is taken away", || !is_mounted(&dir));
    // Things not seen before are still served to who stands inside.
    let below = format!("/proc/self/fd/{}/gamma/data/small.bin", std::os::fd::AsRawFd::as_raw_fd(&inside));
    assert_eq!(fs::read(below).unwrap(), noise(5_000, 301));
    assert!(server.child.try_wait().unwrap().is_none());
    drop(inside);
    assert_eq!(server.ends_with(), Some(0));

    let (mut server, _) = Server::start(&fixture, &dir, None);
    let inside = fs::File::open(&site).unwrap();
    server.signal(Signal::SIGTERM);
    until("the name is taken away", || !is_mounted(&dir));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ends_with(), Some(7));
    drop(inside);
}

#[test]
fn umount_from_outside_ends_the_server() {
    needs_mounts!();
    let fixture = Fixture::new();
    let dir = fixture.dir.path().join("m");
    let (mut server, _) = Server::start(&fixture, &dir, None);
    umount(&dir, false).unwrap();
    assert_eq!(server.ends_with(), Some(0));
}

#[test]
fn a_stale_mount_is_told_and_umount_clears_it() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", vec![]);
    let dir = fixture.dir.path().join("m");
    let (mut server, _) = Server::start(&fixture, &dir, None);
    server.signal(Signal::SIGKILL);
    server.ends_with();
    assert_eq!(fs::metadata(&dir).unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
    std::os::unix::fs::symlink("m", fixture.dir.path().join("link")).unwrap();
    for path in [dir.clone(), fixture.dir.path().join("./link"), fixture.dir.path().join("m/")] {
        assert_eq!(find(&path).unwrap().map(|mount| mount.store).as_deref(), Some(fixture.store.root()));
    }
    let options = Options::at(&dir);
    let error = mount(fixture.store.clone(), fixture.index.clone(), &options).map(drop).unwrap_err();
    let text = format!("{error:?}");
    assert!(text.contains("stale") && text.contains("envfabric umount"), "{text}");
    umount(&dir, false).unwrap();
    mount(fixture.store.clone(), fixture.index.clone(), &options).unwrap().unmount().unwrap();
}

#[test]
fn large_files_of_a_local_store_do_not_pass_through_the_server() {
    needs_mounts!();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    let kernel = (numbers.next().unwrap(), numbers.next().unwrap());
    let fixture = Fixture::new();
    let stat = Command::new("stat").args(["-f", "-c", "%T"]).arg(fixture.dir.path()).output().unwrap();
    let kind = String::from_utf8_lossy(&stat.stdout).trim().to_string();
    if kernel < (6, 9) || !["ext2/ext3", "xfs", "btrfs", "tmpfs"].contains(&kind.as_str()) {
        eprintln!("skipped: no passthrough with Linux {release} or a store on {kind}");
        return;
    }
    let content = noise(9_000_001, 42);
    let layer = fixture.layer("big", vec![file(format!("{SITE}/big.so"), content.clone())]);
    fixture.publish("demo/a", vec![layer]);
    let dir = fixture.dir.path().join("m");
    let (server, _) = Server::start(&fixture, &dir, None);
    let path = dir.join("demo/a/.venv/lib/python3.11/site-packages/big.so");
    let read_by_server = || -> u64 {
        let io = fs::read_to_string(format!("/proc/{}/io", server.child.id())).unwrap();
        io.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    };
    let before = read_by_server();
    assert!(fs::read(&path).unwrap() == content);
    assert!(read_by_server() - before < 1_000_000);
}

#[test]
fn an_ordinary_user_mounts_through_fusermount3() {
    needs_mounts!();
    const USER: u32 = 65534;
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    // The user must get through to the store, to this program and to a directory of its own.
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let exe = std::env::current_exe().unwrap();
    let mut may = Command::new("setpriv");
    may.args(["--reuid=65534", "--regid=65534", "--clear-groups", "test", "-x"]).arg(&exe);
    let may = may.status();
    if !Path::new("/usr/bin/fusermount3").exists() || !may.is_ok_and(|status| status.success()) {
        eprintln!("skipped: needs fusermount3, setpriv, and a target directory that others may read");
        return;
    }
    // Where no udev has opened the device to everybody, a copy of it is laid over it meanwhile.
    let _open = (fs::metadata("/dev/fuse").unwrap().mode() & 0o006 != 0o006).then(|| {
        let copy = fixture.dir.path().join("fuse-device");
        let made = Command::new("mknod").arg("-m666").arg(&copy).args(["c", "10", "229"]).status();
        let laid = Command::new("mount").arg("--bind").arg(&copy).arg("/dev/fuse").status();
        assert!(made.unwrap().success() && laid.unwrap().success());
        Unmounted("/dev/fuse".into())
    });
    let dir = fixture.place("with, comma and space");
    chown(&dir, Some(USER), Some(USER)).unwrap();
    let (mut server, said) = Server::start(&fixture, &dir, Some(USER));
    assert_eq!(said, "MOUNTED");
    let info = mounts().unwrap().into_iter().find(|info| info.mount_point == dir).unwrap();
    assert_eq!(info.store, fixture.store.root());
    let as_user = |script: &str| {
        let args = ["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script];
        let output = Command::new("setpriv").args(args).current_dir("/").output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let said = as_user(&format!("'{}/demo/a/.venv/bin/python' 1", dir.display()));
    assert_eq!(said, "fake python 1\n");
    let said = as_user(&format!("stat -c %u:%g '{}/demo/a/.venv/bin/alpha'", dir.display()));
    assert_eq!(said, format!("{USER}:{USER}\n"));
    assert!(fs::metadata(dir.join("demo")).is_err(), "others, root too, are not let in");
    // But root is told how it does, and stays root.
    let told = envfabric::mount::stats(&dir).unwrap();
    assert!(told.requests["LOOKUP"] > 0 && !told.passthrough.used);
    assert!(told.passthrough.why_not.unwrap().contains("root"));
    assert!(nix::unistd::getresuid().unwrap().effective.is_root());

    let error = as_user(&format!("cat '{}/demo/a/.venv/pyvenv.cfg' | head -1", dir.display()));
    assert_eq!(error, format!("home = {}/demo/a/.versions/1/.python/bin\n", dir.display()));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ends_with(), Some(0));
    assert!(!is_mounted(&dir));

    // A directory that is not the user's is refused in fusermount3's own words.
    let foreign = fixture.place("foreign");
    assert_eq!(fs::metadata(&foreign).unwrap().uid(), 0);
    let (mut server, said) = Server::start(&fixture, &foreign, Some(USER));
    assert!(said.starts_with("REFUSED"), "{said}");
    assert_eq!(server.ends_with(), Some(3));
}

#[test]
fn a_trial_that_is_killed_is_cleared_by_the_next_and_a_signal_ends_one_at_once() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let temporary = fixture.place(&format!("tmp {signal}"));
        let vars: [(&str, &Path); 2] = [("TEST_TRIAL", Path::new("1")), ("TMPDIR", &temporary)];
        let (mut server, said) = Server::start_with(&fixture, &fixture.dir.path().join("m"), None, &vars);
        assert_eq!(said, "MOUNTED");
        let dir = fs::read_dir(&temporary).unwrap().next().unwrap().unwrap().path();
        let _at_last = Unmounted(dir.clone());
        let listed =
            || fs::read_to_string("/proc/self/mountinfo").unwrap().contains(dir.file_name().unwrap().to_str().unwrap());
        assert!(listed() && !is_mounted(&dir), "it is there, but not as a mount to use");
        clear_dead_trials();
        assert!(dir.join("demo/a/.versions/1/.venv/bin/alpha").exists(), "who lives is left alone");
        server.signal(signal);
        server.ends_with();
        if signal == Signal::SIGKILL {
            assert!(listed());
            clear_dead_trials();
        }
        assert!(!listed());
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    }
}

#[test]
fn a_store_that_is_away_for_a_while_takes_no_name_with_it() {
    needs_mounts!();
    let fixture = Fixture::new();
    for name in ["demo/a", "demo/b", "other/c"] {
        fixture.publish(name, fixture.packages());
    }
    let options = Options::at(fixture.dir.path().join("m"));
    let mounted = mount(fixture.store.clone(), fixture.index.clone(), &options).unwrap();
    let root = mounted.mount_point();
    let names = |path: &str| -> Vec<String> {
        let entries = fs::read_dir(root.join(path)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let seen = || {
        let link = fs::read_link(root.join("demo/a/.venv")).unwrap();
        let mtimes = ["", "demo", "demo/a", "demo/a/.versions"]
            .map(|dir| fs::metadata(root.join(dir)).unwrap().modified().unwrap());
        ([names(""), names("demo"), names("other"), names("demo/a"), names("demo/a/.versions")], link, mtimes)
    };
    let before = seen();
    assert_eq!(before.0[..3], [vec!["demo", "other"], vec!["a", "b"], vec!["c"]]);
    let pinned = root.join("demo/a/.versions/1/.venv/lib/python3.11/site-packages");
    assert_eq!(fs::read(pinned.join("beta/data/small.bin")).unwrap(), noise(5_000, 201));
    assert!(pinned.join("gamma/alias").is_symlink());
    // Somebody works inside, and something is mounted below a name.
    let bound = Unmounted(fixture.place("bound"));
    let made = Command::new("mount").arg("--bind").arg(root.join("demo/a")).arg(&bound.0).status();
    assert!(made.unwrap().success());
    let inside = fs::File::open(&pinned).unwrap();
    let store = fixture.store.root();
    // The store itself, as when a NAS is unmounted; and what cannot be read where its names are.
    for (gone, file) in [(store.to_path_buf(), false), (store.join("envs"), true)] {
        let away = gone.with_extension("away");
        fs::rename(&gone, &away).unwrap();
        if file {
            fs::write(&gone, "").unwrap();
        }
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_secs(2) {
            assert_eq!(seen(), before);
            assert_eq!(fs::read(pinned.join("beta/data/small.bin")).unwrap(), noise(5_000, 201));
            assert!(pinned.join("gamma/alias").is_symlink());
            assert!(bound.0.join(".venv/bin/alpha").exists());
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let again = fs::metadata(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&inside))).unwrap();
        assert_eq!(again.ino(), fs::metadata(&pinned).unwrap().ino());
        if file {
            fs::remove_file(&gone).unwrap();
        }
        fs::rename(&away, &gone).unwrap();
    }
    assert_eq!(seen(), before);
    fixture.publish("demo/new", vec![]);
    until("a new name is listed", || names("demo") == ["a", "b", "new"]);
    fixture.publish("demo/a", vec![]);
    until("a new version is current", || {
        fs::read_link(root.join("demo/a/.venv")).unwrap() == Path::new(".versions/2/.venv")
    });
}
