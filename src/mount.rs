//! Serves a [`Tree`] as a FUSE file system.
//!
//! ```text
//! mount()  preflight -> /dev/fuse + mount(2) | fusermount3 -> session threads -> Tree
//!                                                   what must wait for a distant store: waiters -> Tree
//!                                              refresher thread -> store, kernel notifications
//! wait()   SIGTERM, SIGINT -> unmount; busy: detach and serve on until the last user is gone; again: end at once
//! ```
//!
//! The mount is made here and not by `fuser`, whose unmounting is always lazy and whose mounting needs `/dev/fuse` to be
//! open to everybody; and because one day another process will hold it.

mod adapter;
mod alive;
mod attach;
mod kept;
mod passthrough;
mod refresh;
mod replies;
mod serving;
mod shift;
mod stats;
pub mod supervisor;
mod table;
mod trial;
mod warm;

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuser::{Config, Generation, Notifier, Session, SessionACL};
use signal_hook::iterator::Signals;
use tempfile::TempDir;

pub use alive::{Alive, alive};
pub use attach::{fusermount, preflight, umount};
pub use passthrough::{NoPassthrough, is_local, obstacle};
pub use stats::{Memory, Opens, PassthroughUse, Stats, Supervised, stats};
pub use table::{MountInfo, find, mounts};
pub use trial::{clear_dead_trials, end_trials, profile, trial};
pub use warm::{Warmed, warm};

use crate::cache::{self, Cache};
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience::{self, Pool};
use crate::store::{Codec, Index, Store};
use crate::view::{Mountpoint, Tree};
use adapter::Adapter;
use kept::{Kept, Number};
use passthrough::{Backings, Passthrough};
use refresh::Refresher;
use replies::Shown;
use serving::{Agreed, Serving, Spaces};
use shift::Shift;
use stats::Counters;
use supervisor::Helper;

/// How to mount.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where; made if missing, must be empty.
    pub mount_point: PathBuf,
    /// Threads that serve requests, at least 1.
    pub threads: usize,
    /// Let other users in. For an ordinary user `/etc/fuse.conf` must allow it.
    pub allow_other: bool,
    /// Let the kernel read large files straight from the store, where it can.
    pub passthrough: bool,
    /// Offer environments what makes their imports cheaper.
    pub imports: bool,
    /// Whether the store may hang, so that no thread that answers must wait for it; none: as its file system says.
    pub distant: Option<bool>,
    /// How long a distant store may take for one answer about names.
    pub patience: Duration,
    /// What to keep of a store whose files are not read in place; none: a temporary directory.
    pub cache: Option<cache::Options>,
    /// Keep it also of a store whose files could be read in place.
    pub cache_always: bool,
}

impl Options {
    /// What is usual at `mount_point`: 4 threads, other users let in when root mounts, passthrough where possible.
    pub fn at(mount_point: impl Into<PathBuf>) -> Self {
        Options {
            mount_point: mount_point.into(),
            threads: 4,
            allow_other: attach::is_root(),
            passthrough: true,
            imports: true,
            distant: None,
            patience: patience::LIMIT,
            cache: None,
            cache_always: false,
        }
    }
}

/// How long a cache is waited for whose mount is gone already.
const CACHE_WAIT: Duration = Duration::from_secs(15);
/// Caches beside the default one, for mounts at the same time.
const OTHER_CACHES_MAX: u32 = 16;

/// How a mount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was unmounted and nobody uses it any more.
    Unmounted,
    /// A second signal came while it was still in use: the process should exit now.
    Abandoned,
}

/// A mount that is being served by threads of this process.
///
/// Dropped, it is taken away lazily, and its threads end when nobody uses it any more.
#[derive(Debug)]
pub struct Mounted {
    at: Mountpoint,
    session: Arc<Served>,
    refresher: Arc<Refresher>,
    tree: Arc<Tree>,
    /// Where the cache is, if it is to go with the mount.
    _temporary: Option<TempDir>,
}

/// Whether the session still runs, and what ended it.
#[derive(Debug, Default)]
struct Served {
    end: Mutex<Option<std::result::Result<(), String>>>,
    ended: Condvar,
}

/// Mounts `store` and serves it.
///
/// # Errors
/// See the messages: FUSE is missing, the mount point is in use, stale, not empty, or not permitted.
pub fn mount(store: Store, index: Arc<Index>, options: &Options) -> Result<Mounted> {
    serve(Tree::new(store, index), options, table::SOURCE, true)
}

