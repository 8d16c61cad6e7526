//! Starts the simulated NAS (`tests/nas/`), gives it commands, and takes it away again.
//!
//! ```ignore
//! let nas = Nas::start(backing.path(), &Options::default());
//! nas.command("fail ESTALE catalog 1 on READ");
//! std::fs::read(nas.mount().join("..."));
//! assert_eq!(nas.calls("READ"), 2);
//! ```

#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// How the NAS behaves from the start; as on the command line of `simulated-nas`.
#[derive(Debug, Clone)]
pub struct Options {
    pub latency: String,
    pub bandwidth: String,
    /// How long the kernel may remember names, attributes and misses.
    pub attr_ttl: String,
    /// How many inodes it keeps open.
    pub descriptors: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options { latency: "0ms".into(), bandwidth: "unlimited".into(), attr_ttl: "3s".into(), descriptors: None }
    }
}

/// A running NAS. Dropped, it is killed and its mount taken away, hung or not.
#[derive(Debug)]
pub struct Nas {
    child: Child,
    mount: PathBuf,
    socket: PathBuf,
    control: Mutex<BufReader<UnixStream>>,
    dir: TempDir,
}

/// How long something may take that should take no time, before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there can be no simulated NAS here.
pub fn no_nas_because() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("the simulated NAS needs root".into());
    }
    (!Path::new("/dev/fuse").exists()).then(|| "there is no /dev/fuse".into())
}

/// The program, beside the tests. A whole `cargo test` builds it; `cargo test --test NAME` does not, so this does.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().and_then(Path::parent).unwrap();
        let program = profile.join("examples/simulated-nas");
        if !is_current(&program) {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--locked", "--quiet", "--example", "simulated-nas", "--target-dir"]);
            build.arg(profile.parent().unwrap()).current_dir(env!("CARGO_MANIFEST_DIR"));
            build.args(profile.ends_with("release").then_some("--release"));
            assert!(build.status().unwrap().success(), "{build:?} failed");
        }
        program
    })
}

/// False when there is no such program, or its source was changed since it was built.
fn is_current(program: &Path) -> bool {
    let sources = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nas")).into_iter().flatten();
    let changed = sources.filter_map(|source| source.ok()?.metadata().ok()?.modified().ok()).max();
    program.metadata().and_then(|meta| meta.modified()).is_ok_and(|built| Some(built) >= changed)
}

impl Nas {
    /// Shows `backing` at a mount point of its own. Returns when it answers.
    pub fn start(backing: &Path, options: &Options) -> Nas {
        let dir = tempfile::tempdir().unwrap();
        // As the kernel lists it.
        let mount = dir.path().canonicalize().unwrap().join("mount");
        let socket = dir.path().join("control");
        std::fs::create_dir(&mount).unwrap();
        let mut child = Command::new(program())
            .args([backing, &mount])
            .args(["--latency", &options.latency, "--bandwidth", &options.bandwidth, "--attr-ttl", &options.attr_ttl])
            .args(options.descriptors.map(|most| format!("--descriptors={most}")))
            .arg("--control")
            .arg(&socket)
            // So that it does not outlive a test program that was killed.
            .arg("--until-eof")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        if said.trim() != "ready" {
            let _ = child.kill();
            panic!("simulated-nas did not start: {:?}", child.wait());
        }
        let control = UnixStream::connect(&socket).unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        Nas { child, mount, socket, control: Mutex::new(BufReader::new(control)), dir }
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// Where it takes commands from others than [`Nas::command`].
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Gives a command (see `tests/nas/control.rs`), which has to succeed; what it set holds when this returns.
    pub fn command(&self, command: &str) -> Value {
        self.try_command(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Gives a command; an error is what the NAS says is wrong with it.
    pub fn try_command(&self, command: &str) -> Result<Value, String> {
        let mut control = self.control.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        control.get_mut().write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        control.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        match answer.get("error") {
            Some(error) => Err(error.as_str().unwrap().into()),
            None => Ok(answer),
        }
    }

    pub fn stats(&self) -> Value {
        self.command("stats")
    }

    /// A number of `stats`: `total`, `bytes_read`, `in_flight`, `hung`, ...
    pub fn stat(&self, name: &str) -> u64 {
        self.stats()[name].as_u64().unwrap()
    }

    /// Calls of one kind since `reset`: `LOOKUP`, `READ`, ...
    pub fn calls(&self, kind: &str) -> u64 {
        self.stats()["calls"][kind].as_u64().unwrap()
    }

    /// Returns as soon as `stats` are as wanted; panics if they do not become so.
    pub fn wait_until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let stats = self.stats();
            if wanted(&stats) {
                return stats;
            }
            assert!(begun.elapsed() < PATIENCE, "not so after {PATIENCE:?}: {what}: {stats}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns as soon as at least `calls` hang.
    pub fn wait_until_hung(&self, calls: u64) {
        self.wait_until(&format!("{calls} hung"), |stats| stats["hung"].as_u64().unwrap() >= calls);
    }

    /// Sends a signal; [`Nas::wait`] waits for what comes of it.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Closes its standard input, which ends it.
    pub fn close_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "simulated-nas does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the kernel lists the mount.
    pub fn is_mounted(&self) -> bool {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().any(|line| line.split(' ').nth(4) == self.mount.to_str())
    }

    /// Takes the mount away, although it is in use.
    pub fn umount_lazily(&self) {
        umount2(&self.mount, MntFlags::MNT_DETACH).unwrap();
    }
}

impl Drop for Nas {
    fn drop(&mut self) {
        // First the process: with it ends all waiting, also that of unmounting.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = umount2(&self.mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if self.mount.to_str().is_some_and(|mount| table.contains(mount)) {
            // Rather leave a directory than delete through a mount.
            self.dir.disable_cleanup(true);
        }
    }
}
