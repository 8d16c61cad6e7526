//! Questions to the store that are under way, each once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Mode, asks, in_mode, may_wait, pool, timed_out, would_wait};
use crate::error::{Error, Kind, Result};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When a question last went on.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    /// Nanoseconds after that.
    last: AtomicU64,
}

impl Progress {
    fn new() -> Arc<Self> {
        Arc::new(Progress { begun: Instant::now(), last: AtomicU64::new(0) })
    }

    pub(super) fn note(&self) {
        let since = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.fetch_max(since, Ordering::Relaxed);
    }

    fn last(&self) -> Instant {
        self.begun + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }
}

/// A question that is being asked, or queues for it.
#[derive(Debug)]
pub(super) struct Flight<T> {
    progress: Arc<Progress>,
    state: Mutex<State<T>>,
    ended: Condvar,
}

#[derive(Debug)]
struct State<T> {
    answer: Option<Result<T>>,
    waiting: usize,
    started: bool,
    /// Nobody waits any more and it has not been started: it will not be.
    given_up: bool,
    /// Somebody has waited too long.
    late: bool,
}

/// Sees to it that whoever waits hears of the end, also of one by a panic.
struct Landing<T, E: FnOnce()> {
    flight: Arc<Flight<T>>,
    after: Option<E>,
}

impl<T, E: FnOnce()> Landing<T, E> {
    /// False when nobody wants to know any more.
    fn start(&self) -> bool {
        let mut state = lock(&self.flight.state);
        state.started = !state.given_up;
        let started = state.started;
        drop(state);
        // It may have queued for long.
        self.flight.progress.note();
        started
    }
}

impl<T, E: FnOnce()> Drop for Landing<T, E> {
    fn drop(&mut self) {
        // First, so that nobody who asks after the end is given an answer from before.
        if let Some(after) = self.after.take() {
            after();
        }
        let mut state = lock(&self.flight.state);
        let broken = || Err(Error::new(Kind::Failed, "a question to the store broke off"));
        state.answer.get_or_insert_with(broken);
        drop(state);
        self.flight.ended.notify_all();
    }
}

impl<T: Send + 'static> Flight<T> {
    /// Has `what` asked, on behalf of one who waits; then `after` is called.
    pub(super) fn begin(
        what: impl FnOnce() -> Result<T> + Send + 'static,
        after: impl FnOnce() + Send + 'static,
    ) -> Result<Arc<Self>> {
        let flight = Flight::new();
        flight.take_off(what, after)?;
        Ok(flight)
    }

    fn new() -> Arc<Self> {
        let state = State { answer: None, waiting: 1, started: false, given_up: false, late: false };
        Arc::new(Flight { progress: Progress::new(), state: Mutex::new(state), ended: Condvar::new() })
    }

    fn take_off(
        self: &Arc<Self>,
        what: impl FnOnce() -> Result<T> + Send + 'static,
        after: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let landing = Landing { flight: self.clone(), after: Some(after) };
        pool::NAMES.ask(move || {
            if landing.start() {
                let answer = in_mode(Mode::Asks(landing.flight.progress.clone()), what);
                lock(&landing.flight.state).answer = Some(answer);
            }
        })
    }

    /// Waits for the answer until `limit` has gone by without anything new, and gives it by `take`.
    fn wait(&self, limit: Duration, take: impl FnOnce(&mut Option<Result<T>>) -> Option<Result<T>>) -> Result<T> {
        let joined = Instant::now();
        let mut state = lock(&self.state);
        loop {
            if state.answer.is_some() {
                state.waiting -= 1;
                return take(&mut state.answer).unwrap_or_else(|| Err(timed_out(limit)));
            }
            let left = limit.saturating_sub(self.progress.last().max(joined).elapsed());
            if left.is_zero() {
                state.waiting -= 1;
                state.late = true;
                state.given_up = state.waiting == 0 && !state.started;
                return Err(timed_out(limit));
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The answer, for the only one who waits.
    pub(super) fn end(&self, limit: Duration) -> Result<T> {
        self.wait(limit, Option::take)
    }
}

/// An answer of [`Flights::ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered<T> {
    /// What the store said.
    pub answer: T,
    /// False when the question was under way already, so that the answer may be from before it was asked here.
    pub anew: bool,
}

/// Questions to the store by key, each under way at most once.
#[derive(Debug)]
pub struct Flights<K, T> {
    under_way: Arc<Mutex<HashMap<K, Arc<Flight<T>>>>>,
}

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Flights { under_way: Arc::default() }
    }
}

