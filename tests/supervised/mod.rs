//! A supervised mount of the program, and programs that use it all the time.

#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use envfabric::mount::supervisor::{self, Status};
use envfabric::mount::umount;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::common::*;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_envfabric");

/// A mount with its supervisor, which both go when this does.
pub struct Supervised {
    pub child: Mutex<Child>,
    pub dir: PathBuf,
    store: PathBuf,
    vars: Vec<(OsString, OsString)>,
    log: PathBuf,
}

impl Supervised {
    /// Mounts at `name` beside the store, and waits until it is served.
    pub fn start(fixture: &Fixture, name: &str, flags: &[&str], vars: &[(&str, &str)]) -> Supervised {
        let mount = Supervised::begin(fixture, name, flags, vars);
        until("it is mounted", || mount.try_status().is_some_and(|status| status.worker.is_some()));
        mount
    }

    /// The same without waiting.
    pub fn begin(fixture: &Fixture, name: &str, flags: &[&str], vars: &[(&str, &str)]) -> Supervised {
        Supervised::begin_by(&[], fixture, name, flags, vars)
    }

    /// The same, with the program started by `by`.
    fn begin_by(by: &[OsString], fixture: &Fixture, name: &str, flags: &[&str], vars: &[(&str, &str)]) -> Supervised {
        let at = |name: &str| fixture.dir.path().join(name);
        let (log, dir) = (at(&format!("{name}.log")), at(name));
        let mut all: Vec<(OsString, OsString)> = ["XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"]
            .map(|variable| (variable.into(), at(variable).into_os_string()))
            .into();
        all.extend(vars.iter().map(|(variable, value)| (variable.into(), value.into())));
        let all_of_it: Vec<OsString> = by.iter().cloned().chain([PROGRAM.into()]).collect();
        let child = Command::new(&all_of_it[0])
            .args(&all_of_it[1..])
            .arg("--store")
            .arg(fixture.store.root())
            .args(["mount", "--foreground"])
            .args(flags)
            .arg(&dir)
            .envs(all.clone())
            .env_remove("ENVFABRIC_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Supervised { child: Mutex::new(child), dir, store: fixture.store.root().to_path_buf(), vars: all, log }
    }

    /// The program with these arguments, in the same surroundings.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("--store").arg(&self.store).envs(self.vars.clone()).env_remove("ENVFABRIC_CONFIG");
        command.stdin(Stdio::null());
        command
    }

    pub fn replace(&self, program: &Path, flags: &[&str]) -> Output {
        self.command(program).args(["mount", "--replace"]).args(flags).arg(&self.dir).output().unwrap()
    }

    pub fn try_status(&self) -> Option<Status> {
        supervisor::status(&self.dir).ok().flatten()
    }

    pub fn status(&self) -> Status {
        self.try_status().expect("the supervisor answers")
    }

    /// What was logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Sends `signal` to the worker, and waits for another.
    pub fn kill_worker(&self, signal: Signal) {
        let before = self.status();
        let worker = before.worker.expect("somebody serves");
        kill(Pid::from_raw(worker as i32), signal).unwrap();
        self.until_replaced(worker);
    }

    pub fn until_replaced(&self, worker: u32) {
        until("another worker serves", || self.status().worker.is_some_and(|now| now != worker));
    }

    /// Bytes of memory of process `pid`.
    pub fn resident(&self, pid: u32) -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.lock().unwrap().id() as i32), signal).unwrap();
    }

    /// How the supervisor ends.
    pub fn ends(&self) -> ExitStatus {
        until("the supervisor ends", || self.child.lock().unwrap().try_wait().unwrap().is_some());
        self.child.lock().unwrap().wait().unwrap()
    }

    /// Takes the mount away, which nobody uses, and waits until nothing is left of it.
    pub fn umount(&self) {
        let worker = self.status().worker.unwrap();
        // Other tests start programs, which have everything open for a moment that this one has.
        until("nobody uses it", || umount(&self.dir, false).is_ok());
        assert!(self.ends().success(), "{}", self.log());
        until("the worker is gone", || !Path::new(&format!("/proc/{worker}")).exists());
        assert!(fs::read_dir(&self.dir).unwrap().next().is_none());
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the log of the mount:\n{}", self.log());
        }
        let worker = self.try_status().and_then(|status| status.worker);
        let supervisor = self.try_status().map(|status| status.supervisor);
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
        if let Some(supervisor) = supervisor {
            let _ = kill(Pid::from_raw(supervisor as i32), Signal::SIGKILL);
        }
        if let Some(worker) = worker {
            let _ = kill(Pid::from_raw(worker as i32), Signal::SIGKILL);
        }
        let _ = umount(&self.dir, true);
    }
}

