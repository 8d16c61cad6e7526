//! Asking the supervisor of a mount: how it does, and for another worker.
//!
//! It listens on a socket whose name has the mount's device number, so whoever sees the mount finds it, and nothing is
//! left behind in a file system. It answers root and the user that it runs as, and nobody else.
//!
//! The kernel gives the number of a mount that is gone to the next one, maybe before the supervisor of the first has
//! noticed. So who supervises asks for the name until it is free, and who has the name of a mount that is gone answers
//! nobody. (The kernel ends a connection before it gives its number away.)

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, socket,
};
use serde::{Deserialize, Serialize};

use super::process::Program;
use super::wire::{Came, Failure, Socket};
use super::{Number, Supervisor};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount::table::{self, MountInfo};

/// How long who has connected may take to say what it wants.
const SPEAKS: Duration = Duration::from_secs(1);
/// How long a mount waits, before it is ready, for the name under which it is asked.
const NAMED: Duration = Duration::from_secs(2);
/// How often it asks for the name until then, and afterwards.
const ASKS_FOR_NAME: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(250)];
/// How long a supervisor may take to answer that starts no worker.
const ANSWERS: Duration = Duration::from_secs(5);
/// How long it may take to start one, three times what a worker may take.
const REPLACES: Duration = Duration::from_secs(400);

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Question {
    Status,
    /// Serve with this program, which comes along, and these arguments and variables.
    Replace {
        args: Vec<OsString>,
        env: Vec<(OsString, OsString)>,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Status(Status),
    Replaced(Status),
    Failed(Failure),
}

/// How a supervised mount does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The supervisor.
    pub supervisor: u32,
    /// The worker that serves; none while another is being started.
    pub worker: Option<u32>,
    /// Version of the program that the worker runs.
    pub worker_version: Option<String>,
    /// Workers that were started.
    pub workers: u64,
    /// Workers that ended while they served.
    pub deaths: u64,
    /// Those of them that were stuck.
    pub hangs: u64,
    /// Planned replacements.
    pub replacements: u64,
    /// Requests that workers were at when they ended.
    pub in_flight: u64,
    /// Ends of workers that were at some request.
    pub deaths_in_flight: u64,
    /// Requests that were answered with an error because they had ended several workers.
    pub poisoned: u64,
    /// How the last worker ended.
    pub last_death: Option<String>,
    /// Failures in a row; after the limit the mount is given up.
    pub failures: u32,
    /// Whether requests of a worker that has ended are sent to the next; else they fail.
    pub resend: bool,
    /// Descriptors that the supervisor has open.
    pub open_files: u64,
}

fn address(dev: (u32, u32)) -> nix::Result<UnixAddr> {
    UnixAddr::new_abstract(format!("envfabric-mount-{}:{}", dev.0, dev.1).as_bytes())
}

fn new_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
}

/// Where questions come in.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    /// That somebody was refused was told; whoever may be refused as often as he likes must not fill the log.
    told: Cell<bool>,
}

impl Listener {
    pub(super) fn bind(dev: (u32, u32)) -> io::Result<Listener> {
        let socket = new_socket()?;
        bind(socket.as_raw_fd(), &address(dev)?)?;
        listen(&socket, Backlog::new(8)?)?;
        Ok(Listener { socket, told: Cell::new(false) })
    }

