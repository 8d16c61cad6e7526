//! The watchdog: a worker that does not say that it serves is ended, so that another can.

use std::time::{Duration, Instant};

use super::Supervisor;
use super::policy::Death;
use super::process::{self, Worker};
use super::wire::ToWorker;
use crate::error::Result;

/// Questions in the time after which a worker counts as stuck.
const QUESTIONS: u32 = 4;
/// Whoever looks so much later than wanted did not run either: the machine was stopped, and says nothing of the worker.
const LATE: Duration = Duration::from_secs(1);

impl Supervisor {
    /// When to look at `worker` next.
    pub(super) fn next_look(&self, worker: &Worker) -> Instant {
        match worker.watch.asked {
            Some(asked) => asked + self.watchdog,
            None => worker.watch.heard.unwrap_or(worker.since) + self.watchdog / QUESTIONS,
        }
    }

    /// Asks the worker, or ends it.
    pub(super) fn watch(&mut self) -> Result<()> {
        let now = Instant::now();
        let Some(due) = self.worker.as_ref().map(|worker| self.next_look(worker)) else { return Ok(()) };
        let limit = self.watchdog;
        let Some(worker) = self.worker.as_mut().filter(|_| due <= now) else { return Ok(()) };
        match worker.watch.asked {
            Some(_) if now > due + LATE => worker.watch.asked = Some(now),
            Some(asked) => {
                tracing::error!(
                    pid = worker.pid(),
                    "the worker has not answered for {:.0} s and is killed",
                    (now - asked).as_secs_f64()
                );
                process::log_stacks(worker.pid());
                let gone = worker.kill().is_some();
                self.died(Death::Hung, gone)?;
            }
            None => {
                worker.watch.number += 1;
                worker.watch.asked = Some(now);
                let stuck = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                // One that is gone is seen to be by its end.
                let _ = worker.send(&ToWorker::Ping { number: worker.watch.number, stuck }, &[]);
            }
        }
        Ok(())
    }
}