/// What uses a mount: counts what it has done, one for each.
pub struct Progress {
    counts: Vec<AtomicU64>,
    stop: AtomicBool,
    longest: AtomicU64,
    failed: AtomicBool,
}

impl Progress {
    /// Waits until each has done so much more.
    pub fn wait_for_all(&self, more: u64) {
        let now: Vec<u64> = self.counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let grown = |(count, before): (&AtomicU64, &u64)| count.load(Ordering::SeqCst) >= before + more;
            if self.failed.load(Ordering::SeqCst) || self.counts.iter().zip(&now).all(grown) {
                return;
            }
            assert!(Instant::now() < end, "somebody is stuck: {now:?} then {:?}", self.counts);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }
}

/// Stops everybody when one fails.
struct Stops<'a>(&'a Progress);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.failed.store(true, Ordering::SeqCst);
            self.0.stop.store(true, Ordering::SeqCst);
        }
    }
}

/// Files with known content, in an environment that stays and one that changes.
pub struct Load {
    files: BTreeMap<PathBuf, Vec<u8>>,
    names: Vec<OsString>,
}

const ENV: &str = "demo/a/.versions/1/.venv";
const NAMES: usize = 3000;

/// A number that differs from call to call.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

impl Load {
    pub fn publish(fixture: &Fixture) -> Load {
        let mut files = BTreeMap::new();
        let mut staged = Vec::new();
        for n in 0..40u64 {
            // Some that the kernel reads by itself, and some that it cannot.
            let content = noise(if n % 4 == 0 { 400_000 } else { 9_000 }, n + 1);
            staged.push(file(format!("{SITE}/load/{n}.bin"), content.clone()));
            files.insert(PathBuf::from(format!("{SITE}/load/{n}.bin")), content);
        }
        let names: Vec<OsString> = (0..NAMES).map(|n| format!("a-name-among-many-{n:05}.py").into()).collect();
        staged.extend(names.iter().map(|name| file(format!("{SITE}/many/{}", name.to_str().unwrap()), "")));
        // A program large enough to be passed through.
        let shell = fs::read("/bin/bash").unwrap();
        assert!(shell.len() > 200_000);
        staged.push(Staged { path: "bin/shell".into(), kind: StagedKind::Bytes { content: shell, executable: true } });
        fixture.publish("demo/a", vec![fixture.layer("load", staged)]);
        fixture.publish("demo/moving", vec![fixture.layer("moving", vec![file(format!("{SITE}/x.py"), "x")])]);
        Load { files, names }
    }

    /// Uses the mount from many sides while `meanwhile` goes on; how often, and how long the longest use took.
    pub fn run(&self, fixture: &Fixture, mount: &Supervised, meanwhile: impl FnOnce(&Progress)) -> (u64, Duration) {
        type User<'a> = Box<dyn FnMut(u64) + Send + 'a>;
        let venv = mount.dir.join(ENV);
        let mut users: Vec<User<'_>> = Vec::new();
        for n in 0..3 {
            users.push(self.reads(&venv, n));
        }
        users.push(self.holds(&venv));
        users.push(self.lists(&venv));
        users.push(self.looks(&venv));
        users.push(executes(&venv));
        users.push(maps(&venv));
        users.push(changes(fixture, mount));
        let progress = Progress {
            counts: users.iter().map(|_| AtomicU64::new(0)).collect(),
            stop: AtomicBool::new(false),
            longest: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        };
        thread::scope(|scope| {
            let progress = &progress;
            for (n, mut user) in users.into_iter().enumerate() {
                scope.spawn(move || {
                    let _stops = Stops(progress);
                    for turn in 0.. {
                        if !progress.goes_on() {
                            break;
                        }
                        let begun = Instant::now();
                        user(turn);
                        progress.longest.fetch_max(begun.elapsed().as_millis() as u64, Ordering::SeqCst);
                        progress.counts[n].fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let _stops = Stops(progress);
            meanwhile(progress);
            progress.stop.store(true, Ordering::SeqCst);
        });
        let done = progress.counts.iter().map(|count| count.load(Ordering::SeqCst)).sum();
        (done, Duration::from_millis(progress.longest.into_inner()))
    }

    /// Reads files and parts of files, and compares.
    fn reads<'a>(&'a self, venv: &Path, seed: u64) -> Box<dyn FnMut(u64) + Send + 'a> {
        let (venv, mut state) = (venv.to_path_buf(), seed + 77);
        Box::new(move |_| {
            let n = random(&mut state) as usize % self.files.len();
            let (path, content) = self.files.iter().nth(n).unwrap();
            let opened = File::open(venv.join(path)).unwrap();
            forget(&opened);
            let from = random(&mut state) as usize % content.len();
            let mut part = vec![0; 5_000.min(content.len() - from)];
            opened.read_exact_at(&mut part, from as u64).unwrap();
            assert!(part == content[from..from + part.len()], "{path:?} from {from}");
            let mut whole = Vec::new();
            (&opened).read_to_end(&mut whole).unwrap();
            assert!(whole == *content, "{path:?}");
        })
    }

    /// Has files open all the time, now one and now the other anew.
    fn holds<'a>(&'a self, venv: &Path) -> Box<dyn FnMut(u64) + Send + 'a> {
        let open = |venv: &Path, path: &Path| File::open(venv.join(path)).unwrap();
        let mut held: Vec<File> = self.files.keys().map(|path| open(venv, path)).collect();
        let (venv, mut state) = (venv.to_path_buf(), 5);
        Box::new(move |turn| {
            for (n, (path, content)) in self.files.iter().enumerate() {
                if random(&mut state).is_multiple_of(4) {
                    let mut part = vec![0; 3000];
                    let from = random(&mut state) as usize % (content.len() - part.len());
                    forget(&held[n]);
                    held[n].read_exact_at(&mut part, from as u64).unwrap();
                    assert!(part == content[from..from + 3000], "{path:?}");
                }
                if n as u64 == turn % self.files.len() as u64 {
                    held[n] = open(&venv, path);
                }
            }
        })
    }

