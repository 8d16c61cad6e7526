//! Tells the kernel what changed.
//!
//! From a thread of its own, never from one that serves requests: to invalidate a name the kernel takes the lock of its
//! directory, which a lookup in that directory holds while it waits for us.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier};

use crate::view::Tree;

/// How often names that somebody asked for lately are compared with the store.
const EVERY: Duration = Duration::from_millis(300);
/// The same for a distant store, where each look takes several requests.
const EVERY_DISTANT: Duration = Duration::from_millis(900);

/// Wakes and ends the thread.
#[derive(Debug, Default)]
pub(super) struct Refresher {
    asked: AtomicBool,
    ended: Mutex<bool>,
    wake: Condvar,
}

impl Refresher {
    /// Somebody asked for a name outside versions.
    pub(super) fn note_asked(&self) {
        if !self.asked.swap(true, Ordering::Relaxed) {
            drop(self.ended.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    pub(super) fn end(&self) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wake.notify_all();
    }

    /// The thread's work, until [`Refresher::end`].
    pub(super) fn run(&self, tree: &Tree, notifier: &Notifier) {
        let mut active = false;
        let every = if tree.cache().is_some() { EVERY_DISTANT } else { EVERY };
        let mut pause = every;
        loop {
            {
                let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
                let ended = if active {
                    let waited = self.wake.wait_timeout_while(ended, pause, |ended| !*ended);
                    waited.map_or_else(|e| e.into_inner().0, |(guard, _)| guard)
                } else {
                    // Nothing to watch: sleep until somebody asks.
                    let asleep = |ended: &mut bool| !*ended && !self.asked.load(Ordering::Relaxed);
                    self.wake.wait_while(ended, asleep).unwrap_or_else(PoisonError::into_inner)
                };
                if *ended {
                    return;
                }
            }
            self.asked.store(false, Ordering::Relaxed);
            let start = Instant::now();
            let watching = tree.refresh();
            // A slow store is not asked all the time; the end of an outage is to be noticed at once.
            pause = if tree.is_cut_off() { every } else { every.max(start.elapsed() * 5) };
            active = watching || self.asked.load(Ordering::Relaxed) || !active;
            for changed in tree.take_changes() {
                let dir = INodeNo(changed.dir.get());
                // The kernel may know neither the directory nor the name; it then says so, and that is well.
                let _ = notifier.inval_inode(dir, 0, 0);
                for name in &changed.links {
                    let _ = notifier.inval_entry(dir, OsStr::new(name));
                }
            }
        }
    }
}

/// Starts the thread.
pub(super) fn spawn(refresher: Arc<Refresher>, tree: Arc<Tree>, notifier: Notifier) -> std::io::Result<()> {
    let run = move || refresher.run(&tree, &notifier);
    std::thread::Builder::new().name("names".into()).spawn(run).map(drop)
}
