//! Which versions a mount has shown: a lease in the store keeps them from being collected.
//!
//! A version counts from the moment when something below its `.venv` or `.python` is looked at, until the mount ends:
//! the kernel keeps names and inodes for as long as it likes, so nobody can tell when the last process let go of it. A mere
//! listing of `.versions` leases nothing.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::*;
use crate::patience;
use crate::store::{Lease, Leased};

/// How often the lease is renewed where nothing new is shown, or tried again.
const RENEW: Duration = Duration::from_secs(60);
/// Versions that are shown one shortly after the other are written down together, and a first start has the store to
/// itself. Nothing is collected so soon.
const TOGETHER: Duration = Duration::from_secs(3);
/// How long giving the lease up may take; else it becomes stale.
const GIVE_UP: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Leases {
    state: Mutex<State>,
    changed: Condvar,
    lease: Mutex<Option<Lease>>,
}

#[derive(Debug, Default)]
struct State {
    /// Slots of versions.
    shown: BTreeSet<u32>,
    /// Some of them are not in the lease yet.
    new: bool,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leases {
    /// The version in `slot` is shown.
    pub(super) fn show(&self, slot: u32) {
        let mut state = lock(&self.state);
        if state.shown.insert(slot) {
            state.new = true;
            self.changed.notify_one();
        }
    }

    /// Waits until there is something to do; false at the end.
    fn wait(&self) -> bool {
        let state = lock(&self.state);
        let idle = |state: &mut State| !state.ended && !state.new;
        let (state, _) = self.changed.wait_timeout_while(state, RENEW, idle).unwrap_or_else(PoisonError::into_inner);
        let going_on = |state: &mut State| !state.ended;
        let together = if state.new { TOGETHER } else { Duration::ZERO };
        let (mut state, _) =
            self.changed.wait_timeout_while(state, together, going_on).unwrap_or_else(PoisonError::into_inner);
        state.new = false;
        !state.ended
    }

    /// Gives up what is leased. Also ends the thread of [`Tree::hold_leases`].
    pub(super) fn end(self: &Arc<Self>) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
        let leases = self.clone();
        // A store that hangs must not keep a mount from ending.
        let _ = patience::within(GIVE_UP, move || {
            drop(lock(&leases.lease).take());
            Ok(())
        });
    }
}

impl Tree {
    /// Leases the versions that this tree shows, from now on until [`Tree::end`], on a thread of its own.
    pub fn hold_leases(self: &Arc<Self>) {
        let leases = self.leases.clone();
        // Where somebody else has served this mount before, the kernel knows what that has shown.
        (0..).zip(self.version_slots.keys()).for_each(|(slot, _)| leases.show(slot));
        let tree = Arc::downgrade(self);
        let place = self.mountpoint.get().map_or_else(String::new, |at| format!(" at {}", at.path.display()));
        *lock(&leases.lease) = Some(Lease::new(self.store.clone(), format!("mount{place}")));
        let run = move || {
            let mut told = false;
            while leases.wait() {
                let Some(tree) = tree.upgrade() else { return };
                let slots: Vec<u32> = lock(&leases.state).shown.iter().copied().collect();
                let versions = slots.iter().filter_map(|slot| {
                    let (environment, version) = tree.version_slots.key(*slot)?;
                    // A draft has no number, and nobody can collect it.
                    (version > 0).then_some(Leased { environment, version })
                });
                let versions = versions.collect();
                drop(tree);
                let held = lock(&leases.lease).as_mut().map_or(Ok(()), |lease| lease.protect(versions));
                if let Err(error) = held
                    && !std::mem::replace(&mut told, true)
                {
                    tracing::info!(error = error.chain(), "what is shown cannot be leased: collect with care");
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("leases".into()).spawn(run) {
            tracing::warn!(%error, "what is shown cannot be leased: no thread");
        }
    }
}
