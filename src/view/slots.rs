//! Slots: small numbers for long names, given out once and never reused while the mount lives.
//!
//! The tables are append-only, so what has to outlive a worker (design decision 11) is a sequence of appends: a [`Log`],
//! where there is one. Two workers may serve one mount for a moment, so a table reads what others have appended before
//! it says that it does not know something, and appends only behind all that it has read.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, PoisonError, RwLock};

use super::inode::SLOTS_MAX;
use crate::environment::{Digest, EnvName};
use crate::error::{Error, Kind, Result};

/// A sequence of bytes that outlives the process, to which others may append, too.
pub trait Log: Debug + Send + Sync {
    /// What was appended behind the first `from` bytes.
    fn read(&self, from: u64) -> Result<Vec<u8>>;

    /// Appends `record`, where the log has `length` bytes and no more; false when others have appended meanwhile.
    fn append(&self, length: u64, record: &[u8]) -> Result<bool>;
}

/// A key that can be written down.
pub(super) trait Written: Clone + Eq + Hash {
    fn write(&self) -> Vec<u8>;
    fn read(bytes: &[u8]) -> Option<Self>;
}

impl Written for Digest {
    fn write(&self) -> Vec<u8> {
        self.to_string().into_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        std::str::from_utf8(bytes).ok()?.parse().ok()
    }
}

impl Written for (EnvName, u64) {
    fn write(&self) -> Vec<u8> {
        format!("{}@{}", self.0, self.1).into_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (name, number) = std::str::from_utf8(bytes).ok()?.rsplit_once('@')?;
        Some((name.parse().ok()?, number.parse().ok()?))
    }
}

/// An append-only table of keys, each with the number of its place.
#[derive(Debug)]
pub(super) struct Slots<K> {
    inner: RwLock<Inner<K>>,
    log: Option<Arc<dyn Log>>,
}

#[derive(Debug)]
struct Inner<K> {
    keys: Vec<K>,
    slots: HashMap<K, u32>,
    /// Bytes of the log that are in the table.
    read: u64,
}

impl<K: Written> Slots<K> {
    pub(super) fn new() -> Self {
        Slots { inner: RwLock::new(Inner { keys: Vec::new(), slots: HashMap::new(), read: 0 }), log: None }
    }

    /// The same table, which outlives the process in `log`.
    pub(super) fn kept(log: Arc<dyn Log>) -> Self {
        Slots { log: Some(log), ..Slots::new() }
    }

    /// The slot of `key`, a new one if it has none yet.
    pub(super) fn ensure(&self, key: &K) -> Result<u32> {
        if let Some(slot) = self.slot(key) {
            return Ok(slot);
        }
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(log) = &self.log {
                inner.catch_up(&**log)?;
            }
            if let Some(slot) = inner.slots.get(key) {
                return Ok(*slot);
            }
            if inner.keys.len() >= SLOTS_MAX as usize {
                return Err(
                    Error::new(Kind::Unsupported, "this mount has no numbers left").hint("unmount and mount again")
                );
            }
            // Written down before anybody is told.
            let Some(log) = &self.log else { return Ok(inner.push(key.clone())) };
            let bytes = key.write();
            let mut record = (bytes.len() as u32).to_le_bytes().to_vec();
            record.extend_from_slice(&bytes);
            if log.append(inner.read, &record)? {
                inner.read += record.len() as u64;
                return Ok(inner.push(key.clone()));
            }
        }
    }

    /// The slot of `key`, if it has one that this process knows of.
    pub(super) fn slot(&self, key: &K) -> Option<u32> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).slots.get(key).copied()
    }

    /// The key in `slot`.
    pub(super) fn key(&self, slot: u32) -> Option<K> {
        let known = self.inner.read().unwrap_or_else(PoisonError::into_inner).keys.get(slot as usize).cloned();
        let Some(log) = self.log.as_ref().filter(|_| known.is_none()) else { return known };
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = inner.catch_up(&**log) {
            tracing::error!(error = error.chain(), "the numbers of the mount cannot be read");
        }
        inner.keys.get(slot as usize).cloned()
    }

    /// How many slots this process knows of.
    pub(super) fn held(&self) -> u64 {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).keys.len() as u64
    }

    /// Every key, in order of slots.
    pub(super) fn keys(&self) -> Vec<K> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = &self.log {
            // What cannot be read is told when it is needed.
            let _ = inner.catch_up(&**log);
        }
        inner.keys.clone()
    }
}