    /// A question, of somebody who may ask, with where the answer goes; waits for it only as long as it takes to write
    /// one.
    fn take(&self) -> io::Result<Option<(Question, Vec<OwnedFd>, Socket)>> {
        let asks = crate::sys::own(accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?)?;
        let user = getsockopt(&asks, PeerCredentials)?.uid();
        if user != 0 && user != nix::unistd::geteuid().as_raw() {
            if !self.told.replace(true) {
                tracing::warn!(user, "somebody else wants to tell this mount what to do; more of that is not told");
            }
            return Ok(None);
        }
        let asks = Socket::new(asks);
        match asks.wait(Instant::now() + SPEAKS, &[])? {
            Came::Message(question, with) => Ok(Some((question, with, asks))),
            Came::Closed | Came::Nothing => Ok(None),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The name under which a mount is asked, as soon as it is free.
#[derive(Debug)]
pub(super) struct Name {
    pub(super) listener: Option<Listener>,
    since: Instant,
    told: bool,
}

impl Name {
    pub(super) fn new() -> Name {
        Name { listener: None, since: Instant::now(), told: false }
    }

    /// Takes the name of the mount `dev`, if it has not got it; true when it has, or when that takes too long.
    pub(super) fn take(&mut self, dev: (u32, u32)) -> bool {
        if self.listener.is_some() {
            return true;
        }
        let error = match Listener::bind(dev) {
            Ok(listener) => {
                if self.told {
                    tracing::info!("the mount can be asked now");
                }
                self.listener = Some(listener);
                return true;
            }
            Err(error) => error,
        };
        let late = self.since.elapsed() >= NAMED;
        if late && !self.told {
            let name = format!("@envfabric-mount-{}:{}", dev.0, dev.1);
            match error.kind() {
                io::ErrorKind::AddrInUse => tracing::warn!(
                    name,
                    "another process has the socket under which this mount is told what to do; it is asked for again \
                     until it is free"
                ),
                _ => tracing::warn!(name, %error, "nobody can ask this mount for another worker yet"),
            }
            self.told = true;
        }
        late
    }

    /// When to try to take it, if it has not got it.
    pub(super) fn next(&self) -> Option<Instant> {
        let pause = ASKS_FOR_NAME[usize::from(self.told)];
        self.listener.is_none().then(|| Instant::now() + pause)
    }
}

impl Supervisor {
    /// Answers who asks, if somebody does.
    pub(super) fn answer(&mut self) {
        let Some(listener) = self.mounted.as_ref().and_then(|mounted| mounted.name.listener.as_ref()) else { return };
        let readable = super::wire::wait_for(&[listener.as_fd()], Some(Instant::now()));
        if !readable.is_ok_and(|readable| readable.contains(&true)) {
            return;
        }
        // Whoever asks then may mean the next mount, which has the number.
        if self.is_unmounted() {
            return;
        }
        let (question, mut with, asks) = match listener.take() {
            Ok(Some(taken)) => taken,
            Ok(None) => return,
            Err(error) => return tracing::warn!(%error, "a question cannot be understood"),
        };
        let answer = match question {
            Question::Status => Answer::Status(self.status()),
            Question::Replace { args, env } => match with.pop() {
                Some(exe) => match self.replace(Program { exe: File::from(exe), args, env }) {
                    Ok(()) => Answer::Replaced(self.status()),
                    Err(error) => Answer::Failed(Failure::from(&error)),
                },
                None => Answer::Failed(Failure::from(&Error::new(Kind::Usage, "no program came with the question"))),
            },
        };
        // Who asked may be gone.
        let _ = asks.send(&answer, &[]);
    }

    fn status(&self) -> Status {
        let number = |number| self.kept.get(number);
        Status {
            supervisor: std::process::id(),
            worker: self.worker.as_ref().map(|worker| worker.pid()),
            worker_version: self.worker.as_ref().and_then(|w| w.prepared.as_ref()).map(|p| p.version.clone()),
            workers: number(Number::Lives),
            deaths: number(Number::Deaths),
            hangs: number(Number::Hangs),
            replacements: number(Number::Replacements),
            in_flight: number(Number::InFlight),
            deaths_in_flight: number(Number::DeathsInFlight),
            poisoned: number(Number::Poisoned),
            last_death: self.last_death.as_ref().map(|(_, words)| words.clone()),
            failures: self.policy.failures(),
            resend: self.mounted.as_ref().is_some_and(|mounted| mounted.resend),
            open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as u64),
        }
    }
}

/// How the supervised mount at `dir` does; none when nobody supervises what is mounted there, or not for this user.
///
/// # Errors
/// [`Kind::TimedOut`] when its supervisor does not answer.
pub fn status(dir: &Path) -> Result<Option<Status>> {
    let Some(mount) = table::find(dir)? else { return Ok(None) };
    let Some(asked) = asked(&mount).at("asking the supervisor of", dir)? else { return Ok(None) };
    match ask(&asked, dir, &Question::Status, &[], ANSWERS)? {
        Answer::Status(status) => Ok(Some(status)),
        Answer::Replaced(_) | Answer::Failed(_) => Ok(None),
    }
}

/// Has the mount at `dir` served by `program`.
///
/// # Errors
/// [`Kind::NotFound`] when nothing is mounted there; what kept the new worker from serving: then the old one goes on.
pub fn replace(dir: &Path, program: Program) -> Result<Status> {
    let shown = dir.display();
    let Some(mount) = table::find(dir)? else {
        return Err(Error::new(Kind::NotFound, format!("no mount of envfabric is at {shown}"))
            .hint(format!("mount it: envfabric mount {shown}")));
    };
    let Some(asked) = asked(&mount).at("asking the supervisor of", dir)? else {
        let error = Error::new(Kind::Failed, format!("the mount at {shown} has no supervisor that could be asked"));
        let told = crate::mount::stats(dir).ok().and_then(|stats| stats.supervised);
        return Err(match told.is_some_and(|by| by.supervisor == 0) {
            true => error.hint(format!("it is gone: envfabric umount {shown}; envfabric mount {shown}")),
            false => error.hint(
                "ask as the user who mounted it or as root, on the machine and in the network namespace of the mount",
            ),
        });
    };
    let question = Question::Replace { args: program.args, env: program.env };
    match ask(&asked, dir, &question, &[program.exe.as_fd()], REPLACES)? {
        Answer::Replaced(status) => Ok(status),
        Answer::Failed(failure) => {
            let error = failure.into_error().context(format!("the mount at {shown} is served as before"));
            Err(match error.hint_text() {
                Some(_) => error,
                None => error.hint("what is in the way must go first; then try again"),
            })
        }
        Answer::Status(_) => Err(Error::new(Kind::Failed, "the supervisor answers something else")),
    }
}

/// A connection to the supervisor of `mount`, if it is whose it should be.
fn asked(mount: &MountInfo) -> io::Result<Option<Socket>> {
    let socket = new_socket()?;
    match connect(socket.as_raw_fd(), &address(mount.dev)?) {
        Ok(()) => {}
        Err(nix::Error::ECONNREFUSED | nix::Error::ENOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    // Anybody may take a name that is free.
    let user = getsockopt(&socket, PeerCredentials)?.uid();
    let own = user == nix::unistd::geteuid().as_raw();
    let owners = user == 0 || mount.owner.is_some_and(|(owner, _)| owner == user);
    Ok((own || owners).then(|| Socket::new(socket)))
}

fn ask(asked: &Socket, dir: &Path, question: &Question, with: &[BorrowedFd<'_>], patience: Duration) -> Result<Answer> {
    let deaf = || {
        Error::new(Kind::Failed, format!("the supervisor of {} does not listen", dir.display()))
            .hint("it listens to root and to the user who mounted")
    };
    match asked.send(question, with) {
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            return Err(deaf());
        }
        sent => sent.at("asking the supervisor of", dir)?,
    }
    match asked.wait(Instant::now() + patience, &[]).at("hearing from the supervisor of", dir)? {
        Came::Message(answer, _) => Ok(answer),
        Came::Closed => Err(deaf()),
        Came::Nothing => {
            let what = format!("the supervisor of {} has not answered for {} s", dir.display(), patience.as_secs());
            Err(Error::new(Kind::TimedOut, what).hint("its process may be stopped"))
        }
    }
}