impl<K: Clone + Eq + Hash + Send + 'static, T: Clone + Send + 'static> Flights<K, T> {
    /// Asks the store by `what`, or waits with others who did; see [`within`](super::within). An answer that comes too
    /// late is unheard, but `what` may keep it where it is looked for next.
    ///
    /// # Errors
    /// As of [`within`](super::within). What several wait for fails with the same words for each.
    pub fn ask(
        &self,
        key: &K,
        limit: Duration,
        what: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<Answered<T>> {
        if asks() {
            return what().map(|answer| Answered { answer, anew: true });
        }
        if !may_wait() {
            return Err(would_wait());
        }
        let (flight, anew) = self.join(key, what)?;
        let answer = flight.wait(limit, |answer| match answer {
            Some(Ok(answer)) => Some(Ok(answer.clone())),
            Some(Err(error)) => Some(Err(error.again())),
            None => None,
        });
        if answer.as_ref().is_err_and(|error| error.kind() == Kind::TimedOut) {
            // One that was given up before it was started makes room.
            let mut under_way = lock(&self.under_way);
            let same = under_way.get(key).is_some_and(|other| Arc::ptr_eq(other, &flight));
            if same && lock(&flight.state).given_up {
                under_way.remove(key);
            }
        }
        answer.map(|answer| Answered { answer, anew })
    }

    /// Has `what` asked, unless that is under way, and does not wait for it. True when it was not.
    pub fn begin(&self, key: &K, what: impl FnOnce() -> Result<T> + Send + 'static) -> bool {
        // Whoever does not come back never gives it up.
        self.join(key, what).is_ok_and(|(_, anew)| anew)
    }

    fn join(&self, key: &K, what: impl FnOnce() -> Result<T> + Send + 'static) -> Result<(Arc<Flight<T>>, bool)> {
        let mut under_way = lock(&self.under_way);
        if let Some(flight) = under_way.get(key) {
            let mut state = lock(&flight.state);
            if !state.given_up {
                state.waiting += 1;
                drop(state);
                return Ok((flight.clone(), false));
            }
        }
        let flight = Flight::new();
        under_way.insert(key.clone(), flight.clone());
        drop(under_way);
        let (all, of, it) = (self.under_way.clone(), key.clone(), Arc::downgrade(&flight));
        let after = move || {
            let mut all = lock(&all);
            if all.get(&of).is_some_and(|other| std::ptr::eq(Arc::as_ptr(other), it.as_ptr())) {
                all.remove(&of);
            }
        };
        flight.take_off(what, after)?;
        Ok((flight, true))
    }

    /// True when `key` has been asked for so long that somebody gave up waiting.
    pub fn is_late(&self, key: &K) -> bool {
        let flight = lock(&self.under_way).get(key).cloned();
        flight.is_some_and(|flight| lock(&flight.state).late)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_hangs_is_asked_once_however_many_want_to_know() {
        let flights: Flights<u8, u32> = Flights::default();
        let asked = Arc::new(AtomicUsize::new(0));
        let (answer, wait) = mpsc::channel();
        let wait = Arc::new(Mutex::new(wait));
        let ask = |limit| {
            let (asked, wait) = (asked.clone(), wait.clone());
            flights.ask(&1, limit, move || {
                asked.fetch_add(1, Ordering::Relaxed);
                let wait = wait.lock().unwrap();
                wait.recv().map_err(|_| Error::new(Kind::Corrupt, "it ended").hint("do something"))
            })
        };
        for _ in 0..3 {
            assert_eq!(ask(SHORT).unwrap_err().kind(), Kind::TimedOut);
            assert!(flights.is_late(&1));
        }
        // Another thing is not affected.
        assert_eq!(flights.ask(&2, LONG, || Ok(2)).unwrap(), Answered { answer: 2, anew: true });
        assert!(!flights.is_late(&2));
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| ask(LONG))).collect();
            while lock(&lock(&flights.under_way)[&1].state).waiting < 3 {
                std::thread::yield_now();
            }
            answer.send(7).unwrap();
            for thread in waiting {
                assert_eq!(thread.join().unwrap().unwrap(), Answered { answer: 7, anew: false });
            }
        });
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // Then it is asked again, and an error is told to all who wait.
        drop(answer);
        let error = ask(LONG).unwrap_err();
        assert_eq!((error.kind(), error.hint_text()), (Kind::Corrupt, Some("do something")));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
        assert!(lock(&flights.under_way).is_empty());
    }

    #[test]
    fn what_is_begun_goes_on_without_anybody_who_waits() {
        let flights: Flights<(), ()> = Flights::default();
        let (tell, told) = mpsc::channel();
        assert!(flights.begin(&(), move || tell.send(()).map_err(|_| would_wait())));
        assert_eq!(told.recv_timeout(LONG), Ok(()));
    }
}
