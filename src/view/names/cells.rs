//! Answers of the store that are kept, and whether it answers at all.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{FRESH, Time};
use crate::error::{Error, Kind, Result};
use crate::patience::Flights;

/// An answer with the modification time of the directory that shows it.
#[derive(Debug, Clone)]
pub(in crate::view) struct Known<T> {
    pub(in crate::view) value: Arc<T>,
    pub(in crate::view) mtime: Time,
}

#[derive(Debug)]
struct Cell<T> {
    value: Arc<T>,
    mtime: Time,
    /// When it was last seen to be so.
    read: Instant,
    /// When it was last read as a whole.
    whole: Instant,
    /// When that reading began.
    begun: Instant,
    /// None while nobody but the refresher wanted to know.
    asked: Option<Instant>,
    /// The last reading failed.
    failing: bool,
}

impl<T: PartialEq> Cell<T> {
    fn new(value: T, mtime: Time, begun: Instant, ask: bool) -> Self {
        let now = Instant::now();
        let asked = ask.then_some(now);
        Cell { value: Arc::new(value), mtime, read: now, whole: now, begun, asked, failing: false }
    }

    fn known(&self) -> Known<T> {
        Known { value: self.value.clone(), mtime: self.mtime }
    }

    /// Takes over what a reading that began at `begun` has brought.
    fn settle(&mut self, begun: Instant, answer: Result<Option<T>>, outage: &Outage, changed: impl FnOnce()) {
        if begun < self.begun {
            return; // it took longer than one that began later
        }
        self.begun = begun;
        match answer {
            // A directory that is not there (any more) says nothing about the store.
            Ok(None) => {}
            Ok(Some(value)) => {
                if value != *self.value {
                    self.value = Arc::new(value);
                    self.mtime = later_than(self.mtime);
                    changed();
                }
                if outage.ends(self.failing) {
                    tracing::warn!("the store answers again");
                }
                self.failing = false;
            }
            Err(error) => {
                outage.feel(self.failing, &error);
                self.failing = true;
            }
        }
        (self.read, self.whole) = (Instant::now(), Instant::now());
    }
}

/// Whether the store answers, so that an outage is told once and not several times a second, and so that a distant store
/// that hangs is not asked again by everybody.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// Something that could be read before cannot be read now.
    on: AtomicBool,
    /// It is more than one document that cannot be read.
    whole: AtomicBool,
}

impl Outage {
    /// A reading failed; true when that is to be told: the first failure of all.
    fn begins(&self, was_failing: bool) -> bool {
        // What goes on failing while the rest is read (one damaged document) is no outage.
        !was_failing && !self.on.swap(true, Ordering::Relaxed)
    }

    /// A reading succeeded; true when that ends what was told.
    fn ends(&self, was_failing: bool) -> bool {
        // Looked at before it is written, because mostly there is none.
        self.on.load(Ordering::Relaxed)
            && self.on.swap(false, Ordering::Relaxed)
            && (self.whole.swap(false, Ordering::Relaxed) || was_failing)
    }

    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Takes a failure into account, and tells it where it is the first.
    pub(super) fn feel(&self, was_failing: bool, error: &Error) {
        // The store does answer, and what it says is not believed.
        if error.kind() == Kind::Rejected {
            if !was_failing {
                tracing::error!("{}; what was known last is shown", error.chain());
            }
            return;
        }
        if self.begins(was_failing) {
            self.whole.store(error.kind() == Kind::TimedOut, Ordering::Relaxed);
            let error = error.chain();
            tracing::warn!(error, "the store does not answer; the names known last are shown");
        }
    }

    /// Takes into account whether the store as such was there when it was looked for.
    pub(super) fn probed(&self, found: &Result<()>) {
        match found {
            Ok(()) if self.ends(false) => tracing::warn!("the store answers again"),
            Ok(()) => {}
            Err(_) => self.whole.store(true, Ordering::Relaxed),
        }
    }
}

