//! The worker: the process that answers the kernel, and may end at any time.
//!
//! ```text
//! Start -> everything is opened -> Prepared -> INIT and a probe on a socket -> Serve: the real connection takes the
//! socket's place in the same descriptor
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::super::kept::{self, Kept, Number};
use super::super::{Options, Ready, Running, Served, Tenure, attach, ready, settle};
use super::privilege::Helper;
use super::wire::{Came, Failure, FromWorker, Socket, ToWorker};
use crate::error::{Error, IoContext, Kind, Result};
use crate::mount::passthrough::Backings;
use crate::mount::serving::Agreed;
use crate::mount::shift::blame_this_thread;
use crate::store::{Index, Store};
use crate::sys;
use crate::view::{Mountpoint, Tree};

/// How often a worker that drains looks whether all is answered.
const DRAINS: Duration = Duration::from_millis(2);
/// What a worker is told at its beginning.
struct Orders {
    kept: Arc<Kept>,
    stage: OwnedFd,
    life: u64,
    dir: PathBuf,
    agreed: Agreed,
    rehearse: bool,
    helper: Option<Arc<Helper>>,
}

/// What serves, in the worker's main thread.
struct Work {
    ready: Ready,
    running: Running,
}

/// Serves what a supervisor has mounted, at the other end of `control`, until that ends. `open` gives what is to be shown
/// and how. Where it is `unprivileged` and the supervisor is not, the supervisor is asked for what only root may do.
///
/// # Errors
/// Those that the supervisor was told, too.
pub fn work(
    control: OwnedFd,
    unprivileged: bool,
    open: impl Fn() -> Result<(Store, Arc<Index>, Options)>,
) -> Result<()> {
    let control = Arc::new(Socket::new(control));
    let helper = unprivileged.then(|| Arc::new(Helper::new(control.clone())));
    let done = try_work(&control, helper, open);
    if let Err(error) = &done {
        let _ = control.send(&FromWorker::Failed(Failure::from(error)), &[]);
    }
    done
}

/// A thread that panics has a request that nobody answers: the process ends, and the request is sent to the next.
fn abort_on_panic(kept: Arc<Kept>) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |what| {
        blame_this_thread(&kept);
        tell(what);
        std::process::abort();
    }));
}

fn gone() -> Error {
    Error::new(Kind::Failed, "the supervisor of the mount is gone").hint("a worker is not started by hand: use `mount`")
}

fn try_work(
    control: &Arc<Socket>,
    helper: Option<Arc<Helper>>,
    open: impl Fn() -> Result<(Store, Arc<Index>, Options)>,
) -> Result<()> {
    let mut orders = match next(control)? {
        (ToWorker::Start { life, mount_point, resend, passthrough, rehearse }, mut with) if with.len() == 2 => {
            let (stage, file) = (with.pop().ok_or_else(gone)?, with.pop().ok_or_else(gone)?);
            let (kept, dir) = (Arc::new(Kept::open(file)?), PathBuf::from(mount_point));
            abort_on_panic(kept.clone());
            Orders { kept, stage, life, dir, agreed: Agreed { resend, passthrough }, rehearse, helper }
        }
        _ => return Err(gone()),
    };
    let mut work = prepare(control, &orders, &open)?;
    let (dev, device) = loop {
        match next(control)? {
            (ToWorker::Begin, mut with) => {
                // The supervisor has closed its end of the socket, so the threads end, and let go of everything.
                let _ = work.running.served.join();
                drop(work);
                orders.stage = with.pop().ok_or_else(gone)?;
                orders.rehearse = false;
                work = prepare(control, &orders, &open)?;
            }
            (ToWorker::Serve { dev }, mut with) => break (dev, with.pop().ok_or_else(gone)?),
            (ToWorker::Ping { number, .. }, _) => tell(control, &FromWorker::Pong(number))?,
            (ToWorker::Start { .. } | ToWorker::LetGo | ToWorker::Drain | ToWorker::Helped { .. }, _) => {}
        }
    };
    serve(control, work, &orders, dev, device)
}

/// The next order; waits for it.
fn next(control: &Socket) -> Result<(ToWorker, Vec<OwnedFd>)> {
    loop {
        match control.wait(Instant::now() + Duration::from_secs(3600), &[]).at("hearing from", "the supervisor")? {
            Came::Message(message, with) => return Ok((message, with)),
            Came::Nothing => {}
            Came::Closed => return Err(gone()),
        }
    }
}

fn tell(control: &Socket, message: &FromWorker) -> Result<()> {
    control.send(message, &[]).at("telling", "the supervisor")
}

/// Opens everything, and answers INIT.
fn prepare(control: &Socket, orders: &Orders, open: impl Fn() -> Result<(Store, Arc<Index>, Options)>) -> Result<Work> {
    let (store, index, options) = open()?;
    let tree = Tree::new(store, index).kept(kept::logs(&orders.kept)?);
    let tenure = Tenure {
        kept: orders.kept.clone(),
        life: Some(orders.life),
        agreed: orders.agreed,
        rehearses: orders.rehearse,
        helper: orders.helper.clone(),
    };
    let ready = ready(tree, &options, &orders.dir, true, &tenure)?;
    ready.tree.prove()?;
    let store = ready.tree.store();
    tell(
        control,
        &FromWorker::Prepared {
            store: store.root().to_string_lossy().into_owned(),
            store_id: store.fabric().id.clone(),
            threads: options.threads.max(1),
            allow_other: options.allow_other,
            version: env!("CARGO_PKG_VERSION").into(),
        },
    )?;
    let stage = orders.stage.try_clone().at("serving", &orders.dir)?;
    let running = ready.answer(stage, &orders.dir, || ())?;
    Ok(Work { ready, running })
}

