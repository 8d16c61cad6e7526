//! A store on a real network file system: SFTP over TCP, mounted by sshfs.
//!
//! ```text
//! builder  sshfs --\
//!                   TCP -- sftp-server, one for each connection -- a directory
//! node     sshfs --/
//! ```
//!
//! sshfs is the network file system that a test can start without a daemon, a kernel module or a port below 1024, and a
//! strict judge: it numbers files by path, answers a LINK on a taken name with EPERM, and remembers names for 20 s.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wheels::Wheel;
use crate::world::{World, check, clean, python311, text, until};

/// Where Debian's package `openssh-sftp-server` has it.
const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

/// Ends a test that cannot run here, and says why.
macro_rules! needs_sshfs {
    () => {
        if let Some(reason) = no_sshfs_because() {
            println!("skipped: {reason}");
            return;
        }
    };
}

fn no_sshfs_because() -> Option<String> {
    let on_path = |name: &str| {
        std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
    };
    let missing = |name: &str| Some(format!("{name} is missing: run `scripts/install-tools --test`"));
    if !on_path("sshfs") {
        missing("sshfs")
    } else if !Path::new(SFTP_SERVER).is_file() {
        missing(SFTP_SERVER)
    } else if fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_err() {
        Some("/dev/fuse cannot be opened".into())
    } else {
        None
    }
}

/// Serves files to whoever connects, as the NAS does.
struct Server {
    port: u16,
    /// One for each connection that there ever was.
    serving: Arc<Mutex<Vec<Child>>>,
}

impl Server {
    fn start() -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving: Arc<Mutex<Vec<Child>>> = Arc::default();
        let all = serving.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming().map_while(Result::ok) {
                connection.set_nodelay(true).unwrap();
                let (input, output) = (OwnedFd::from(connection.try_clone().unwrap()), OwnedFd::from(connection));
                let server = Command::new(SFTP_SERVER).stdin(input).stdout(output).stderr(Stdio::null()).spawn();
                all.lock().unwrap().push(server.unwrap());
            }
        });
        Server { port, serving }
    }

    fn send(&self, signal: Signal) {
        for server in self.serving.lock().unwrap().iter_mut() {
            // Not where it has ended: the number may be another's.
            if server.try_wait().unwrap().is_none() {
                kill(Pid::from_raw(server.id().try_into().unwrap()), signal).unwrap();
            }
        }
    }

    /// It answers nobody until the guard is dropped.
    fn stopped(&self) -> Stopped<'_> {
        self.send(Signal::SIGSTOP);
        Stopped(self)
    }
}

struct Stopped<'s>(&'s Server);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.send(Signal::SIGCONT);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for server in self.serving.lock().unwrap().iter_mut() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// A mount of a directory of the server.
struct Sshfs {
    process: Child,
    at: PathBuf,
}

impl Sshfs {
    fn mount(server: &Server, dir: &Path, options: &str) -> Sshfs {
        let at = tempfile::Builder::new().prefix("envfabric-sshfs-").tempdir().unwrap().keep();
        let options = format!("directport={},reconnect{options}", server.port);
        let process = Command::new("sshfs")
            .args(["-f", "-o", &options, &format!("127.0.0.1:{}", dir.display())])
            .arg(&at)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let sshfs = Sshfs { process, at };
        until("sshfs mounts", Duration::from_secs(20), || sshfs.is_mounted());
        sshfs
    }

    fn is_mounted(&self) -> bool {
        let at = format!(" {} ", self.at.display());
        fs::read_to_string("/proc/self/mountinfo").unwrap().lines().any(|line| line.contains(&at))
    }
}

impl Drop for Sshfs {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3").args(["-u", "-z"]).arg(&self.at).status();
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Empty, unless it is still mounted: then it stays.
        let _ = fs::remove_dir(&self.at);
    }
}

