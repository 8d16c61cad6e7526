//! The work of a session's threads, followed: which request each is at, since when, and whether they are to go on.
//!
//! What is begun is written down where it outlives the process ([`super::kept`]). What a thread is at, and for how long,
//! is what the watchdog goes by. A worker that is to be replaced where the kernel sends nothing again lets its threads
//! finish what they have read, and then read no more.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::kept::{Begun, Kept, Number};

/// See the module.
#[derive(Debug)]
pub(super) struct Shift {
    kept: Arc<Kept>,
    /// Number of the worker; none for a mount that is served without a supervisor, which nobody goes on with.
    life: Option<u64>,
    since: Instant,
    /// When each thread began with what it is at, in milliseconds and one since the beginning; 0: it waits for a request.
    threads: Vec<AtomicU64>,
    /// One more than the place of the request of each; 0: none.
    places: Vec<AtomicUsize>,
    known: AtomicUsize,
    draining: AtomicBool,
    stopped: AtomicUsize,
    faults: Faults,
}

thread_local! {
    /// Which of its session's threads this is.
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
    /// The place of the request that this thread is at.
    static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Notes that what this thread is at ends the worker.
pub(super) fn blame_this_thread(kept: &Kept) {
    if let Some(place) = PLACE.get() {
        kept.requests().blame(place);
    }
}

/// As long as a thread of the session is at a request; it ends after everything else that the thread has to do with it.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Shift);

/// As long as a request is not answered.
#[derive(Debug)]
pub(super) struct Working(Option<(Arc<Kept>, usize)>);

impl Shift {
    pub(super) fn new(kept: Arc<Kept>, life: Option<u64>, threads: usize) -> Self {
        Shift {
            kept,
            life,
            since: Instant::now(),
            threads: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            places: (0..threads).map(|_| AtomicUsize::new(0)).collect(),
            known: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            stopped: AtomicUsize::new(0),
            faults: if life.is_some() { Faults::from_env() } else { Faults::default() },
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// The thread begins with a request.
    pub(super) fn turn(&self) -> Turn<'_> {
        let index = THREAD.get().unwrap_or_else(|| {
            let index = self.known.fetch_add(1, Ordering::Relaxed);
            THREAD.set(Some(index));
            index
        });
        if let Some(thread) = self.threads.get(index) {
            thread.store(self.now(), Ordering::Relaxed);
        }
        Turn(self)
    }

    /// Writes down that request `unique` is begun; none when it has ended too many workers and must be given up.
    pub(super) fn begin(&self, unique: u64, op: u8, ino: u64) -> Option<Working> {
        let Some(life) = self.life else { return Some(Working(None)) };
        match self.kept.requests().begin(unique, life, op, ino) {
            Begun::Followed(place) => {
                PLACE.set(place);
                if let Some(at) = THREAD.get().and_then(|index| self.places.get(index)) {
                    at.store(place.map_or(0, |place| place + 1), Ordering::Relaxed);
                }
                self.faults.delay(unique);
                Some(Working(place.map(|place| (self.kept.clone(), place))))
            }
            Begun::Poison => {
                self.kept.add(Number::Poisoned, 1);
                tracing::error!(inode = ino, "a request that ended several workers is answered with an error");
                None
            }
        }
    }

    /// What `of` makes of the numbers that are kept, where another worker would go on with the mount.
    pub(super) fn of_supervised<T>(&self, of: impl FnOnce(&dyn Fn(Number) -> u64) -> T) -> Option<T> {
        self.life.map(|_| of(&|number| self.kept.get(number)))
    }

    /// True when a test wants a worker that agrees with the kernel on something else.
    pub(super) fn disagrees(&self) -> bool {
        self.faults.disagree
    }

    /// What tests want to happen when `name` is looked up.
    pub(super) fn meet(&self, name: &[u8]) {
        if let Some(life) = self.life {
            self.faults.meet(name, life);
        }
    }

    /// True when a thread has been at one request for as long as `limit`, which is then held against that request.
    pub(super) fn is_stuck(&self, limit: Duration) -> bool {
        let (now, limit) = (self.now(), u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        let mut stuck = false;
        for (thread, place) in self.threads.iter().zip(&self.places) {
            let begun = thread.load(Ordering::Relaxed);
            if begun != 0 && now.saturating_sub(begun) >= limit {
                stuck = true;
                if let Some(place) = place.load(Ordering::Relaxed).checked_sub(1) {
                    self.kept.requests().blame(place);
                }
            }
        }
        stuck
    }

    /// Lets no thread read another request after the one that it is at or reads next.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// True when all threads have stopped and everything is answered.
    pub(super) fn is_drained(&self) -> bool {
        let working = self.life.map_or(0, |life| self.kept.requests().of(life));
        self.stopped.load(Ordering::SeqCst) >= self.threads.len() && working == 0
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        PLACE.set(None);
        if let Some(index) = THREAD.get() {
            self.0.places.get(index).into_iter().for_each(|place| place.store(0, Ordering::Relaxed));
            self.0.threads.get(index).into_iter().for_each(|thread| thread.store(0, Ordering::Relaxed));
        }
        if self.0.draining.load(Ordering::SeqCst) {
            self.0.stopped.fetch_add(1, Ordering::SeqCst);
            loop {
                std::thread::park();
            }
        }
    }
}

impl Working {
    /// Another thread goes on with the request.
    pub(super) fn here(&self) {
        PLACE.set(self.0.as_ref().map(|(_, place)| *place));
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        if let Some((kept, place)) = &self.0 {
            if PLACE.get() == Some(*place) {
                PLACE.set(None);
            }
            kept.requests().end(*place);
        }
    }
}

/// What tests make go wrong, in debug builds alone, by `ENVFABRIC_FAULTS`: a list of `delay=MILLISECONDS`, `panic=NAME`, `hang=NAME` `disagree=1`
/// and `hang-first=NAME` (in the first worker of a mount only).
#[derive(Debug, Default)]
struct Faults {
    delay: u64,
    panic: Option<String>,
    hang: Option<String>,
    hang_first: Option<String>,
    disagree: bool,
}

impl Faults {
    fn from_env() -> Faults {
        if !cfg!(debug_assertions) {
            return Faults::default();
        }
        let text = std::env::var("ENVFABRIC_FAULTS").unwrap_or_default();
        let value = |key: &str| {
            let mut parts = text.split(',').filter_map(|part| part.split_once('='));
            parts.find(|(name, _)| *name == key).map(|(_, value)| value.to_string())
        };
        let delay = value("delay").and_then(|delay| delay.parse().ok()).unwrap_or(0);
        Faults {
            delay,
            panic: value("panic"),
            hang: value("hang"),
            hang_first: value("hang-first"),
            disagree: value("disagree").is_some(),
        }
    }

    /// Takes a while, differently long from request to request.
    fn delay(&self, unique: u64) {
        if self.delay > 0 {
            let part = unique.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
            std::thread::sleep(Duration::from_micros((self.delay * 1000 * part) >> 16));
        }
    }

    #[allow(clippy::panic)]
    fn meet(&self, name: &[u8], life: u64) {
        let is = |wanted: &Option<String>| wanted.as_ref().is_some_and(|wanted| wanted.as_bytes() == name);
        if is(&self.panic) {
            panic!("a test wanted this");
        }
        while is(&self.hang) || (life == 1 && is(&self.hang_first)) {
            std::thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_are_to_stop_finish_what_they_are_at() {
        let shift = Arc::new(Shift::new(Arc::new(Kept::new().unwrap()), Some(1), 2));
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let wait = Arc::new(std::sync::Mutex::new(wait));
        for n in 1..=2 {
            let (shift, wait, tell) = (shift.clone(), wait.clone(), tell.clone());
            std::thread::spawn(move || {
                let (_turn, _working) = (shift.turn(), shift.begin(n * 2, 0, 0));
                tell.send(()).unwrap();
                let _ = wait.lock().unwrap().recv();
            });
        }
        told.iter().take(2).for_each(drop);
        shift.drain();
        assert!(!shift.is_drained());
        std::thread::sleep(Duration::from_millis(20));
        assert!(shift.is_stuck(Duration::from_millis(20)) && !shift.is_stuck(Duration::from_secs(3600)));
        drop(go_on);
        while !shift.is_drained() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!shift.is_stuck(Duration::ZERO));
    }
}