/// Which worker of a mount this is, and what it goes on with.
#[derive(Debug, Clone)]
struct Tenure {
    kept: Arc<Kept>,
    /// Number of the worker; none where no other will go on with the mount.
    life: Option<u64>,
    agreed: Agreed,
    /// Another worker serves, which has the cache: go without, where it is busy.
    rehearses: bool,
    /// Whom to ask for what needs privilege: the mount is root's, and this process is not.
    helper: Option<Arc<Helper>>,
}

/// A tree with everything that serves it.
struct Ready {
    adapter: Adapter,
    config: Config,
    tree: Arc<Tree>,
    refresher: Arc<Refresher>,
    /// Where the cache is, if it is to go with the mount.
    temporary: Option<TempDir>,
    /// What is shown is leased.
    leases: bool,
}

/// Threads of a session that serve.
struct Running {
    served: Arc<Served>,
    notifier: Notifier,
    /// The session's descriptor.
    number: RawFd,
}

/// `tree` as `options` say, to be mounted at `dir`.
fn ready(tree: Tree, options: &Options, dir: &Path, records: bool, tenure: &Tenure) -> Result<Ready> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if tenure.life.is_none_or(|life| life == 1) && real(dir).starts_with(real(tree.store().root())) {
        return Err(Error::new(Kind::Invalid, format!("{} is inside the store that it would show", dir.display()))
            .hint("name a directory outside of the store"));
    }
    attach::raise_open_files();
    let distant = options.distant.unwrap_or_else(|| !is_local(tree.store().root()));
    let tree = if distant { tree.distant(options.patience) } else { tree };
    let caches =
        distant || options.cache_always || tree.store().codec() != Codec::Raw || tree.store().trust().is_some();
    let (tree, temporary) = match caches {
        true if tenure.rehearses => with_cache_if_free(tree, options)?,
        true => with_cache(tree, options)?,
        false => (tree, None),
    };
    // What is read in place is not seen.
    let tree = if records && tree.cache().is_some() { tree.recording() } else { tree };
    // Files of the store, or of the cache.
    let files = tree.cache().map_or_else(|| tree.store().root().to_path_buf(), |cache| cache.dir().to_path_buf());
    let tree = Arc::new(if options.imports { tree } else { tree.without_imports() });
    let refresher = Arc::new(Refresher::default());
    let has_privilege = attach::is_root() || tenure.helper.is_some();
    let obstacle = match passthrough::obstacle_for(has_privilege, &files, options.passthrough) {
        None if tenure.agreed.passthrough == Some(false) => Some(NoPassthrough::MadeWithout),
        obstacle => obstacle,
    };
    let try_passthrough = obstacle.is_none();
    let passthrough = Passthrough::new(tenure.kept.clone());
    if let Some(why) = obstacle {
        passthrough.disable(why);
    }
    let threads = options.threads.max(1);
    if let Some(helper) = &tenure.helper {
        tree.look_elsewhere(helper.clone());
    }
    let adapter = Adapter::new(Serving {
        tree: tree.clone(),
        refresher: refresher.clone(),
        shown: Shown {
            // Who mounted, and not who serves: to that one nothing belongs.
            owner: match tenure.helper {
                Some(_) => (0, 0),
                None => (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
            },
            generation: Generation(tenure.kept.get(Number::Generation)),
        },
        try_passthrough,
        passthrough,
        counters: Counters::default(),
        threads,
        waiters: if tree.cache().is_some() { Some(Pool::of_waiters()?) } else { None },
        space: Spaces::default(),
        agreed: tenure.agreed,
        shift: Shift::new(tenure.kept.clone(), tenure.life, threads),
    });
    let mut config = Config::default();
    // The kernel knows who mounted and lets no other in; `fuser` takes this process for that one.
    let all = options.allow_other || tenure.helper.is_some();
    config.acl = if all { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(threads);
    // A descriptor that a worker clones dies with it, and what was read through it fails.
    config.clone_fd = tenure.life.is_none();
    Ok(Ready { adapter, config, tree, refresher, temporary, leases: records })
}

impl Ready {
    /// Agrees with who is at the other end of `device`, calls `agreed`, and begins to answer.
    fn answer(&self, device: OwnedFd, dir: &Path, agreed: impl FnOnce()) -> Result<Running> {
        let session = Session::from_fd(self.adapter.clone(), device, self.config.acl, self.config.clone());
        let session = session.at("serving", dir)?;
        agreed();
        let (notifier, number) = (session.notifier(), session.as_fd().as_raw_fd());
        let served = Arc::new(Served::default());
        let end = served.clone();
        let run = move || {
            end.finish(match session.run() {
                // A request (the release of the last file, say) was just being read when the unmounting ended the
                // connection; otherwise it is ENODEV, which fuser takes for the end itself. (fs/fuse/dev.c)
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
                ended => ended.map_err(|error| error.to_string()),
            })
        };
        std::thread::Builder::new().name("session".into()).spawn(run).at("serving", dir)?;
        Ok(Running { served, notifier, number })
    }

    /// Starts what goes on beside the answers, once it is mounted.
    fn begin(&self, at: Mountpoint, notifier: Notifier) -> Result<()> {
        let dir = at.path.clone();
        self.tree.set_mountpoint(at);
        if self.tree.cache().is_some() {
            let tree = self.tree.clone();
            let ahead = move || tree.run_ahead();
            std::thread::Builder::new().name("ahead".into()).spawn(ahead).at("serving", &dir)?;
        }
        if self.leases {
            self.tree.hold_leases();
        }
        refresh::spawn(self.refresher.clone(), self.tree.clone(), notifier).at("serving", &dir)
    }
}

/// Ends what goes on beside the answers, and writes down what is to be known later.
fn settle(tree: &Tree, refresher: &Refresher) {
    refresher.end();
    tree.end();
    if let Some(cache) = tree.cache() {
        cache.settle();
    }
    tree.publish_profiles(true);
}

fn serve(tree: Tree, options: &Options, source: &str, records: bool) -> Result<Mounted> {
    let dir = attach::preflight(&options.mount_point)?;
    let tenure =
        Tenure { kept: Arc::new(Kept::new()?), life: None, agreed: Agreed::default(), rehearses: false, helper: None };
    let mut ready = ready(tree, options, &dir, records, &tenure)?;
    let device = attach::attach(&dir, source, ready.tree.store().root(), options.allow_other)?;
    let started = (|| {
        let at = mounted_at(&dir)?;
        // `pyvenv.cfg` needs it at once.
        ready.tree.set_mountpoint(at.clone());
        let own = device.try_clone().at("serving", &dir)?;
        let passthrough = &ready.adapter.passthrough;
        let begins = || {
            if passthrough.is_enabled() {
                passthrough.serve(Backings::Own(own))
            }
        };
        let running = ready.answer(device, &dir, begins)?;
        let mounted = Mounted {
            at: at.clone(),
            session: running.served,
            refresher: ready.refresher.clone(),
            tree: ready.tree.clone(),
            _temporary: ready.temporary.take(),
        };
        ready.begin(at, running.notifier)?;
        Ok(mounted)
    })();
    if started.is_err() {
        let _ = attach::detach(&dir, true);
    }
    started
}

/// Our mount at `dir`, by the kernel's own table, and not by stat(): nobody may answer yet.
fn mounted_at(dir: &Path) -> Result<Mountpoint> {
    let line = table::on_top(dir)?.filter(|line| table::of_this_program(line).is_some());
    let line = line.ok_or_else(|| Error::new(Kind::Failed, format!("the mount at {} is gone", dir.display())))?;
    Ok(Mountpoint { path: dir.to_path_buf(), dev: line.dev })
}

/// `tree` with a cache as `options` say, if no other process has it.
fn with_cache_if_free(tree: Tree, options: &Options) -> Result<(Tree, Option<TempDir>)> {
    // What must be signed is compared in a cache, even for a try.
    let signed = tree.store().trust().is_some();
    let Some(keep) = &options.cache else { return if signed { with_cache(tree, options) } else { Ok((tree, None)) } };
    match Cache::open(keep.clone().for_keys_of(tree.store()), tree.store().clone()) {
        Ok(cache) => Ok((tree.cached(Arc::new(cache)), None)),
        Err(error) if error.kind() == Kind::Busy && signed => {
            with_cache(tree, &Options { cache: None, ..options.clone() })
        }
        Err(error) if error.kind() == Kind::Busy => Ok((tree, None)),
        Err(error) => Err(error),
    }
}

/// `tree` with a cache as `options` say; without a word from them in a directory that is gone when the mount is.
fn with_cache(tree: Tree, options: &Options) -> Result<(Tree, Option<TempDir>)> {
    let (keep, temporary) = match &options.cache {
        Some(keep) => (keep.clone().for_keys_of(tree.store()), None),
        None => {
            let dir = tempfile::Builder::new().prefix("envfabric-cache-").tempdir();
            let dir = dir.at("creating", std::env::temp_dir())?;
            (cache::Options::at(dir.path()), Some(dir))
        }
    };
    let open = |keep: cache::Options| Cache::open(keep, tree.store().clone());
    let is_busy = |opened: &Result<Cache>| opened.as_ref().is_err_and(|error| error.kind() == Kind::Busy);
    let mut opened = open(keep.clone());
    // A mount that was taken away may be writing down what its cache has.
    let begun = Instant::now();
    let may_be_ending = || options.cache_always || mounts().is_ok_and(|all| all.is_empty());
    while is_busy(&opened) && begun.elapsed() < CACHE_WAIT && may_be_ending() {
        std::thread::sleep(Duration::from_millis(100));
        opened = open(keep.clone());
    }
    // Nobody has named the directory, and another mount has it: one beside it.
    for other in 2..=OTHER_CACHES_MAX {
        if options.cache_always || !is_busy(&opened) {
            break;
        }
        let mut dir = keep.dir.clone().into_os_string();
        dir.push(format!("-{other}"));
        opened = open(cache::Options { dir: dir.into(), ..keep.clone() });
    }
    let cache = opened?;
    Ok((tree.cached(Arc::new(cache)), temporary))
}

impl Served {
    fn finish(&self, result: std::result::Result<(), String>) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.ended.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn was_unmounted(&self) -> bool {
        matches!(*self.end.lock().unwrap_or_else(PoisonError::into_inner), Some(Ok(())))
    }

    fn join(&self) -> std::result::Result<(), String> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.ended.wait_while(end, |end| end.is_none()).unwrap_or_else(PoisonError::into_inner);
        end.clone().unwrap_or(Ok(()))
    }
}

