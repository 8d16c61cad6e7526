//! A worker as its supervisor sees it: a process, a socket, and what it was last heard to say.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::kept::Kept;
use super::handshake::Stage;
use super::systemd;
use super::wire::{Came, FromWorker, Socket, ToWorker, packets};
use crate::error::{Error, IoContext, Kind, Result};

/// How long a worker may take to open everything: of a slow store, too.
const OPENS: Duration = Duration::from_secs(120);
/// How long it may take for anything that needs no store.
const ANSWERS: Duration = Duration::from_secs(30);
/// How long a killed process is waited for; one that waits for a file system that hangs may stay longer.
const DIES: Duration = Duration::from_secs(5);

/// What is started as a worker.
#[derive(Debug)]
pub struct Program {
    /// The program itself, which may have been replaced on the disk since.
    pub exe: File,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Variables that are settings, instead of those of this process; none: its own.
    pub env: Vec<(OsString, OsString)>,
}

/// True for a variable that says something about a mount.
fn is_setting(name: &OsStr) -> bool {
    name == "HOME" || ["ENVFABRIC_", "XDG_"].iter().any(|start| name.as_bytes().starts_with(start.as_bytes()))
}

impl Program {
    /// This program, with other arguments.
    ///
    /// # Errors
    /// Those of opening it.
    pub fn this(args: Vec<OsString>) -> Result<Program> {
        let exe = File::open("/proc/self/exe").at("opening", "this program")?;
        Ok(Program { exe, args, env: Vec::new() })
    }

    /// The same with the settings that this process was given by variables.
    pub fn with_settings(self) -> Program {
        let own = std::env::vars_os().filter(|(name, _)| is_setting(name));
        // What is there was chosen for it.
        let env = own.filter(|(name, _)| !self.env.iter().any(|(chosen, _)| chosen == name)).collect::<Vec<_>>();
        Program { env: env.into_iter().chain(self.env).collect(), ..self }
    }

    /// The same for another user, whose home is `home`, with the other settings of this process.
    pub fn at_home_in(self, home: &Path) -> Program {
        Program { env: vec![("HOME".into(), home.into())], ..self }.with_settings()
    }
}

/// What a worker says of itself when it is prepared.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) store: String,
    pub(super) store_id: String,
    pub(super) threads: usize,
    pub(super) allow_other: bool,
    pub(super) version: String,
}

/// How a worker is to begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    pub(super) life: u64,
    pub(super) resend: bool,
    pub(super) passthrough: Option<bool>,
    pub(super) rehearse: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    child: Child,
    pub(super) socket: Socket,
    pub(super) life: u64,
    pub(super) since: Instant,
    pub(super) watch: Watch,
    pub(super) prepared: Option<Prepared>,
    stage: Stage,
    /// That of the rehearsal, until its last reply was written.
    ended_stage: Option<Stage>,
    /// Processes killed for want of memory before it was started.
    killed_before: u64,
}

/// What the watchdog knows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watch {
    pub(super) number: u64,
    /// When the ping that is not answered was sent.
    pub(super) asked: Option<Instant>,
    /// When the last one was answered.
    pub(super) heard: Option<Instant>,
}