impl<K: Written> Inner<K> {
    fn push(&mut self, key: K) -> u32 {
        let slot = self.keys.len() as u32;
        self.slots.insert(key.clone(), slot);
        self.keys.push(key);
        slot
    }

    /// Takes in what was appended to `log`.
    fn catch_up(&mut self, log: &dyn Log) -> Result<()> {
        let bytes = log.read(self.read)?;
        let mut rest = bytes.as_slice();
        while let Some((length, behind)) = rest.split_first_chunk::<4>() {
            let length = u32::from_le_bytes(*length) as usize;
            let record = behind.get(..length);
            let Some(key) = record.and_then(K::read).filter(|_| self.keys.len() < SLOTS_MAX as usize) else {
                return Err(Error::new(Kind::Corrupt, "the numbers that this mount has given out cannot be read")
                    .hint("another program has written to its memory: unmount and mount again"));
            };
            self.push(key);
            rest = &behind[length..];
            self.read += 4 + length as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    impl Written for u32 {
        fn write(&self) -> Vec<u8> {
            self.to_string().into_bytes()
        }

        fn read(bytes: &[u8]) -> Option<Self> {
            std::str::from_utf8(bytes).ok()?.parse().ok()
        }
    }

    #[derive(Debug, Default)]
    struct Remembered(Mutex<Vec<u8>>);

    impl Log for Remembered {
        fn read(&self, from: u64) -> Result<Vec<u8>> {
            Ok(self.0.lock().unwrap()[from as usize..].to_vec())
        }

        fn append(&self, length: u64, record: &[u8]) -> Result<bool> {
            let mut bytes = self.0.lock().unwrap();
            let fits = bytes.len() as u64 == length;
            if fits {
                bytes.extend_from_slice(record);
            }
            Ok(fits)
        }
    }

    #[test]
    fn a_key_has_one_slot_for_ever_whoever_asks_first() {
        let slots = Slots::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000u32).for_each(|k| drop(slots.ensure(&k))));
            }
        });
        for k in 0..1000u32 {
            let slot = slots.ensure(&k).unwrap();
            assert!(slot < 1000);
            assert_eq!(slots.key(slot), Some(k));
        }
        assert_eq!((slots.key(1000), slots.slot(&1000)), (None, None));
    }

    #[test]
    fn workers_at_the_same_time_and_after_each_other_give_a_key_one_slot() {
        let log: Arc<dyn Log> = Arc::new(Remembered::default());
        let tables: Vec<Slots<u32>> = (0..3).map(|_| Slots::kept(log.clone())).collect();
        std::thread::scope(|scope| {
            for (n, table) in tables.iter().enumerate() {
                scope.spawn(move || (0..500u32).for_each(|k| drop(table.ensure(&(k * (n as u32 + 1))))));
            }
        });
        let later = Slots::kept(log.clone());
        for k in tables[0].keys() {
            let slot = later.ensure(&k).unwrap();
            assert!(tables.iter().all(|table| table.ensure(&k).unwrap() == slot && table.key(slot) == Some(k)));
        }
        assert_eq!(later.keys(), tables[2].keys());
        let damaged: Arc<dyn Log> = Arc::new(Remembered(Mutex::new(vec![9, 0, 0, 0, b'1'])));
        assert_eq!(Slots::<u32>::kept(damaged).ensure(&1).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn keys_are_read_as_they_were_written() {
        let digest = Digest::of(b"x");
        assert_eq!(Digest::read(&digest.write()), Some(digest));
        let version = ("a.b/c-d".parse::<EnvName>().unwrap(), u64::MAX);
        assert_eq!(<(EnvName, u64)>::read(&version.write()), Some(version));
        for wrong in ["", "@", "a/b", "a/b@", "a@1", "\u{FF}"] {
            assert_eq!(<(EnvName, u64)>::read(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