impl Mounted {
    /// Where it is mounted, as the kernel lists it.
    pub fn mount_point(&self) -> &Path {
        &self.at.path
    }

    /// Serves until it is unmounted: by `umount`, or because one of `signals` came (register SIGTERM and SIGINT).
    ///
    /// Register the signals before mounting, so that none is lost. After a signal it is unmounted; if it is in use, its name is taken away and it goes on serving those who use it
    /// until the last is gone. A second signal ends the wait at once.
    pub fn wait(self, mut signals: Signals) -> Result<Ended> {
        let handle = signals.handle();
        let session = self.session.clone();
        // Ends the iteration below when the session does.
        let watch = move || {
            let _ = session.join();
            handle.close();
        };
        std::thread::Builder::new().name("session-end".into()).spawn(watch).at("serving", &self.at.path)?;
        let mut leaving = false;
        for signal in signals.forever() {
            if self.session.has_ended() {
                break;
            }
            if leaving {
                tracing::warn!(signal, "ending while the mount is in use");
                return Ok(Ended::Abandoned);
            }
            leaving = true;
            tracing::info!(signal, mount_point = %self.at.path.display(), "unmounting");
            match self.detach(false) {
                Ok(()) => {}
                Err(nix::Error::EBUSY) => {
                    tracing::warn!(
                        mount_point = %self.at.path.display(),
                        "the mount is in use: its name is gone, and it is served until nobody uses it; signal again to end now"
                    );
                    self.detach(true).at("unmounting", &self.at.path)?;
                }
                Err(errno) => return Err(Error::io("unmounting", &self.at.path, errno.into())),
            }
        }
        self.finished()
    }