    /// Lists a long directory, a part at a time, in a stream that lives through many ends of workers.
    fn lists<'a>(&'a self, venv: &Path) -> Box<dyn FnMut(u64) + Send + 'a> {
        let dir = venv.join(SITE).join("many");
        let mut streams: Vec<(fs::ReadDir, Vec<OsString>)> = Vec::new();
        Box::new(move |turn| {
            if streams.len() < 4 {
                streams.push((fs::read_dir(&dir).unwrap(), Vec::new()));
            }
            let n = turn as usize % streams.len();
            let (stream, names) = &mut streams[n];
            names.extend(stream.by_ref().take(200).map(|entry| entry.unwrap().file_name()));
            if names.len() >= NAMES {
                assert!(stream.next().is_none());
                names.sort();
                assert!(*names == self.names, "a listing is whole, and has nothing twice");
                streams.swap_remove(n);
            }
        })
    }

    /// Looks for names that are there and names that are not.
    fn looks<'a>(&'a self, venv: &Path) -> Box<dyn FnMut(u64) + Send + 'a> {
        let venv = venv.to_path_buf();
        let dir = File::open(venv.join(SITE)).unwrap();
        use std::os::unix::fs::MetadataExt;
        let number = dir.metadata().unwrap().ino();
        Box::new(move |turn| {
            for (path, content) in self.files.iter().skip(turn as usize % 30).take(10) {
                assert_eq!(fs::metadata(venv.join(path)).unwrap().len(), content.len() as u64);
            }
            let missing = fs::metadata(venv.join(format!("missing-{turn}"))).unwrap_err();
            assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
            assert!(fs::read_to_string(venv.join("pyvenv.cfg")).unwrap().starts_with("home = "));
            // Who stands in a directory stays in it.
            assert_eq!(fs::metadata(venv.join(SITE)).unwrap().ino(), number);
            assert_eq!(dir.metadata().unwrap().ino(), number);
        })
    }
}

