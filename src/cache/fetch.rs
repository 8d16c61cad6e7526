//! Bytes from the store, compared with their digests.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::counters::Counters;
use super::units::{Known, Units};
use super::{Key, lock};
use crate::error::{Error, Kind, Result};
use crate::store::{Object, ObjectFile, REQUEST_MAX, Store, StoredChunks};

/// Objects of the store that are kept open: to open one takes several requests.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// How long to wait before a request is made again. A server that has just been started, or a handle that is stale
/// because of that, is worth some patience; a disk that is broken is not.
const PAUSES: [Duration; 3] = [Duration::from_millis(5), Duration::from_millis(100), Duration::from_millis(400)];
/// Wrong bytes are either right when they are read again, or stay wrong: so many pauses are for them.
const PAUSES_IF_WRONG: usize = 2;

/// Chunks that are asked for together at most.
pub(super) const AT_ONCE: usize = 128;
/// A request is for as much as comes in about this part of the time for which somebody waits, so that a slow store is
/// seen to go on.
const PART: u32 = 16;

/// Requests that are made at the same time for an object that is of use only as a whole.
const PARALLEL: usize = 4;

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

/// Who has units fetched.
pub(super) trait Receives {
    /// Of units that are left, the place of one that somebody waits for.
    fn awaited(&self, left: &[usize]) -> Option<usize>;

    /// Takes what has come.
    fn take(&mut self, arrived: Arrived);

    /// Takes `units`, which nobody waits for, as they are stored, to have them unpacked later; or gives them back.
    fn leave(&mut self, stored: StoredChunks, units: &[usize]) -> Option<StoredChunks>;
}

impl Source {
    /// For readers who wait as long as `patience`.
    pub(super) fn new(store: Store, patience: Duration) -> Self {
        let files = Mutex::new(LruCache::new(OPEN_MAX));
        Source { store, files, opening: Mutex::default(), answer: patience / PART, pace: AtomicU64::new(u64::MAX) }
    }

    /// Hands `units` of an object to `receiver`, each as it should be or not at all: one that the store does not have right
    /// harms no other. `failed` is what became of a first try, if there was one. May hang: for store threads only.
    pub(super) fn fetch(
        &self,
        known: &Known,
        units: Range<usize>,
        failed: Option<Error>,
        counters: &Counters,
        receiver: &mut impl Receives,
    ) {
        let object = &known.object;
        let (mut left, mut late): (Vec<usize>, Vec<usize>) = match known.units {
            Units::Chunks(_) if failed.is_none() => (units.collect(), Vec::new()),
            _ => (Vec::new(), units.collect()),
        };
        let mut error = failed;
        while !left.is_empty() {
            let run = self.run(&left, receiver.awaited(&left).unwrap_or(0));
            left.retain(|at| !run.contains(at));
            let mut here: Vec<usize> = run.clone().collect();
            let mut stored = match self.open(object).and_then(|file| self.read(&file, &run, counters)) {
                Ok(stored) => stored,
                Err(failed) => {
                    error = Some(failed);
                    late.append(&mut here);
                    continue;
                }
            };
            while !here.is_empty() {
                let awaited = receiver.awaited(&here);
                if awaited.is_none() {
                    match receiver.leave(stored, &here) {
                        Some(back) => stored = back,
                        None => break,
                    }
                }
                let at = here.remove(awaited.unwrap_or(0));
                match unpack(known, &stored, at, counters) {
                    Ok(bytes) => receiver.take(Arrived::Unit(at, bytes)),
                    Err(wrong) => {
                        error = Some(wrong);
                        late.push(at);
                    }
                }
            }
        }
        // One by one. The first time was that above; the next ones are tried without pauses as long as nothing comes.
        let (mut tries, mut late) = (0, late.into_iter().peekable());
        while let Some(at) = late.peek().copied() {
            let error = match error.take() {
                Some(error) => error,
                None => match self.fetch_one(known, at, counters, receiver) {
                    Ok(bytes) => {
                        receiver.take(Arrived::Unit(at, bytes));
                        tries = 0;
                        late.next();
                        continue;
                    }
                    Err(error) => error,
                },
            };
            lock(&self.files).pop(&(object.room, object.digest));
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
            receiver.take(Arrived::Failed(at, error.context(format!("{} cannot be fetched", object.label()))));
            late.next();
        }
    }

    /// The requests that bring `units` of an object, each with all that it can bring.
    pub(super) fn requests(&self, known: &Known, file: &ObjectFile, units: &Range<usize>) -> Vec<Range<usize>> {
        match known.units {
            Units::Whole => vec![units.clone()],
            Units::Chunks(_) => self.requests_for(file, units),
        }
    }

    /// The requests that bring `units` of an object and nothing else.
    pub(super) fn pieces(&self, known: &Known, file: &ObjectFile, units: &Range<usize>) -> Vec<Range<usize>> {
        if let Units::Whole = known.units {
            return vec![units.clone()];
        }
        let most = self.at_once();
        let end = |first: usize| (file.reach(first as u64) as usize).min(first + most).min(units.end);
        let firsts = std::iter::successors(Some(units.start), |first| Some(end(*first)));
        firsts.take_while(|first| *first < units.end).map(|first| first..end(first)).collect()
    }

