//! Who may wait for the store, and for how long.
//!
//! A store on a NAS may answer late or never, and a system call that waits for it cannot be called off. So on a mount
//! of a distant store the work is divided among three sorts of threads:
//!
//! ```text
//! session threads   at_once(..)        never wait; what would have to gives would_wait(), and the request goes on to
//! waiters           Pool               threads that may wait, each for a limited time, in
//! store threads     within(limit, ..)  who alone make the calls that may hang, and are left alone when they do
//! ```
//!
//! Everywhere else (commands, mounts of a local store) nothing of this is in force: whoever needs the store asks it.
//! All threads are started when they are first needed and end when they are not; none keeps the process from exiting.
//!
//! Questions to a distant store that several may ask at once go through [`Flights`]: who asks for what is being asked
//! already waits for that answer. So a store that hangs costs one thread for each thing asked for, however often.

mod flights;
mod pool;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

pub use flights::{Answered, Flights};
pub(crate) use pool::{AHEAD, BYTES, UNPACK};
pub use pool::{Pool, THREADS_MAX};

use crate::error::{Error, Kind, Result};
use flights::{Flight, Progress};

/// How long a store may take for one answer before it counts as hanging.
pub const LIMIT: Duration = Duration::from_secs(2);

/// What the thread may do.
#[derive(Debug, Clone, Default)]
enum Mode {
    /// Wait.
    #[default]
    MayWait,
    /// Answer from memory or say that it would have to wait.
    AtOnce,
    /// Hang: it asks the store on behalf of somebody who waits for a limited time.
    Asks(Arc<Progress>),
}

thread_local! {
    static MODE: RefCell<Mode> = const { RefCell::new(Mode::MayWait) };
}

/// Puts the mode back, also when there is a panic.
struct Restore(Mode);

impl Drop for Restore {
    fn drop(&mut self) {
        MODE.set(std::mem::take(&mut self.0));
    }
}

fn in_mode<T>(mode: Mode, what: impl FnOnce() -> T) -> T {
    let _restore = Restore(MODE.replace(mode));
    what()
}

/// Runs `what` without letting it wait for the store.
pub fn at_once<T>(what: impl FnOnce() -> T) -> T {
    in_mode(Mode::AtOnce, what)
}

/// False when this thread must not wait for the store: whoever would have to gives [`would_wait`] instead.
pub fn may_wait() -> bool {
    MODE.with_borrow(|mode| !matches!(mode, Mode::AtOnce))
}

/// True on a thread that is there for asking the store, where [`within`] asks without another.
pub fn asks() -> bool {
    MODE.with_borrow(|mode| matches!(mode, Mode::Asks(_)))
}

/// What is answered when the store would have to be waited for and that is not allowed; never told to users.
pub fn would_wait() -> Error {
    Error::new(Kind::WouldWait, "the store would have to be waited for")
}

/// What whoever waits is told when the store has not answered within `limit`.
pub(crate) fn timed_out(limit: Duration) -> Error {
    Error::new(Kind::TimedOut, format!("the store has not answered for {} s", limit.as_secs_f64()))
        .hint("look at the NAS: is it up, and does the network reach it?")
}

/// Asks the store by `what` on a thread of its own, and waits for the answer as long as it goes on ([`progress`]): after
/// `limit` without any, it may end later, unheard.
///
/// # Errors
/// [`Kind::TimedOut`]; [`Kind::WouldWait`], and nothing was started, when this thread must not wait; those of `what`.
pub fn within<T: Send + 'static>(limit: Duration, what: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    if asks() {
        return what();
    }
    if !may_wait() {
        return Err(would_wait());
    }
    Flight::begin(what, || ())?.end(limit)
}

/// Says that the store has answered a part of what the thread asks it for: who waits has patience again.
pub fn progress() {
    MODE.with_borrow(|mode| {
        if let Mode::Asks(progress) = mode {
            progress.note();
        }
    });
}

/// What this thread may do, to be handed on to threads that work for it.
#[derive(Debug, Clone)]
pub struct Leave(Mode);

impl Leave {
    /// This thread's.
    pub fn of_this_thread() -> Self {
        Leave(MODE.with_borrow(Mode::clone))
    }

    /// Runs `what` in the same way.
    pub fn run<T>(&self, what: impl FnOnce() -> T) -> T {
        in_mode(self.0.clone(), what)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_must_not_wait_starts_nothing_and_says_so() {
        let (tell, told) = mpsc::channel();
        let asked = at_once(|| within(LONG, move || tell.send(()).map_err(|_| would_wait())));
        assert_eq!(asked.unwrap_err().kind(), Kind::WouldWait);
        assert!(told.recv().is_err(), "nobody was asked");
        assert!(may_wait());
        let _ = std::panic::catch_unwind(|| at_once(|| panic!("on purpose")));
        assert!(may_wait(), "the mode is left by a panic, too");
        assert!(within(LONG, || Ok(asks() && may_wait() && within(LONG, || Ok(3))? == 3)).unwrap());
        assert!(!asks());
    }

    #[test]
    fn who_waits_for_a_store_that_hangs_is_free_after_the_limit() {
        let (go_on, wait) = mpsc::channel::<()>();
        let begun = Instant::now();
        let hangs = within(SHORT, move || Ok(wait.recv().is_ok()));
        let error = hangs.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (Kind::TimedOut, libc::EIO));
        assert_eq!(error.to_string(), "the store has not answered for 0.05 s");
        assert!(begun.elapsed() < LONG / 2);
        drop(go_on);
    }

    #[test]
    fn a_question_of_many_parts_has_its_time_for_each_of_them() {
        let answer = within(SHORT * 10, || {
            let leave = Leave::of_this_thread();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..20 {
                        std::thread::sleep(SHORT);
                        leave.run(progress);
                    }
                });
            });
            Ok(5)
        });
        assert_eq!(answer.unwrap(), 5);
    }

    #[test]
    fn what_breaks_off_is_an_error_and_not_waited_for() {
        let begun = Instant::now();
        let broken: Result<()> = within(LONG, || panic!("on purpose"));
        assert_eq!(broken.unwrap_err().kind(), Kind::Failed);
        assert!(begun.elapsed() < LONG / 2);
    }
}
