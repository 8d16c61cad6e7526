//! Bytes from the store, compared with their digests.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::counters::Counters;
use super::units::{Known, Units};
use super::{Key, lock};
use crate::error::{Error, Kind, Result};
use crate::store::{Object, ObjectFile, Store};

/// Objects of the store that are kept open: to open one takes several requests.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// How long to wait before a request is made again. A server that has just been started, or a handle that is stale
/// because of that, is worth some patience; a disk that is broken is not.
const PAUSES: [Duration; 3] = [Duration::from_millis(5), Duration::from_millis(100), Duration::from_millis(400)];
/// Wrong bytes are either right when they are read again, or stay wrong: so many pauses are for them.
const PAUSES_IF_WRONG: usize = 2;

/// Chunks that are asked for in one request at most: 3 MiB, which compressed are about the 1 MiB that a network file
/// system reads at once.
pub(super) const AT_ONCE: usize = 12;
/// A request is for as much as comes in about this part of the time for which somebody waits, so that a slow store is
/// seen to go on.
const PART: u32 = 16;

/// Where bytes come from.
#[derive(Debug)]
pub(super) struct Source {
    store: Store,
    files: Mutex<LruCache<Key, Arc<ObjectFile>>>,
    opening: Mutex<HashMap<Key, Arc<Mutex<()>>>>,
    /// How long one answer should take.
    answer: Duration,
    /// Nanoseconds that a chunk took lately; the first request is for one.
    pace: AtomicU64,
}

/// What comes while an object is fetched.
pub(super) enum Arrived {
    /// A part of a unit.
    Part,
    /// This unit, which has the bytes of its digest.
    Unit(usize, Vec<u8>),
    /// Why this unit does not come.
    Failed(usize, Error),
}

impl Source {
    /// For readers who wait as long as `patience`.
    pub(super) fn new(store: Store, patience: Duration) -> Self {
        let files = Mutex::new(LruCache::new(OPEN_MAX));
        Source { store, files, opening: Mutex::default(), answer: patience / PART, pace: AtomicU64::new(u64::MAX) }
    }

    /// Hands `units` of an object to `take`, in order, each as it should be or not at all: one that the store does not
    /// have right harms no other. May hang: for store threads only.
    pub(super) fn fetch(
        &self,
        known: &Known,
        mut units: Range<usize>,
        counters: &Counters,
        mut take: impl FnMut(Arrived),
    ) {
        let object = &known.object;
        let (mut tries, mut at_once) = (0, usize::MAX);
        while !units.is_empty() {
            let now = units.start..units.start + units.len().min(at_once);
            let error = match self.try_fetch(known, now, counters, &mut take) {
                Ok(pieces) => {
                    for bytes in pieces {
                        take(Arrived::Unit(units.start, bytes));
                        units.start += 1;
                    }
                    (tries, at_once) = (0, usize::MAX);
                    continue;
                }
                Err(error) => error,
            };
            lock(&self.files).pop(&(object.room, object.digest));
            at_once = 1;
            let worth = if error.kind() == Kind::Corrupt { PAUSES_IF_WRONG } else { PAUSES.len() };
            if let Some(pause) = PAUSES.iter().take(worth).nth(tries) {
                tracing::debug!(object = object.label(), error = error.chain(), "asked again");
                counters.retries.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(*pause);
                tries += 1;
                continue;
            }
            if error.kind() == Kind::Corrupt {
                counters.corrupt_in_store.fetch_add(1, Ordering::Relaxed);
            }
            // The next ones are tried without pauses, as long as nothing comes.
            take(Arrived::Failed(units.start, error.context(format!("{} cannot be fetched", object.label()))));
            units.start += 1;
        }
    }

    /// The first of `units`, as many as come at once and are right.
    fn try_fetch(
        &self,
        known: &Known,
        units: Range<usize>,
        counters: &Counters,
        take: &mut impl FnMut(Arrived),
    ) -> Result<Vec<Vec<u8>>> {
        let file = self.open(&known.object)?;
        let mut rest = match &known.units {
            Units::Whole => {
                let mut all = Vec::new();
                let mut at = 0;
                while at < known.object.chunks() {
                    let count = self.at_once().min(known.object.chunks() - at);
                    all.append(&mut self.read(&file, at, count, counters)?);
                    take(Arrived::Part);
                    at += count;
                }
                all
            }
            Units::Chunks(_) => {
                self.read(&file, units.start as u64, self.at_once().min(units.len() as u64), counters)?
            }
        };
        let mut pieces = Vec::new();
        for at in units {
            let behind = rest.split_off((known.length(at) as usize).min(rest.len()));
            if !known.is_right(at, &rest) {
                if !pieces.is_empty() {
                    break;
                }
                let what = format!("chunk {at} of {} does not have the bytes of its digest", file.path().display());
                return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"));
            }
            counters.verified_bytes.fetch_add(rest.len() as u64, Ordering::Relaxed);
            pieces.push(std::mem::replace(&mut rest, behind));
            if rest.is_empty() {
                break;
            }
        }
        Ok(pieces)
    }

    /// Chunks to ask for in one request.
    fn at_once(&self) -> u64 {
        let answer = u64::try_from(self.answer.as_nanos()).unwrap_or(u64::MAX);
        let fit = answer.checked_div(self.pace.load(Ordering::Relaxed)).unwrap_or(u64::MAX);
        fit.clamp(1, AT_ONCE as u64)
    }

    fn read(&self, file: &ObjectFile, first: u64, count: u64, counters: &Counters) -> Result<Vec<u8>> {
        let begun = Instant::now();
        let (bytes, stored) = file.read_chunks(first, count)?;
        let time = begun.elapsed();
        self.pace.store(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) / count.max(1), Ordering::Relaxed);
        counters.answered_after(time);
        counters.fetches.fetch_add(1, Ordering::Relaxed);
        counters.fetched_bytes.fetch_add(stored, Ordering::Relaxed);
        counters.unpacked_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    fn open(&self, object: &Object) -> Result<Arc<ObjectFile>> {
        let key = (object.room, object.digest);
        // Of several who want it, one opens it.
        let opening = lock(&self.opening).entry(key).or_default().clone();
        let _one = lock(&opening);
        let opened = self.open_alone(key, object);
        let mut others = lock(&self.opening);
        if Arc::strong_count(&opening) <= 2 {
            others.remove(&key);
        }
        opened
    }

    fn open_alone(&self, key: Key, object: &Object) -> Result<Arc<ObjectFile>> {
        // One of another length is of somebody who was wrong about it.
        if let Some(file) = lock(&self.files).get(&key)
            && file.size() == object.size
        {
            return Ok(file.clone());
        }
        let file = Arc::new(ObjectFile::open(&self.store, object)?);
        lock(&self.files).put(key, file.clone());
        Ok(file)
    }
}