impl Worker {
    /// Starts `program`, and tells it how to begin.
    pub(super) fn start(program: Arc<Program>, kept: &Kept, mount_point: &Path, start: Start) -> Result<Worker> {
        let shown = "a worker process";
        let (ours, theirs) = Socket::pair().at("making a socket for", shown)?;
        let (stage, played) = packets().map_err(std::io::Error::from).at("making a socket for", shown)?;
        // The file that is open, whatever has its name now.
        let mut command = Command::new(format!("/proc/self/fd/{}", program.exe.as_raw_fd()));
        systemd::VARIABLES.iter().for_each(|name| _ = command.env_remove(name));
        if !program.env.is_empty() {
            // Settings of who asked, and not of who mounted once.
            std::env::vars_os().filter(|(name, _)| is_setting(name)).for_each(|(name, _)| _ = command.env_remove(name));
        }
        let child = command
            .arg0("envfabric")
            .args(&program.args)
            .envs(program.env.iter().map(|(name, value)| (name, value)))
            // So that no descriptor has to survive exec.
            .stdin(Stdio::from(theirs.into_inner()))
            .stdout(Stdio::null())
            // What a terminal sends to its foreground is for the supervisor.
            .process_group(0)
            .current_dir("/")
            .spawn()
            .at("starting", shown)?;
        let worker = Worker {
            child,
            socket: ours,
            life: start.life,
            since: Instant::now(),
            watch: Watch::default(),
            prepared: None,
            stage: Stage::new(stage),
            ended_stage: None,
            killed_before: killed_for_memory(),
        };
        let Start { life, resend, passthrough, rehearse } = start;
        let mount_point = mount_point.to_string_lossy().into_owned();
        let message = ToWorker::Start { life, mount_point, resend, passthrough, rehearse };
        worker.send(&message, &[kept.file().as_fd(), played.as_fd()])?;
        Ok(worker)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn send(&self, message: &ToWorker, with: &[BorrowedFd<'_>]) -> Result<()> {
        self.socket.send(message, with).at("telling", "a worker process")
    }

    /// What the worker says next, within `patience`, as far as `wanted` takes it; others are passed over.
    fn hear<T>(
        &self,
        patience: Duration,
        or: &[BorrowedFd<'_>],
        mut wanted: impl FnMut(FromWorker) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + patience;
        loop {
            match self.socket.wait(end, or).at("hearing from", "a worker process")? {
                Came::Message(FromWorker::Failed(failure), _) => return Err(failure.into_error()),
                // Not now; it is not to wait for an answer that never comes.
                Came::Message(FromWorker::Help { number, .. }, _) => {
                    let _ = self.send(&ToWorker::Helped { number, outcome: Err(libc::EAGAIN) }, &[]);
                }
                Came::Message(message, _) => {
                    if let Some(found) = wanted(message) {
                        return Ok(found);
                    }
                }
                Came::Closed => {
                    return Err(Error::new(Kind::Failed, "a worker process ended before it served")
                        .hint("its last words are in the log"));
                }
                Came::Nothing if Instant::now() < end => {
                    return Err(Error::new(Kind::Interrupted, "interrupted while the mount began"));
                }
                Came::Nothing => {
                    let what = format!("a worker process has not begun to serve for {} s", patience.as_secs());
                    return Err(
                        Error::new(Kind::TimedOut, what).hint("does the store answer? `envfabric doctor` tries it")
                    );
                }
            }
        }
    }

    /// Waits until it has opened everything, or until something comes from `or`.
    pub(super) fn prepared(&mut self, or: &[BorrowedFd<'_>]) -> Result<Prepared> {
        let prepared = self.hear(OPENS, or, |message| match message {
            FromWorker::Prepared { store, store_id, threads, allow_other, version } => {
                Some(Prepared { store, store_id, threads, allow_other, version })
            }
            _ => None,
        })?;
        self.prepared = Some(prepared.clone());
        self.ended_stage = None;
        Ok(prepared)
    }

    /// Its reply to INIT, after which it must answer a question.
    pub(super) fn init(&self, request: &[u8], check: impl FnOnce(&[u8]) -> Result<()>) -> Result<Vec<u8>> {
        let reply = self.stage.init(request, Instant::now() + ANSWERS)?;
        check(&reply)?;
        self.stage.probe(Instant::now() + ANSWERS)?;
        Ok(reply)
    }

    fn threads(&self) -> usize {
        self.prepared.as_ref().map_or(1, |prepared| prepared.threads)
    }

    /// Has it begin anew, in earnest, after a rehearsal.
    pub(super) fn begin(&mut self) -> Result<()> {
        let (stage, played) = packets().map_err(std::io::Error::from).at("making a socket for", "a worker process")?;
        self.stage.end(self.threads());
        self.ended_stage = Some(std::mem::replace(&mut self.stage, Stage::new(stage)));
        self.send(&ToWorker::Begin, &[played.as_fd()])
    }

    /// Has it serve the connection `device`.
    pub(super) fn serve(&mut self, device: &OwnedFd, dev: (u32, u32)) -> Result<()> {
        self.send(&ToWorker::Serve { dev }, &[device.as_fd()])?;
        self.hear(ANSWERS, &[], |message| matches!(message, FromWorker::Serving).then_some(()))?;
        self.stage.wake(self.threads());
        self.since = Instant::now();
        Ok(())
    }

    /// Has it let go of what another worker needs; true when it says so in time.
    pub(super) fn let_go(&self) -> bool {
        let heard = self
            .send(&ToWorker::LetGo, &[])
            .and_then(|()| self.hear(ANSWERS, &[], |message| matches!(message, FromWorker::HasLetGo).then_some(())));
        heard.is_ok()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it; what it was at stays as it is. None when it does not go away yet.
    pub(super) fn kill(&mut self) -> Option<ExitStatus> {
        // That it has ended already is well.
        let _ = self.child.kill();
        let begun = Instant::now();
        while begun.elapsed() < DIES {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// True when the kernel has killed a process for want of memory since this one was started.
    pub(super) fn memory_was_short(&self) -> bool {
        killed_for_memory() > self.killed_before
    }
}

/// How many processes the kernel has killed for want of memory since it began.
fn killed_for_memory() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}

/// Tells the log what the threads of process `pid` are at.
pub(super) fn log_stacks(pid: u32) {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for task in tasks.flatten() {
        let read = |name: &str| {
            let text = fs::read_to_string(task.path().join(name)).unwrap_or_default();
            text.trim().replace('\n', " <- ")
        };
        tracing::error!(
            thread = %task.file_name().to_string_lossy(),
            name = read("comm"),
            waits_in = read("wchan"),
            call = read("syscall"),
            stack = read("stack"),
            "a thread of the worker that does not answer"
        );
    }
}
