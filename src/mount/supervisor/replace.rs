//! Another worker in the place of one that serves.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::privilege::Favours;
use super::process::{Program, Worker};
use super::wire::{ToWorker, wait_for};
use super::{Number, Supervisor};
use crate::error::Result;
use crate::sys;

/// How long a worker may take to finish what it has read.
const DRAINS: Duration = Duration::from_secs(60);
/// How long to wait for a question that only wakes a thread.
const WAKES: Duration = Duration::from_secs(2);

impl Supervisor {
    /// Has `program` serve instead of what serves now.
    ///
    /// # Errors
    /// What keeps it from serving; then everything is as before.
    pub(super) fn replace(&mut self, program: Program) -> Result<()> {
        let program = Arc::new(program);
        let mut new = self.prepare(program.clone(), true)?;
        // What it cannot have beside the other.
        let let_go = self.worker.as_ref().is_some_and(Worker::let_go);
        if let Err(error) = new.begin().and_then(|()| self.agree(&mut new)) {
            new.kill();
            self.undo(let_go);
            return Err(error);
        }
        let old = self.worker.take();
        if self.mounted.as_ref().is_some_and(|mounted| mounted.resend) {
            old.into_iter().for_each(|old| self.end(old));
            self.give(new).inspect_err(|_| self.restart = Some(Instant::now()))?;
        } else {
            // For a moment both serve: what one has read, the other cannot answer.
            if let Err(error) = self.give(new) {
                self.worker = old;
                return Err(error);
            }
            old.into_iter().for_each(|old| self.drain(old));
        }
        tracing::info!("another worker serves");
        // One with privilege lets go by itself of what the one before it was helped to.
        self.favours = Favours::default();
        self.kept.add(Number::Replacements, 1);
        self.program = program;
        Ok(())
    }

    /// After another was not able to take over, and the worker that serves may have let go of its cache.
    fn undo(&mut self, let_go: bool) {
        // As good as new, and with its cache; where nothing is sent again, it serves on without one.
        if let_go && self.mounted.as_ref().is_some_and(|mounted| mounted.resend) {
            self.worker.take().into_iter().for_each(|old| self.end(old));
            self.restart = Some(Instant::now());
        }
    }

    /// Waits until `old` has answered what it has read, beside a new one that serves.
    fn drain(&mut self, mut old: Worker) {
        let end = Instant::now() + DRAINS;
        let _ = old.send(&ToWorker::Drain, &[]);
        while old.ended().is_none() && Instant::now() < end {
            // Its threads have waited longest for a request, so they get the next ones, and are woken by them.
            self.ask_something();
            let _ = wait_for(&[self.wakes.child.as_fd()], Some(Instant::now() + Duration::from_millis(5)));
        }
        if old.ended().is_none() {
            tracing::warn!(pid = old.pid(), "the old worker does not finish: what it is at fails");
            if old.kill().is_none() {
                self.lingering.push(old);
                return;
            }
        }
        self.clear_up(old.life, false);
    }

    /// Asks the mount something that needs no store.
    fn ask_something(&self) {
        let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
        let Ok(root) = nix::fcntl::open(&self.mount_point, flags, nix::sys::stat::Mode::empty()) else { return };
        let _ = sys::xattr_apart::<64>(&root, c"user.envfabric.ping", None, WAKES);
    }
}
