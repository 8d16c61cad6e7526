//! What the end of a worker means, and when another is started. No clocks and no processes here.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::Signal;

/// A worker that has served for so long is none of a series of failures.
const STABLE: Duration = Duration::from_secs(10);
/// The pause before the second restart of a series; each is twice as long as the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// Somebody has killed it (SIGKILL), and it was not the kernel for want of memory: that says nothing about it.
    Ordered,
    /// It was stuck, and the watchdog has ended it.
    Hung,
    /// The kernel has killed it for want of memory.
    OutOfMemory,
    /// By a signal: a panic aborts.
    Signal(i32),
    /// By itself.
    Exit(i32),
    /// It was not able to begin.
    Unable,
}

impl Death {
    /// Of a process that the watchdog has left alone. `memory`: the kernel has killed some process for want of memory
    /// meanwhile.
    pub(super) fn of(status: ExitStatus, memory: bool) -> Death {
        match status.signal() {
            Some(libc::SIGKILL) if memory => Death::OutOfMemory,
            Some(libc::SIGKILL) => Death::Ordered,
            Some(signal) => Death::Signal(signal),
            None => Death::Exit(status.code().unwrap_or(-1)),
        }
    }

    /// True when a request may be the cause.
    pub(super) fn is_suspect(self) -> bool {
        !matches!(self, Death::Ordered | Death::Unable)
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Death::Ordered => f.write_str("killed by somebody (SIGKILL)"),
            Death::Hung => f.write_str("it did not answer, and was killed"),
            Death::OutOfMemory => f.write_str("killed for want of memory"),
            Death::Signal(signal) => match Signal::try_from(*signal) {
                Ok(signal) => write!(f, "ended by {signal}"),
                Err(_) => write!(f, "ended by signal {signal}"),
            },
            Death::Exit(code) => write!(f, "ended with exit code {code}"),
            Death::Unable => f.write_str("not able to begin"),
        }
    }
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Start another, after so long.
    Again(Duration),
    /// Give up.
    GiveUp,
}

/// When to start another worker, and when to give up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// So many failures in a row are followed by another start; none for ever so many.
    limit: Option<u32>,
    failures: u32,
}

impl Policy {
    pub(super) fn new(limit: Option<u32>) -> Self {
        Policy { limit, failures: 0 }
    }

    /// Failures in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Takes into account that a worker ended, which had served for `served`.
    pub(super) fn after(&mut self, death: Death, served: Duration) -> Next {
        if served >= STABLE {
            self.failures = 0;
        }
        if death == Death::Ordered {
            return Next::Again(Duration::ZERO);
        }
        self.failures = self.failures.saturating_add(1);
        if self.limit.is_some_and(|limit| self.failures > limit) {
            return Next::GiveUp;
        }
        // The first is replaced at once: whoever waits for an answer should not wait longer.
        let doubled = self.failures.checked_sub(2).map(|n| FIRST_PAUSE.saturating_mul(1 << n.min(16)));
        Next::Again(doubled.unwrap_or(Duration::ZERO).min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_slow_down_and_end_unless_a_worker_has_served_well() {
        let mut policy = Policy::new(Some(8));
        let short = Duration::from_secs(1);
        let crash = Death::Signal(libc::SIGABRT);
        let pauses: Vec<_> = (0..9).map(|_| policy.after(crash, short)).collect();
        let millis = [0, 100, 200, 400, 800, 1600, 3200, 6400].map(|n| Next::Again(Duration::from_millis(n)));
        assert_eq!(pauses[..8], millis);
        assert_eq!((pauses[8], policy.failures()), (Next::GiveUp, 9));
        assert_eq!(policy.after(crash, STABLE), Next::Again(Duration::ZERO));
        let mut policy = Policy::new(None);
        assert!((0..1000).all(|_| policy.after(Death::Unable, short) != Next::GiveUp));
        let mut policy = Policy::new(Some(1));
        assert!((0..1000).all(|_| policy.after(Death::Ordered, short) == Next::Again(Duration::ZERO)));
    }

    #[test]
    fn who_killed_a_worker_is_told_apart() {
        let by = ExitStatus::from_raw;
        let table = [
            (Death::of(by(libc::SIGKILL), false), Death::Ordered, false),
            (Death::of(by(libc::SIGKILL), true), Death::OutOfMemory, true),
            (Death::Hung, Death::Hung, true),
            (Death::of(by(libc::SIGABRT), false), Death::Signal(libc::SIGABRT), true),
            (Death::of(by(3 << 8), true), Death::Exit(3), true),
        ];
        for (found, expected, suspect) in table {
            assert_eq!((found, found.is_suspect()), (expected, suspect));
        }
        assert_eq!(Death::Signal(libc::SIGSEGV).to_string(), "ended by SIGSEGV");
    }
}