    /// Unmounts and waits for the end.
    ///
    /// # Errors
    /// [`Kind::Busy`] when it is in use: then the mount is dropped, that is, taken away lazily.
    pub fn unmount(self) -> Result<()> {
        match self.detach(false) {
            Ok(()) => self.finished().map(|_| ()),
            Err(nix::Error::EBUSY) => Err(attach::busy_at(&self.at)),
            Err(errno) => Err(Error::io("unmounting", &self.at.path, errno.into())),
        }
    }

    fn finished(&self) -> Result<Ended> {
        match self.session.join() {
            Ok(()) => Ok(Ended::Unmounted),
            Err(error) => {
                let what = format!("serving {} ended: {error}", self.at.path.display());
                Err(Error::new(Kind::Failed, what))
            }
        }
    }

    /// Takes our mount away, and no other that was put in its place since.
    fn detach(&self, lazy: bool) -> nix::Result<()> {
        match table::on_top(&self.at.path) {
            Ok(Some(line)) if line.dev == self.at.dev => attach::detach(&self.at.path, lazy),
            Ok(_) => Ok(()),
            Err(_) => attach::detach(&self.at.path, lazy),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        settle(&self.tree, &self.refresher);
        // Once it was unmounted, what is mounted there now is another's, even if it got our device number.
        if !self.session.was_unmounted()
            && let Err(errno) = self.detach(true)
        {
            tracing::warn!(mount_point = %self.at.path.display(), %errno, "the mount could not be taken away");
        }
    }
}
