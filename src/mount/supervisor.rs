//! The supervisor: a small process that owns a mount, so that the process that serves it may end at any time.
//!
//! ```text
//!                    supervisor                                   worker
//!  kernel  <-----  /dev/fuse, the mount                          store, tree, cache, threads
//!    ^             what is kept (a memfd) ---- passed on ----->  maps it
//!    |             INIT and its reply  -- replayed, socket --->  fuser agrees on it
//!    +------------ the connection ------- passed on ---------->  takes the socket's place, serves
//!                  waits, pings, restarts <-- messages ------->  answers
//! ```
//!
//! **A worker ends** (a crash, `kill -9`, no memory, stuck): the supervisor has the kernel send again what the worker had
//! read and not answered (FUSE_NOTIFY_RESEND, Linux 6.9), and starts another. Whoever waits for an answer waits a little
//! longer; who has files open, mapped, or stands in a directory notices nothing, because inode numbers, handles and
//! backing files mean the same to the next worker (`mount::kept`).
//!
//! **Without resending** (before Linux 6.9) a worker gets a clone of the connection's descriptor, which is its alone: when
//! it dies the kernel ends what was read through it with an error, instead of letting it hang for ever.
//!
//! **A worker is replaced** by another program or other settings: the new one opens everything and answers INIT and a
//! question on a socket (the rehearsal) while the old one serves; what only one can have, the cache, changes hands; it
//! answers once more, and only then gets the connection. Whatever fails before leaves the old one in its place.
//!
//! The supervisor itself reads no store, makes no threads, and waits for nothing without a limit.

mod control;
mod handshake;
mod policy;
mod privilege;
mod process;
mod replace;
mod systemd;
mod watch;
mod wire;
mod worker;

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};

pub use control::{Status, replace, status};
pub use privilege::{become_user, ordinary_user};
pub use process::Program;
pub use worker::work;

use self::control::Name;
use self::policy::{Death, Next, Policy};
use self::privilege::Favours;
pub(super) use self::privilege::{Helper, is_for_now};
use self::process::{Prepared, Start, Worker};
use self::wire::{Came, FromWorker, ToWorker, wait_for};
use super::kept::{About, Kept, Number};
use super::{Ended, attach, mounted_at, table};
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys;

/// How long a worker may take to write down what it knows once the mount is gone.
const SETTLES: Duration = Duration::from_secs(20);

/// Messages of a worker that are heard before something else is looked at.
const HEARD: usize = 64;

/// How to supervise.
#[derive(Debug)]
pub struct Settings {
    /// Where to mount.
    pub mount_point: PathBuf,
    /// What to start as a worker.
    pub program: Program,
    /// Go by what the kernel offers; false: as on a kernel before Linux 6.9.
    pub resend: bool,
    /// A worker that has not answered for so long is replaced.
    pub watchdog: Duration,
    /// So many failures in a row are followed by another start; none for ever so many.
    pub restarts: Option<u32>,
}

/// Signals as something that can be waited for.
#[derive(Debug)]
struct Wakes {
    child: UnixStream,
    leave: UnixStream,
}

impl Wakes {
    fn new() -> Result<Wakes> {
        let pipe = |signals: &[i32]| -> std::io::Result<UnixStream> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            for signal in signals {
                signal_hook::low_level::pipe::register(*signal, theirs.try_clone()?)?;
            }
            Ok(ours)
        };
        let wakes = pipe(&[SIGCHLD]).and_then(|child| Ok(Wakes { child, leave: pipe(&[SIGTERM, SIGINT])? }));
        wakes.at("waiting for", "signals")
    }

    /// How often it was woken since last asked.
    fn count(mut pipe: &UnixStream) -> usize {
        pipe.read(&mut [0; 64]).unwrap_or(0)
    }
}

/// See the module.
#[derive(Debug)]
struct Supervisor {
    mount_point: PathBuf,
    wakes: Wakes,
    kept: Arc<Kept>,
    watchdog: Duration,
    policy: Policy,
    program: Arc<Program>,
    /// There from the moment it is mounted.
    mounted: Option<Mounted>,
    worker: Option<Worker>,
    /// When to start another.
    restart: Option<Instant>,
    /// Killed, and not gone yet.
    lingering: Vec<Worker>,
    last_death: Option<(Death, String)>,
    /// Signals to leave that came.
    leaving: usize,
    /// What was done for workers without privilege.
    favours: Favours,
}