/// Has the kernel ask for the bytes of `file` again.
fn forget(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Starts a program again and again that is running all the time.
fn executes<'a>(venv: &Path) -> Box<dyn FnMut(u64) + Send + 'a> {
    let shell = venv.join("bin/shell");
    let mut runs = Some(Command::new(&shell).args(["-c", "read x"]).stdin(Stdio::piped()).spawn().unwrap());
    Box::new(move |turn| {
        let output = Command::new(&shell).args(["-c", "echo $((40 + 2))"]).output().unwrap();
        assert!(output.status.success() && output.stdout == b"42\n", "{output:?}");
        // Now and then another one is the one that runs.
        if turn % 5 == 4 {
            let next = Command::new(&shell).args(["-c", "read x"]).stdin(Stdio::piped()).spawn().unwrap();
            let mut before = runs.replace(next).unwrap();
            before.stdin.take().unwrap().write_all(b"x\n").unwrap();
            assert!(before.wait().unwrap().success());
        }
    })
}

/// A process that has a file mapped, and looks at all of it.
fn maps<'a>(venv: &Path) -> Box<dyn FnMut(u64) + Send + 'a> {
    const SCRIPT: &str = "
import mmap, os, sys, hashlib
files = [open(path, 'rb') for path in sys.argv[1:]]
sums = [hashlib.sha256(file.read()).digest() for file in files]
maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in files]
for line in sys.stdin:
    for n, (file, mapped) in enumerate(zip(files, maps)):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert hashlib.sha256(mapped).digest() == sums[n]
        with open(sys.argv[1 + n], 'rb') as again, mmap.mmap(again.fileno(), 0, prot=mmap.PROT_READ) as other:
            assert hashlib.sha256(other).digest() == sums[n]
    print('ok', flush=True)
";
    let paths = [0, 1, 4, 5].map(|n| venv.join(format!("{SITE}/load/{n}.bin")));
    let mut child = Command::new("python3")
        .args(["-c", SCRIPT])
        .args(paths)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut asks, mut hears) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut ends = Ends(child);
    Box::new(move |_| {
        asks.write_all(b"go\n").unwrap();
        let mut line = String::new();
        hears.read_line(&mut line).unwrap();
        assert_eq!(line, "ok\n", "{:?}", ends.0.try_wait());
    })
}

/// A child that is waited for.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Publishes versions, and sees them become current.
fn changes<'a>(fixture: &'a Fixture, mount: &Supervised) -> Box<dyn FnMut(u64) + Send + 'a> {
    let env = mount.dir.join("demo/moving");
    let layers = fixture.store.current(&fixture.name("demo/moving")).unwrap().layers;
    Box::new(move |turn| {
        if turn % 10 == 0 {
            fixture.publish("demo/moving", layers.clone());
        }
        let link = fs::read_link(env.join(".venv")).unwrap();
        assert_eq!(fs::read(env.join(&link).join(SITE).join("x.py")).unwrap(), b"x");
        assert!(fs::read_dir(env.join(".versions")).unwrap().all(|entry| entry.is_ok()));
        thread::sleep(Duration::from_millis(5));
    })
}

/// Unmounted lazily when dropped.
pub struct Unmounted(pub PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// All files below `dir`.
pub fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files.extend(walk(&entry.path())),
            false => files.push(entry.path()),
        }
    }
    files
}

/// Stands in for a service manager: starts the program, keeps what it is given to keep, and starts it again with that
/// when it was killed. Writes down what it is told.
pub struct Manager {
    pub mount: Supervised,
    told: PathBuf,
}

const MANAGER: &str = r#"
import array, os, socket, subprocess, sys, threading
told, program = sys.argv[1], sys.argv[2:]
address = told + ".socket"
listens = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listens.bind(address)
kept = {}
def hear():
    while True:
        text, rights, _, _ = listens.recvmsg(65536, socket.CMSG_SPACE(64))
        given = array.array("i")
        for level, kind, data in rights:
            given.frombytes(data)
        if text == b"END":
            return
        fields = dict(line.split("=", 1) for line in text.decode().splitlines())
        if "FDSTORE" in fields:
            kept[fields["FDNAME"]] = given[0]
        if "FDSTOREREMOVE" in fields:
            os.close(kept.pop(fields["FDNAME"]))
        with open(told, "a") as out:
            out.write(text.decode() + "\n")
hears = threading.Thread(target=hear, daemon=True)
hears.start()
def inherit(given):
    high = [os.dup(fd) if fd > 20 else __import__("fcntl").fcntl(fd, 0, 20) for fd in given]
    for place, fd in enumerate(high):
        os.dup2(fd, 3 + place, inheritable=True)
    os.environ["LISTEN_PID"] = str(os.getpid())
while True:
    names, given = list(kept.keys()), list(kept.values())
    os.environ.update(NOTIFY_SOCKET=address, LISTEN_FDS=str(len(given)), LISTEN_FDNAMES=":".join(names))
    pid = os.fork()
    if pid == 0:
        inherit(given)
        os.execv(program[0], program)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"END", address)
        hears.join()
        sys.exit(os.waitstatus_to_exitcode(status))
"#;

impl Manager {
    pub fn start(fixture: &Fixture, name: &str, flags: &[&str]) -> Manager {
        let told = fixture.dir.path().join("told");
        fs::write(&told, "").unwrap();
        let start = ["python3".into(), "-c".into(), MANAGER.into(), told.clone().into_os_string()];
        let mount = Supervised::begin_by(&start, fixture, name, flags, &[]);
        until("it is mounted", || mount.try_status().is_some_and(|status| status.worker.is_some()));
        Manager { mount, told }
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.told).unwrap()
    }
}
