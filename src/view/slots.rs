//! Slots: small numbers for long names, given out once and never reused while the mount lives.
//!
//! The tables are append-only, so what has to outlive a worker (design decision 11) is a sequence of appends.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{PoisonError, RwLock};

use super::inode::SLOTS_MAX;
use crate::error::{Error, Kind, Result};

/// An append-only table of keys, each with the number of its place.
#[derive(Debug)]
pub(super) struct Slots<K>(RwLock<Inner<K>>);

#[derive(Debug)]
struct Inner<K> {
    keys: Vec<K>,
    slots: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash> Slots<K> {
    pub(super) fn new() -> Self {
        Slots(RwLock::new(Inner { keys: Vec::new(), slots: HashMap::new() }))
    }

    /// The slot of `key`, a new one if it has none yet.
    pub(super) fn ensure(&self, key: &K) -> Result<u32> {
        if let Some(slot) = self.slot(key) {
            return Ok(slot);
        }
        let mut inner = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = inner.slots.get(key) {
            return Ok(*slot);
        }
        let slot = u32::try_from(inner.keys.len()).ok().filter(|slot| *slot < SLOTS_MAX).ok_or_else(|| {
            Error::new(Kind::Unsupported, "this mount has no numbers left").hint("unmount and mount again")
        })?;
        inner.keys.push(key.clone());
        inner.slots.insert(key.clone(), slot);
        Ok(slot)
    }

    /// The slot of `key`, if it has one.
    pub(super) fn slot(&self, key: &K) -> Option<u32> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).slots.get(key).copied()
    }

    /// How many slots are given out.
    pub(super) fn len(&self) -> u32 {
        // There are never more than `SLOTS_MAX`.
        self.0.read().unwrap_or_else(PoisonError::into_inner).keys.len() as u32
    }

    /// The key in `slot`.
    pub(super) fn key(&self, slot: u32) -> Option<K> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).keys.get(slot as usize).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