#[derive(Debug)]
struct Mounted {
    device: OwnedFd,
    about: About,
    /// The kernel sends requests again.
    resend: bool,
    passthrough: bool,
    name: Name,
}

/// Mounts, and sees to it that the mount is served until it is taken away: by `umount`, or because SIGTERM or SIGINT
/// came. If it is in use then, its name is taken away, and it is served until the last user is gone; a second signal ends
/// it at once. `ready` is called when it is served.
///
/// # Errors
/// Those of the first worker, of mounting; or the worker's last words when one after the other has ended.
pub fn supervise(settings: Settings, ready: impl FnOnce()) -> Result<Ended> {
    let stored = systemd::take().at("taking over", "what the service manager has kept")?;
    let left = stored.and_then(|(device, file)| take_over(&settings.mount_point, device, file));
    let (dir, kept, mounted) = match left {
        Some((kept, mounted)) => (PathBuf::from(&mounted.about.mount_point), kept, Some(mounted)),
        None => (attach::preflight(&settings.mount_point)?, Kept::new()?, None),
    };
    let mut supervisor = Supervisor {
        mount_point: dir,
        wakes: Wakes::new()?,
        kept: Arc::new(kept),
        watchdog: settings.watchdog,
        policy: Policy::new(settings.restarts),
        program: Arc::new(settings.program),
        mounted,
        worker: None,
        restart: None,
        lingering: Vec::new(),
        last_death: None,
        leaving: 0,
        favours: Favours::default(),
    };
    supervisor.kept.set(Number::Supervisor, std::process::id().into());
    match supervisor.mounted.is_some() {
        true => supervisor.inherit()?,
        false => {
            supervisor.kept.set(Number::NoResend, u64::from(!settings.resend));
            if let Err(error) = supervisor.make() {
                if supervisor.mounted.is_some() {
                    let _ = attach::detach(&supervisor.mount_point, true);
                }
                return Err(error);
            }
        }
    }
    let status = format!("READY=1\nSTATUS=serving {}", supervisor.mount_point.display());
    let ended = supervisor.run(|| {
        ready();
        systemd::tell(&status, &[]);
    });
    systemd::drop_kept();
    ended
}

/// The mount at `dir` that an earlier supervisor has left, if it still is one.
fn take_over(dir: &Path, device: OwnedFd, file: OwnedFd) -> Option<(Kept, Mounted)> {
    let left = (|| {
        let none = || Error::new(Kind::Failed, "nothing was written down about it");
        let kept = Kept::open(file)?;
        let (about, (_, reply)) = kept.about()?.zip(kept.init()?).ok_or_else(none)?;
        if table::absolute(dir)? != Path::new(&about.mount_point) {
            return Err(Error::new(Kind::Failed, format!("it is at {}", about.mount_point)));
        }
        Ok((kept, Mounted::new(device, about, &reply)))
    })();
    match left {
        Ok((_, mounted)) if is_broken(&mounted.device) => None,
        Ok(left) => Some(left),
        Err(error) => {
            tracing::warn!(error = error.chain(), "the mount that was left cannot be gone on with");
            None
        }
    }
}

