//! Bytes from the store, compared with their digests.

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::counters::Counters;
use super::entry::Units;
use super::{Key, lock};
use crate::error::{Error, Kind, Result};
use crate::patience;
use crate::store::{Object, ObjectFile, Store};

/// Objects of the store that are kept open: to open one takes several requests.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// How long to wait before a request is made again. A server that has just been started, or a handle that is stale
/// because of that, is worth some patience; a disk that is broken is not.
const PAUSES: [Duration; 3] = [Duration::from_millis(5), Duration::from_millis(100), Duration::from_millis(400)];

/// Where bytes come from.
#[derive(Debug)]
pub(super) struct Source {
    store: Store,
    files: Mutex<LruCache<Key, Arc<ObjectFile>>>,
}

impl Source {
    pub(super) fn new(store: Store) -> Self {
        Source { store, files: Mutex::new(LruCache::new(OPEN_MAX)) }
    }

    /// `count` units of `object` from unit `first` on, each as it should be. May hang: for store threads only.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the store has other bytes, also when they are read again; errors of the store.
    pub(super) fn fetch(
        &self,
        object: &Object,
        units: &Units,
        first: usize,
        count: usize,
        counters: &Counters,
    ) -> Result<Vec<Vec<u8>>> {
        let mut pauses = PAUSES.iter();
        loop {
            let error = match self.try_fetch(object, units, first, count, counters) {
                Ok(pieces) => return Ok(pieces),
                Err(error) => error,
            };
            lock(&self.files).pop(&(object.room, object.digest));
            let Some(pause) = pauses.next() else {
                if error.kind() == Kind::Corrupt {
                    counters.corrupt_in_store.fetch_add(1, Ordering::Relaxed);
                }
                return Err(error.context(format!("{} cannot be fetched", object.label())));
            };
            tracing::debug!(object = object.label(), error = error.chain(), "asked again");
            counters.retries.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(*pause);
        }
    }

    fn try_fetch(
        &self,
        object: &Object,
        units: &Units,
        first: usize,
        count: usize,
        counters: &Counters,
    ) -> Result<Vec<Vec<u8>>> {
        let begun = Instant::now();
        let file = self.open(object)?;
        let (bytes, stored) = match units {
            Units::Whole => file.read_chunks(0, object.chunks())?,
            Units::Chunks(_) => file.read_chunks(first as u64, count as u64)?,
        };
        patience::progress();
        counters.answered_after(begun.elapsed());
        counters.fetches.fetch_add(1, Ordering::Relaxed);
        counters.fetched_bytes.fetch_add(stored, Ordering::Relaxed);
        counters.unpacked_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut pieces = Vec::with_capacity(count);
        let mut rest = bytes;
        for at in first..first + count {
            let behind = rest.split_off((units.length(object, at) as usize).min(rest.len()));
            if !units.is_right(object, at, &rest) {
                let what = format!("chunk {at} of {} does not have the bytes of its digest", file.path().display());
                return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"));
            }
            counters.verified_bytes.fetch_add(rest.len() as u64, Ordering::Relaxed);
            pieces.push(std::mem::replace(&mut rest, behind));
        }
        Ok(pieces)
    }

    fn open(&self, object: &Object) -> Result<Arc<ObjectFile>> {
        let key = (object.room, object.digest);
        if let Some(file) = lock(&self.files).get(&key) {
            return Ok(file.clone());
        }
        let file = Arc::new(ObjectFile::open(&self.store, object)?);
        lock(&self.files).put(key, file.clone());
        Ok(file)
    }
}