fn serve(control: &Arc<Socket>, work: Work, orders: &Orders, dev: (u32, u32), device: OwnedFd) -> Result<()> {
    let Work { ready, running } = work;
    let Running { served, notifier, number } = running;
    // Signals reach whoever mounted; this process is not to end by them, because then it would just be replaced.
    let signals = Signals::new([SIGINT, SIGTERM]).at("waiting for", "signals")?;
    let at = Mountpoint { path: orders.dir.clone(), dev };
    ready.tree.set_mountpoint(at.clone());
    if orders.has_passthrough() {
        ready.adapter.passthrough.serve(match &orders.helper {
            Some(helper) => Backings::Helped(helper.clone()),
            None => Backings::Own(device.try_clone().at("serving", &at.path)?),
        });
    }
    sys::put_in_place(&device, number).at("serving", &at.path)?;
    drop(device);
    tell(control, &FromWorker::Serving)?;
    ready.begin(at.clone(), notifier)?;
    let ready = Arc::new(ready);
    let (heard, hears, helper) = (control.clone(), ready.clone(), orders.helper.clone());
    let kept = orders.kept.clone();
    let listen = move || {
        let supervisor = kept.get(Number::Supervisor);
        listen(&heard, &hears, helper.as_deref());
        note_gone(&kept, supervisor);
    };
    std::thread::Builder::new().name("control".into()).spawn(listen).at("serving", &at.path)?;
    let asked = control.clone();
    let asked = move || take_signals(signals, &asked, &at);
    std::thread::Builder::new().name("signals".into()).spawn(asked).at("serving", &orders.dir)?;
    let ended = wait(&served);
    settle(&ready.tree, &ready.refresher);
    let _ = tell(control, &FromWorker::Ended);
    ended.map_err(|error| Error::new(Kind::Failed, format!("serving {} ended: {error}", orders.dir.display())))
}

impl Orders {
    /// Whether the kernel has granted passthrough, by what is kept of INIT.
    fn has_passthrough(&self) -> bool {
        match self.agreed.passthrough {
            Some(has) => has,
            None => self.kept.init().ok().flatten().is_some_and(|(_, reply)| super::handshake::has_passthrough(&reply)),
        }
    }
}

fn wait(served: &Served) -> std::result::Result<(), String> {
    let end = served.end.lock().unwrap_or_else(PoisonError::into_inner);
    let end = served.ended.wait_while(end, |end| end.is_none()).unwrap_or_else(PoisonError::into_inner);
    end.clone().unwrap_or(Ok(()))
}

/// A signal to this process means the mount.
fn take_signals(mut signals: Signals, control: &Socket, at: &Mountpoint) {
    for _ in signals.forever() {
        if control.send(&FromWorker::Unmount, &[]).is_err() {
            tracing::warn!(mount_point = %at.path.display(), "unmounting without a supervisor");
            let _ = attach::detach(&at.path, true);
        }
    }
}

/// Writes down that the supervisor is gone, unless it is there and has let go of this worker alone, or another has taken
/// its place.
fn note_gone(kept: &Kept, supervisor: u64) {
    // What a process has open goes a little before the process.
    for _ in 0..100 {
        if nix::unistd::getppid().as_raw() as u64 != supervisor {
            if kept.get(Number::Supervisor) == supervisor {
                kept.set(Number::Supervisor, 0);
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Does what the supervisor says, for as long as there is one. Without it, it goes on serving.
fn listen(control: &Socket, ready: &Ready, helper: Option<&Helper>) {
    loop {
        let (order, with) = match next(control) {
            Ok(order) => order,
            Err(_) => {
                helper.into_iter().for_each(Helper::is_alone);
                tracing::error!("the supervisor is gone: when this process ends, so does the mount");
                return;
            }
        };
        let answered = match order {
            ToWorker::Ping { number, stuck } => match proves(ready, Duration::from_millis(stuck)) {
                true => control.send(&FromWorker::Pong(number), &[]),
                false => Ok(()),
            },
            ToWorker::LetGo => {
                ready.tree.cache().into_iter().for_each(|cache| cache.let_go());
                ready.tree.publish_profiles(true);
                control.send(&FromWorker::HasLetGo, &[])
            }
            ToWorker::Drain => drain(ready),
            ToWorker::Helped { number, outcome } => {
                if let Some(helper) = helper {
                    helper.answer(number, outcome, with);
                }
                Ok(())
            }
            ToWorker::Start { .. } | ToWorker::Begin | ToWorker::Serve { .. } => Ok(()),
        };
        if answered.is_err() {
            tracing::debug!("the supervisor does not listen");
        }
    }
}

/// True when the threads that answer are not stuck, and what they need to answer can be had.
fn proves(ready: &Ready, stuck: Duration) -> bool {
    if ready.adapter.shift.is_stuck(stuck) {
        return false;
    }
    // Takes the locks that a request takes; whether the store answers is nothing that another worker could change.
    let _ = crate::patience::at_once(|| ready.tree.attr(crate::view::Ino::ROOT));
    true
}

/// Ends the process as soon as everything is answered that was read.
fn drain(ready: &Ready) -> io::Result<()> {
    ready.adapter.shift.drain();
    while !ready.adapter.shift.is_drained() {
        std::thread::sleep(DRAINS);
    }
    std::process::exit(0)
}