/// Runs `code`, which must end in time.
fn within(limit: Duration, python: &Path, code: &str) -> std::process::Output {
    let started = Instant::now();
    let mut process = clean(Command::new(python).args(["-c", code]));
    let mut process = process.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while process.try_wait().unwrap().is_none() {
        if started.elapsed() > limit {
            let _ = process.kill();
            panic!("{code}: not within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    process.wait_with_output().unwrap()
}

/// What `doctor` says of `name`.
fn doctor(world: &World, name: &str) -> serde_json::Value {
    let told: serde_json::Value = serde_json::from_slice(&world.output(["doctor", "--json"]).stdout).unwrap();
    let check = told["checks"].as_array().unwrap().iter().find(|check| check["name"] == name);
    check.unwrap_or_else(|| panic!("nothing of {name}: {told}")).clone()
}

#[test]
fn a_store_on_a_network_file_system_serves_two_machines_and_its_server_may_stop_or_go() {
    needs_sshfs!();
    let nas = tempfile::tempdir().unwrap();
    let server = Server::start();
    let (for_builder, for_node) = (Sshfs::mount(&server, nas.path(), ""), Sshfs::mount(&server, nas.path(), ""));
    let builder = World::with_store(for_builder.at.join("store"));
    let made = builder.json(["init"]);
    assert_eq!(made["fabric"]["features"]["incompatible"], serde_json::json!(["zstd-objects"]));
    for (name, state, found) in [
        ("file system", "note", "fuse.sshfs"),
        ("latency", "", "missing name"),
        ("publishing", "ok", "by hard links"),
        ("clock", "ok", "the same time"),
        ("cache", "", "at most"),
    ] {
        let check = doctor(&builder, name);
        assert!(check["state"].as_str().unwrap().starts_with(state), "{check}");
        assert!(check["found"].as_str().unwrap().contains(found), "{check}");
    }
    assert_eq!(fs::read_dir(nas.path().join("store/tmp")).unwrap().count(), 0);
    let python = python311();
    let bulky = Wheel::new("bulky", "1").file("bulky/__init__.py", "").file("bulky/one.bin", vec![1; 3_000_000]);
    let bulky = bulky.file("bulky/two.bin", vec![2; 3_000_000]).write(builder.dir()).display().to_string();
    let create = |six: &str| builder.ok(["create", "net/a", six, "numpy", &bulky, "--python", &python]);
    create("six==1.16.0");

    let node = World::with_store(for_node.at.join("store"));
    let (at, cache) = (node.dir().join("envs"), node.dir().join("cache"));
    let mount = node.mount_with(&at, &["--cache", cache.to_str().unwrap(), "--patience", "3s"]);
    let six = || mount.run("net/a", "import six; print(six.__version__)").trim().to_string();
    let sums = "import six, numpy; print(numpy.arange(10).sum())";
    assert_eq!((mount.run("net/a", sums).trim(), six().as_str()), ("45", "1.16.0"));

    // What one machine publishes the other shows, for all that its client remembers of names.
    let soon = Duration::from_secs(40);
    let becomes = |version: &str| until(&format!("six is {version}"), soon, || six() == version);
    create("six==1.17.0");
    becomes("1.17.0");
    builder.ok(["rollback", "net/a"]);
    becomes("1.16.0");
    builder.ok(["remove", "net/a"]);
    let is_listed = || {
        let mut names = fs::read_dir(&at).unwrap().chain(fs::read_dir(at.join("net")).into_iter().flatten());
        names.any(|entry| entry.unwrap().file_name() == "a")
    };
    until("the name is gone", soon, || !is_listed());
    builder.ok(["rollback", "net/a", "2"]);
    until("the name is back", soon, is_listed);
    becomes("1.17.0");
    let report = builder.json(["fsck"]);
    assert_eq!(report["findings"], serde_json::json!([]), "{report}");

    // A server that hangs keeps nobody from what is here, and from the rest not for ever.
    let pinned = at.join("net/a/.versions/2/.venv/bin/python");
    let limit = Duration::from_secs(30);
    let sum_of = |name: &str| format!("import bulky; print(sum(open(bulky.__path__[0] + '/{name}.bin', 'rb').read()))");
    {
        let _stopped = server.stopped();
        for _ in 0..3 {
            let output = within(limit, &pinned, sums);
            assert_eq!(text(&output.stdout).trim(), "45", "{}", text(&output.stderr));
        }
        let output = within(limit, &pinned, &sum_of("one"));
        assert!(text(&output.stderr).contains("Input/output error"), "{}", text(&output.stderr));
        assert!(node.json(["stats", at.to_str().unwrap()])["cache"]["timeouts"].as_u64().unwrap() > 0);
        let asked = Instant::now();
        assert!(doctor(&node, "store")["found"].as_str().unwrap().contains("has not answered"));
        assert!(asked.elapsed() < limit);
    }
    until("what was not here comes", soon, || text(&within(limit, &pinned, &sum_of("one")).stdout).trim() == "3000000");

    // Nor does one that loses its connections; the next question makes new ones.
    server.send(Signal::SIGKILL);
    assert_eq!(text(&within(limit, &pinned, sums).stdout).trim(), "45");
    until("the rest can be had", soon, || text(&within(limit, &pinned, &sum_of("two")).stdout).trim() == "6000000");
    let told = node.json(["stats", at.to_str().unwrap()])["cache"].clone();
    assert_eq!((&told["corrupt_in_store"], &told["corrupt_in_cache"]), (&0.into(), &0.into()), "{told}");
}

#[test]
fn two_machines_publish_at_once_through_a_network_file_system_and_no_number_is_taken_twice() {
    needs_sshfs!();
    let nas = tempfile::tempdir().unwrap();
    let server = Server::start();
    let mounts = [Sshfs::mount(&server, nas.path(), ""), Sshfs::mount(&server, nas.path(), "")];
    let machines = mounts.each_ref().map(|mount| World::with_store(mount.at.join("store")));
    machines[0].ok(["init"]);
    let python = python311();
    machines[0].ok(["create", "race/a", "six", "--python", &python]);
    machines[1].ok(["create", "race/a", "idna", "--python", &python]);
    for _ in 0..5 {
        let start = |machine: &World, what: &str| {
            let mut command = machine.command(["create", "race/a", what, "--python", &python]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        for process in [start(&machines[0], "six"), start(&machines[1], "idna")] {
            let output = process.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
    }
    let versions = machines[0].json(["versions", "race/a"]);
    let versions: Vec<u64> = versions.as_array().unwrap().iter().map(|v| v["version"].as_u64().unwrap()).collect();
    assert_eq!(versions, (1..=versions.len() as u64).collect::<Vec<_>>(), "every number once, none left out");
    assert!(versions.len() >= 7, "{versions:?}");
    assert_eq!(machines[1].json(["show", "race/a"])["number"].as_u64(), versions.last().copied());
    assert_eq!(fs::read_dir(nas.path().join("store/tmp")).unwrap().count(), 0);
}

#[test]
fn a_file_system_without_hard_links_and_safe_renames_is_refused_and_left_as_it_is() {
    needs_sshfs!();
    let nas = tempfile::tempdir().unwrap();
    let server = Server::start();
    let mount = Sshfs::mount(&server, nas.path(), ",disable_hardlink");
    let world = World::with_store(mount.at.join("store"));
    let stderr = world.fails(1, ["init"]);
    assert!(stderr.contains("neither hard links nor renames that never replace"), "{stderr}");
    assert!(!nas.path().join("store/fabric.json").exists());
    check(Command::new("test").args(["-d"]).arg(nas.path().join("store")));
}