    fn requests_for(&self, file: &ObjectFile, chunks: &Range<usize>) -> Vec<Range<usize>> {
        let most = self.at_once();
        let mut requests = Vec::new();
        let mut at = chunks.start;
        while at < chunks.end {
            let request = file.request(at as u64);
            let (mut first, end) = (request.start as usize, request.end as usize);
            // A store that is slow is asked for less.
            if end - first > most {
                first += (at - first) / most * most;
            }
            let end = end.min(first + most);
            requests.push(first..end);
            at = end;
        }
        requests
    }

    /// What of `left` to ask for at once so that unit `left[first]` is among it.
    fn run(&self, left: &[usize], first: usize) -> Range<usize> {
        let most = self.at_once();
        let follows = |pair: &[usize]| pair[1] == pair[0] + 1;
        let behind = left[first..].windows(2).take_while(|pair| follows(pair)).count();
        let before = left[..=first].windows(2).rev().take_while(|pair| follows(pair)).count();
        let at = left[first];
        // Where it is too much at once, what is before has its turn later.
        let before = if before + behind < most { before } else { 0 };
        at - before..at + 1 + behind.min(most - 1)
    }

    /// Unit `at`, all by itself.
    fn fetch_one(
        &self,
        known: &Known,
        at: usize,
        counters: &Counters,
        receiver: &mut impl Receives,
    ) -> Result<Vec<u8>> {
        let file = self.open(&known.object)?;
        if let Units::Chunks(_) = known.units {
            return unpack(known, &self.read(&file, &(at..at + 1), counters)?, at, counters);
        }
        let runs = self.requests_for(&file, &(0..known.object.chunks() as usize));
        let read = |run: &Range<usize>| {
            let stored = self.read(&file, run, counters)?;
            run.clone().map(|chunk| stored.unpack(chunk as u64)).collect::<Result<Vec<_>>>()
        };
        let mut all = Vec::new();
        // A few at a time: somebody waits for all of it.
        for some in runs.chunks(PARALLEL) {
            let read = std::thread::scope(|scope| {
                let read = &read;
                let ask = |run| std::thread::Builder::new().spawn_scoped(scope, move || read(run));
                // One that cannot be started is no loss.
                let others: Vec<_> = some[1..].iter().map(|run| ask(run).map_err(|_| run)).collect();
                let first = read(&some[0]);
                let joined = others.into_iter().map(|other| match other {
                    Ok(other) => other.join().unwrap_or_else(|_| Err(broken_off())),
                    Err(run) => read(run),
                });
                std::iter::once(first).chain(joined).collect::<Result<Vec<_>>>()
            })?;
            read.into_iter().flatten().for_each(|mut chunk| all.append(&mut chunk));
            receiver.take(Arrived::Part);
        }
        compared(known, at, all, file.path(), counters)
    }

    /// Chunks to ask for in one request.
    fn at_once(&self) -> usize {
        let answer = u64::try_from(self.answer.as_nanos()).unwrap_or(u64::MAX);
        let fit = answer.checked_div(self.pace.load(Ordering::Relaxed)).unwrap_or(u64::MAX);
        fit.clamp(1, REQUEST_MAX) as usize
    }

    fn read(&self, file: &ObjectFile, run: &Range<usize>, counters: &Counters) -> Result<StoredChunks> {
        let begun = Instant::now();
        let stored = file.read_stored(run.start as u64, run.len() as u64)?;
        let time = begun.elapsed();
        let pace = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) / run.len().max(1) as u64;
        self.pace.store(pace, Ordering::Relaxed);
        counters.answered_after(time);
        counters.fetches.fetch_add(1, Ordering::Relaxed);
        counters.fetched_bytes.fetch_add(stored.length(), Ordering::Relaxed);
        Ok(stored)
    }

    /// The file of an object, if it is open.
    pub(super) fn opened(&self, known: &Known) -> Option<Arc<ObjectFile>> {
        let object = &known.object;
        lock(&self.files).get(&(object.room, object.digest)).filter(|file| file.size() == object.size).cloned()
    }

    /// The file of an object. May hang.
    pub(super) fn open(&self, object: &Object) -> Result<Arc<ObjectFile>> {
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

/// Unit `at`, which is one of `stored`.
pub(super) fn unpack(known: &Known, stored: &StoredChunks, at: usize, counters: &Counters) -> Result<Vec<u8>> {
    compared(known, at, stored.unpack(at as u64)?, stored.path(), counters)
}

/// `bytes`, when they are those of unit `at`.
fn compared(known: &Known, at: usize, bytes: Vec<u8>, path: &Path, counters: &Counters) -> Result<Vec<u8>> {
    counters.unpacked_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    if !known.is_right(at, &bytes) {
        let what = format!("chunk {at} of {} does not have the bytes of its digest", path.display());
        return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"));
    }
    counters.verified_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    Ok(bytes)
}

fn broken_off() -> Error {
    Error::new(Kind::Failed, "a question to the store broke off")
}