/// True when the kernel has ended the connection.
fn is_broken(device: &OwnedFd) -> bool {
    // Only an error is waited for: readable it is whenever there is work.
    let mut polled = [PollFd::new(device.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

impl Supervisor {
    /// Starts the first worker, mounts, and has it serve.
    fn make(&mut self) -> Result<()> {
        let resend = self.kept.get(Number::NoResend) == 0;
        // Kernels that cannot send again have no passthrough either.
        let start = Start { resend, passthrough: if resend { None } else { Some(false) }, ..self.next_start() };
        let mut worker = Worker::start(self.program.clone(), &self.kept, &self.mount_point, start)?;
        let prepared = worker.prepared(&[self.wakes.leave.as_fd()]);
        let prepared = prepared.inspect_err(|_| _ = worker.kill())?;
        self.mount(&prepared, &worker).inspect_err(|_| _ = worker.kill())?;
        self.give(worker)
    }

    /// Goes on with a mount that an earlier supervisor has left.
    fn inherit(&mut self) -> Result<()> {
        tracing::warn!(mount_point = %self.mount_point.display(), "going on with the mount of an earlier supervisor");
        systemd::end_left(&self.kept);
        self.clear_up(self.kept.get(Number::Lives), false);
        self.go_on()
    }

    /// Makes the mount and agrees with the kernel on what the worker says.
    fn mount(&mut self, prepared: &Prepared, worker: &Worker) -> Result<()> {
        let dir = &self.mount_point;
        let device = attach::attach(dir, table::SOURCE, Path::new(&prepared.store), prepared.allow_other)?;
        let mounted = (|| {
            let request = handshake::read_init(&device)?;
            let reply = worker.init(&request, |_| Ok(()))?;
            self.kept.set_init(&request, &reply)?;
            let about = About {
                mount_point: dir.to_string_lossy().into_owned(),
                dev: mounted_at(dir)?.dev,
                store: prepared.store.clone(),
                store_id: prepared.store_id.clone(),
                allow_other: prepared.allow_other,
            };
            self.kept.set_about(&about)?;
            handshake::write_reply(&device, &reply)?;
            Ok((about, reply))
        })();
        match mounted {
            Ok((about, reply)) => {
                systemd::keep(&device, &self.kept);
                self.mounted = Some(Mounted::new(device, about, &reply));
                Ok(())
            }
            Err(error) => {
                let _ = attach::detach(dir, true);
                Err(error)
            }
        }
    }

    /// How the next worker is to begin.
    fn next_start(&self) -> Start {
        Start {
            life: self.kept.add(Number::Lives, 1),
            resend: self.mounted.as_ref().is_some_and(|mounted| mounted.resend),
            passthrough: self.mounted.as_ref().map(|mounted| mounted.passthrough),
            rehearse: false,
        }
    }

    /// Has `worker` serve.
    fn give(&mut self, mut worker: Worker) -> Result<()> {
        let Some(mounted) = &self.mounted else { return Ok(()) };
        // Before it has the connection, for who comes after this process.
        self.kept.set(Number::Worker, worker.pid().into());
        let given = match mounted.resend {
            true => worker.serve(&mounted.device, mounted.about.dev),
            // The only one, so that what is read through it ends with the worker.
            false => sys::clone_fuse_device(&mounted.device)
                .at("opening", "/dev/fuse")
                .and_then(|clone| worker.serve(&clone, mounted.about.dev)),
        };
        if let Err(error) = given {
            // It may have read something.
            self.end(worker);
            return Err(error);
        }
        self.restart = None;
        self.worker = Some(worker);
        Ok(())
    }

    /// Ends `worker`; what it is at is sent to the next.
    fn end(&mut self, mut worker: Worker) {
        let gone = worker.kill().is_some();
        self.clear_up(worker.life, false);
        if !gone {
            self.lingering.push(worker);
        }
    }

    /// Starts a worker in the place of one that ended.
    fn go_on(&mut self) -> Result<()> {
        let worker = self.prepare(self.program.clone(), false)?;
        self.give(worker)
    }

    /// A worker that is ready to serve what is mounted.
    fn prepare(&self, program: Arc<Program>, rehearse: bool) -> Result<Worker> {
        let start = Start { rehearse, ..self.next_start() };
        let mut worker = Worker::start(program, &self.kept, &self.mount_point, start)?;
        match self.agree(&mut worker) {
            Ok(()) => Ok(worker),
            Err(error) => {
                worker.kill();
                Err(error)
            }
        }
    }

    /// Waits until `worker` is prepared, and sees that it agrees on what the mount was made with.
    fn agree(&self, worker: &mut Worker) -> Result<()> {
        let prepared = worker.prepared(&[self.wakes.leave.as_fd()])?;
        let Some(mounted) = &self.mounted else { return Ok(()) };
        let hint = "unmount and mount again to change that";
        if prepared.store_id != mounted.about.store_id {
            let what = format!("{} is another store than what is mounted", prepared.store);
            return Err(Error::new(Kind::Usage, what).hint(hint));
        }
        if prepared.allow_other != mounted.about.allow_other {
            return Err(Error::new(Kind::Usage, "who is let into a mount cannot change while it lives").hint(hint));
        }
        let gone = || Error::new(Kind::Failed, "what was agreed with the kernel is not kept").hint(hint);
        let (request, agreed) = self.kept.init()?.ok_or_else(gone)?;
        worker.init(&request, |reply| handshake::differs(&agreed, reply).map_or(Ok(()), Err)).map(drop)
    }

    /// Sees that the mount is served until it is gone; `ready` is called when it can be asked, too, or nearly so.
    fn run(&mut self, ready: impl FnOnce()) -> Result<Ended> {
        let mut ready = Some(ready);
        loop {
            if self.is_unmounted() {
                return self.finish();
            }
            if self.mounted.as_mut().is_some_and(|mounted| mounted.name.take(mounted.about.dev)) {
                ready.take().into_iter().for_each(|ready| ready());
            }
            if self.restart.is_some_and(|at| at <= Instant::now())
                && let Err(error) = self.go_on()
            {
                tracing::error!(error = error.chain(), "a worker cannot begin");
                self.last_death = Some((Death::Unable, error.chain()));
                self.restart = None;
                self.decide(Death::Unable, Duration::ZERO)?;
            }
            self.wait()?;
            if Wakes::count(&self.wakes.leave) > 0 && self.leave()? {
                return Ok(Ended::Abandoned);
            }
            self.look_after_worker()?;
            self.watch()?;
            self.answer();
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Result<()> {
        let name = self.mounted.as_ref().map(|mounted| &mounted.name);
        let listener = name.and_then(|name| name.listener.as_ref());
        let worker = self.worker.as_ref().map(|worker| self.next_look(worker));
        let next = [self.restart, worker, name.and_then(Name::next)];
        let next = next.into_iter().flatten().min();
        let mut all: Vec<BorrowedFd<'_>> = vec![self.wakes.child.as_fd(), self.wakes.leave.as_fd()];
        all.extend(self.worker.as_ref().map(|worker| worker.socket.as_fd()));
        all.extend(listener.map(AsFd::as_fd));
        // The device is always readable when there is work; that it breaks is told by the worker's end.
        wait_for(&all, next).map(drop).at("waiting for", "the worker")
    }

    /// True when the mount is gone.
    fn is_unmounted(&self) -> bool {
        self.mounted.as_ref().is_none_or(|mounted| is_broken(&mounted.device))
    }

    /// Waits for what serves a mount that is gone.
    fn finish(&mut self) -> Result<Ended> {
        // The next mount may have its device number already.
        self.mounted.iter_mut().for_each(|mounted| mounted.name.listener = None);
        if let Some(worker) = &mut self.worker {
            let end = Instant::now() + SETTLES;
            while worker.ended().is_none() && Instant::now() < end {
                let _ = wait_for(&[self.wakes.child.as_fd()], Some(end));
                Wakes::count(&self.wakes.child);
            }
            worker.kill();
        }
        Ok(Ended::Unmounted)
    }

    /// Unmounts because a signal came; true when it came again and nobody is to be waited for.
    fn leave(&mut self) -> Result<bool> {
        self.leaving += 1;
        let Some(mounted) = &self.mounted else { return Ok(true) };
        if self.leaving > 1 {
            tracing::warn!("ending while the mount is in use");
            if let Some(worker) = &mut self.worker {
                worker.kill();
            }
            return Ok(true);
        }
        let dir = &self.mount_point;
        tracing::info!(mount_point = %dir.display(), "unmounting");
        // Ours, and no other that was put in its place since.
        if table::on_top(dir).is_ok_and(|line| line.is_none_or(|line| line.dev != mounted.about.dev)) {
            return Ok(false);
        }
        match attach::detach(dir, false) {
            Ok(()) => {}
            Err(nix::Error::EBUSY) => {
                tracing::warn!(
                    mount_point = %dir.display(),
                    "the mount is in use: its name is gone, and it is served until nobody uses it; signal again to end now"
                );
                attach::detach(dir, true).map_err(std::io::Error::from).at("unmounting", dir)?;
            }
            Err(errno) => return Err(Error::io("unmounting", dir, errno.into())),
        }
        Ok(false)
    }

    /// Hears what the worker says, and sees whether it has ended.
    fn look_after_worker(&mut self) -> Result<()> {
        Wakes::count(&self.wakes.child);
        self.lingering.retain_mut(|worker| worker.ended().is_none());
        let Some(worker) = &mut self.worker else { return Ok(()) };
        let mut unmount = false;
        // What is left is heard next time: one that never stops talking keeps nothing else from being done.
        for _ in 0..HEARD {
            match worker.socket.receive() {
                Ok(Came::Message(FromWorker::Pong(number), _)) if number == worker.watch.number => {
                    worker.watch.asked = None;
                    worker.watch.heard = Some(Instant::now());
                }
                Ok(Came::Message(FromWorker::Unmount, _)) => unmount = true,
                Ok(Came::Message(FromWorker::Help { number, favour }, with)) => {
                    let Some(mounted) = &self.mounted else { continue };
                    let (outcome, file) = self.favours.grant(&mounted.device, favour, with);
                    let with: Vec<_> = file.iter().map(AsFd::as_fd).collect();
                    // One that is gone needs nothing any more.
                    let _ = worker.send(&ToWorker::Helped { number, outcome }, &with);
                }
                Ok(Came::Message(FromWorker::Failed(failure), _)) => {
                    let error = failure.into_error();
                    tracing::error!(error = error.chain(), "the worker ends");
                }
                Ok(Came::Message(..)) => {}
                Ok(Came::Closed | Came::Nothing) | Err(_) => break,
            }
        }
        if let Some(status) = worker.ended() {
            let death = Death::of(status, worker.memory_was_short());
            return if self.is_unmounted() { Ok(()) } else { self.died(death, true) };
        }
        if unmount {
            self.leave()?;
        }
        Ok(())
    }

    /// Clears up after a worker that is no more, and says when there will be another.
    fn died(&mut self, death: Death, gone: bool) -> Result<()> {
        let Some(worker) = self.worker.take() else { return Ok(()) };
        let served = worker.since.elapsed();
        let left = self.clear_up(worker.life, death.is_suspect());
        self.kept.add(Number::Deaths, 1);
        self.kept.add(Number::Hangs, u64::from(death == Death::Hung));
        let again = if self.mounted.as_ref().is_some_and(|m| m.resend) { "sent to the next" } else { "given up" };
        tracing::warn!(
            mount_point = %self.mount_point.display(),
            pid = worker.pid(),
            "the worker has ended ({death}) after {:.1} s; {left} requests are {again}",
            served.as_secs_f64()
        );
        self.last_death = Some((death, format!("process {}: {death}", worker.pid())));
        if !gone {
            self.lingering.push(worker);
        }
        self.decide(death, served)
    }

    /// Has the kernel send again what worker `life`, which is gone, was at; how much that was.
    fn clear_up(&mut self, life: u64, strike: bool) -> u64 {
        let Some(mounted) = &self.mounted else { return 0 };
        let left = self.kept.requests().after_death(life, strike, mounted.resend);
        self.kept.add(Number::InFlight, left.requests);
        self.kept.add(Number::DeathsInFlight, u64::from(left.requests > 0));
        // At once: until they are sent again, who waits for an answer cannot be interrupted.
        if mounted.resend
            && let Err(error) = handshake::resend(&mounted.device)
            && !self.is_unmounted()
        {
            tracing::error!(%error, "the kernel does not send again what the worker had read");
        }
        left.requests
    }

    fn decide(&mut self, death: Death, served: Duration) -> Result<()> {
        match self.policy.after(death, served) {
            Next::Again(pause) => {
                self.restart = Some(Instant::now() + pause);
                Ok(())
            }
            Next::GiveUp => {
                let (_, last) = self.last_death.clone().unwrap_or((death, death.to_string()));
                let what = format!(
                    "the mount at {} is given up: {} workers in a row have failed; the last one: {last}",
                    self.mount_point.display(),
                    self.policy.failures()
                );
                let hint = format!("its log says why; then: envfabric mount {}", self.mount_point.display());
                Err(Error::new(Kind::Failed, what).hint(hint))
            }
        }
    }
}

impl Mounted {
    fn new(device: OwnedFd, about: About, reply: &[u8]) -> Mounted {
        // Before it is served, so that whoever sees it can ask, unless the name is another's still.
        let mut name = Name::new();
        name.take(about.dev);
        Mounted {
            device,
            about,
            resend: handshake::has_resend(reply),
            passthrough: handshake::has_passthrough(reply),
            name,
        }
    }
}