/// How old an answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::view) enum Age {
    /// [`FRESH`].
    Fresh,
    /// Any; [`super::Names::refresh`] sees to it that it does not grow old.
    Any,
    /// None at all: before a name is said not to be there, the store is asked.
    Now,
}

impl Age {
    /// True where an answer that was read at `read` will do.
    fn admits(self, read: Instant) -> bool {
        match self {
            Age::Any => true,
            Age::Fresh => read.elapsed() < FRESH,
            Age::Now => false,
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn time_now() -> Time {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_secs() as i64, now.subsec_nanos())
}

/// The time now, or the smallest step behind `before` where the clock stands still or went back.
fn later_than(before: Time) -> Time {
    let next = if before.1 < 999_999_999 { (before.0, before.1 + 1) } else { (before.0 + 1, 0) };
    time_now().max(next)
}

/// Answers by key.
///
/// Of a local store, a cell's own lock is held while the store is read ([`Cells::get`]), so that only those wait who ask
/// for the same. Of a distant one no lock is held meanwhile; there `flights` sees to it that each key is read once.
#[derive(Debug)]
pub(super) struct Cells<K, T> {
    map: Mutex<HashMap<K, Arc<Mutex<Cell<T>>>>>,
    /// The first modification time of all directories, where some are shown before they are read.
    since: Option<Time>,
    /// Readings of a distant store.
    pub(super) flights: Flights<K, Option<Known<T>>>,
}

impl<K: Clone + Eq + Hash, T: PartialEq> Cells<K, T> {
    pub(super) fn new(since: Option<Time>) -> Self {
        Cells { map: Mutex::default(), since, flights: Flights::default() }
    }

    fn cell(&self, key: &K) -> Option<Arc<Mutex<Cell<T>>>> {
        lock(&self.map).get(key).cloned()
    }

    /// True when something is known of `key`.
    pub(super) fn has(&self, key: &K) -> bool {
        lock(&self.map).contains_key(key)
    }

    /// What is known of `key`, and whether that is as new as `age` wants. `ask` as in [`Cells::get`].
    pub(super) fn look(&self, key: &K, age: Age, ask: bool) -> Option<(Known<T>, bool)> {
        let cell = self.cell(key)?;
        let mut cell = lock(&cell);
        if ask {
            cell.asked = Some(Instant::now());
        }
        Some((cell.known(), age.admits(cell.read)))
    }

    /// The answer for `key`, where it was read as a whole within `age` and `holds`, which may ask the store, says that it
    /// is the same now.
    pub(super) fn confirm(&self, key: &K, age: Duration, holds: impl FnOnce(&T) -> bool) -> Option<Known<T>> {
        let cell = self.cell(key)?;
        let (known, whole) = {
            let cell = lock(&cell);
            (cell.known(), cell.whole)
        };
        if whole.elapsed() >= age || !holds(&known.value) {
            return None;
        }
        let mut cell = lock(&cell);
        // Unless it was read anew meanwhile, and is newer for that.
        if Arc::ptr_eq(&cell.value, &known.value) {
            cell.read = Instant::now();
        }
        Some(cell.known())
    }

    pub(super) fn keys_asked_since(&self, since: Instant) -> Vec<K> {
        let map = lock(&self.map);
        let asked = |cell: &Arc<Mutex<Cell<T>>>| cell.try_lock().is_ok_and(|c| c.asked >= Some(since));
        map.iter().filter(|(_, cell)| asked(cell)).map(|(key, _)| key.clone()).collect()
    }

    /// The answer for `key`. `read` asks the store; its none means that there is no such thing, and is not kept.
    /// `ask` is false when nobody but the refresher wants to know.
    pub(super) fn get(
        &self,
        key: &K,
        age: Age,
        ask: bool,
        outage: &Outage,
        read: impl FnOnce(Option<&T>) -> Result<Option<T>>,
        changed: impl FnOnce(),
    ) -> Result<Option<Known<T>>> {
        let Some(cell) = self.cell(key) else {
            let begun = Instant::now();
            return self.keep(key, begun, ask, read(None), outage, changed);
        };
        let mut cell = lock(&cell);
        if ask {
            cell.asked = Some(Instant::now());
        }
        if !age.admits(cell.read) {
            let begun = Instant::now();
            let answer = read(Some(&cell.value));
            cell.settle(begun, answer, outage, changed);
        }
        Ok(Some(cell.known()))
    }

    /// Keeps what a reading that began at `begun` has brought, and gives what is known after it. `ask` as in [`Cells::get`].
    pub(super) fn keep(
        &self,
        key: &K,
        begun: Instant,
        ask: bool,
        answer: Result<Option<T>>,
        outage: &Outage,
        changed: impl FnOnce(),
    ) -> Result<Option<Known<T>>> {
        let (cell, answer) = match self.cell(key) {
            Some(cell) => (cell, answer),
            None => {
                let Some(value) = answer? else { return Ok(None) };
                let mut map = lock(&self.map);
                match map.get(key) {
                    // Somebody else was first, and has told a time.
                    Some(cell) => (cell.clone(), Ok(Some(value))),
                    None => {
                        let cell = Cell::new(value, self.since.unwrap_or_else(time_now), begun, ask);
                        let known = cell.known();
                        map.insert(key.clone(), Arc::new(Mutex::new(cell)));
                        return Ok(Some(known));
                    }
                }
            }
        };
        let mut cell = lock(&cell);
        cell.settle(begun, answer, outage, changed);
        Ok(Some(cell.known()))
    }

    /// Notes that the store has not answered for `key`.
    pub(super) fn fails(&self, key: &K) {
        if let Some(cell) = self.cell(key) {
            lock(&cell).failing = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modification_times_grow_strictly_even_when_the_clock_does_not() {
        let far = (i64::MAX - 10, 999_999_999);
        assert_eq!(later_than(far), (i64::MAX - 9, 0));
        assert_eq!(later_than((i64::MAX - 10, 5)), (i64::MAX - 10, 6));
        assert!(later_than((5, 5)) > (1_000_000_000, 0));
    }

    #[test]
    fn an_answer_stays_when_the_store_does_not_answer() {
        let cells: Cells<u8, u32> = Cells::new(None);
        let outage = Outage::default();
        let get = |answer: Result<Option<u32>>| {
            let mut changed = false;
            let stale = Instant::now().checked_sub(FRESH * 2).unwrap();
            if let Some(cell) = lock(&cells.map).get(&1) {
                lock(cell).read = stale;
            }
            let known = cells.get(&1, Age::Fresh, true, &outage, |_| answer, || changed = true);
            (known.ok().flatten().map(|k| (*k.value, k.mtime)), changed)
        };
        let failed = || Err(Error::new(Kind::Os(libc::EIO), "no"));
        assert_eq!(get(failed()), (None, false));
        assert_eq!(get(Ok(None)), (None, false));
        let (first, _) = get(Ok(Some(1)));
        assert_eq!(get(failed()), (first, false));
        assert_eq!(get(Ok(Some(1))), (first, false));
        let (second, changed) = get(Ok(Some(2)));
        assert!(changed && second.unwrap().1 > first.unwrap().1);
        assert_eq!(
            cells.get(&1, Age::Fresh, true, &outage, |_| panic!("it is fresh"), || ()).unwrap().unwrap().value,
            2.into()
        );
    }

    #[test]
    fn an_outage_is_told_once_and_so_is_its_end() {
        let outage = Outage::default();
        // Two names, each asked many times; then the store is back; then the same once more.
        for _ in 0..2 {
            let told = (0..10).map(|i| (outage.begins(i > 0), outage.begins(i > 0))).filter(|t| *t != (false, false));
            assert_eq!(told.collect::<Vec<_>>(), [(true, false)]);
            assert_eq!([outage.ends(true), outage.ends(true), outage.ends(false)], [true, false, false]);
        }
        // One name that always fails among others that do not.
        let told = (0..10).map(|i| (outage.begins(i > 0), outage.ends(false))).filter(|(begins, _)| *begins);
        assert_eq!(told.count(), 1);
    }
}
