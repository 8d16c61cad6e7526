//! What becomes of bytes as they come from the store.
//!
//! A request brings what somebody waits for and what is around it. The one is unpacked at once. The other is kept as it is
//! stored, and unpacked by threads that give way, or, before they get to it, by whoever wants it: at the start of an
//! interpreter every processor has something to do that is awaited.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::Entry;
use super::fetch::{Arrived, Receives, unpack};
use super::state::Work;
use super::units::Known;
use super::{Inner, lock};
use crate::error::Kind;
use crate::store::StoredChunks;

/// Bytes that are kept as they are stored at most; what comes then is unpacked at once.
pub(super) const PACKED_MAX: u64 = 64 << 20;

/// Counts the bytes that are kept as they are stored.
#[derive(Debug, Default)]
pub(super) struct PackedBytes(AtomicU64);

impl PackedBytes {
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn fit(&self, bytes: u64) -> bool {
        let more = |now: u64| Some(now + bytes).filter(|now| *now <= PACKED_MAX);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

/// Chunks as they are stored, counted as long as there are any.
struct Left {
    stored: StoredChunks,
    inner: Arc<Inner>,
}

impl Drop for Left {
    fn drop(&mut self) {
        self.inner.packed.0.fetch_sub(self.stored.length(), Ordering::Relaxed);
    }
}

/// Units on their way; whatever becomes of them, nobody waits for ever.
pub(super) struct Landing {
    pub(super) entry: Arc<Entry>,
    units: Vec<usize>,
}

impl Landing {
    pub(super) fn of(entry: &Arc<Entry>, units: Range<usize>) -> Landing {
        Landing { entry: entry.clone(), units: units.collect() }
    }

    /// Only `units` of them are.
    pub(super) fn reduce(&mut self, units: Range<usize>) {
        self.units = units.collect();
    }

    /// Unit `at` has come, or not.
    fn has(&mut self, at: usize) {
        self.units.retain(|unit| *unit != at);
    }

    /// Unit `at` comes by another way.
    fn part(&mut self, at: usize) -> Landing {
        self.has(at);
        Landing::of(&self.entry, at..at + 1)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.units.is_empty() {
            let (room, digest) = self.entry.key();
            let what = format!("{}/{digest}: a question to the store broke off", room.name());
            self.entry.fail(std::mem::take(&mut self.units), Kind::Failed, &what);
        }
    }
}

/// Takes what comes to where it was asked for.
pub(super) struct Arrival<'a> {
    inner: &'a Arc<Inner>,
    known: &'a Arc<Known>,
    /// What somebody waited for when it was asked.
    wanted: Range<usize>,
    landing: Landing,
    /// Somebody waited for some of it: what else comes is not to keep him waiting.
    urgent: Cell<bool>,
}

impl<'a> Arrival<'a> {
    pub(super) fn new(
        inner: &'a Arc<Inner>,
        known: &'a Arc<Known>,
        wanted: Range<usize>,
        landing: Landing,
    ) -> Arrival<'a> {
        Arrival { inner, known, wanted, landing, urgent: Cell::new(false) }
    }
}

impl Receives for Arrival<'_> {
    fn awaited(&self, left: &[usize]) -> Option<usize> {
        let state = lock(&self.landing.entry.state);
        let awaited = left.iter().position(|at| self.wanted.contains(at) || state.expected.contains_key(at));
        self.urgent.set(self.urgent.get() || awaited.is_some());
        awaited
    }

    fn take(&mut self, arrived: Arrived) {
        let entry = &self.landing.entry;
        match arrived {
            Arrived::Part => lock(&entry.state).note_moved(0),
            Arrived::Unit(at, bytes) => {
                let ahead = !self.wanted.contains(&at);
                self.inner.counters.ahead.fetch_add(u64::from(ahead), Ordering::Relaxed);
                entry.take(self.inner, self.known, at, bytes, ahead);
                self.landing.has(at);
            }
            Arrived::Failed(at, error) => {
                entry.fail([at], error.kind(), &error.chain());
                self.landing.has(at);
            }
        }
    }

    fn leave(&mut self, stored: StoredChunks, units: &[usize]) -> Option<StoredChunks> {
        if !self.urgent.get() || !self.inner.packed.fit(stored.length()) {
            return Some(stored);
        }
        let left = Arc::new(Left { stored, inner: self.inner.clone() });
        for at in units.iter().copied() {
            let (landing, left, known) = (self.landing.part(at), left.clone(), self.known.clone());
            let entry = landing.entry.clone();
            entry.queue(at..at + 1, Work::Unpack(Box::new(move || unpack_left(&left, &known, landing, at))));
        }
        None
    }
}

/// Unpacks unit `at` of what was left; if that fails, it is fetched again.
fn unpack_left(left: &Arc<Left>, known: &Arc<Known>, landing: Landing, at: usize) {
    let mut arrival = Arrival::new(&left.inner, known, 0..0, landing);
    match unpack(known, &left.stored, at, &left.inner.counters) {
        Ok(bytes) => arrival.take(Arrived::Unit(at, bytes)),
        Err(wrong) => {
            let (inner, known) = (left.inner.clone(), known.clone());
            let Arrival { landing, .. } = arrival;
            let entry = landing.entry.clone();
            let again = move || {
                let mut arrival = Arrival::new(&inner, &known, 0..0, landing);
                inner.source.fetch(&known, at..at + 1, Some(wrong), &inner.counters, &mut arrival);
            };
            entry.queue(at..at + 1, Work::Fetch(Box::new(again)));
        }
    }
}
