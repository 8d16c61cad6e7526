//! Bounded memory: what may be forgotten and computed again.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// Enough that the threads of a session seldom meet at one lock.
const SHARDS: usize = 16;

/// A least-recently-used map whose locks are held for one look at a time. Values are cheap to clone (an `Arc`).
///
/// Each entry has a weight; the oldest are dropped while the sum is above the bound. One entry always stays.
#[derive(Debug)]
pub(super) struct Lru<K: Eq + Hash, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    hasher: RandomState,
    bound: usize,
}

#[derive(Debug)]
struct Shard<K: Eq + Hash, V> {
    map: LruCache<K, (usize, V)>,
    weight: usize,
}

impl<K: Eq + Hash, V: Clone> Lru<K, V> {
    /// Keeps about `bound` in weight, spread over several locks.
    pub(super) fn new(bound: usize) -> Self {
        Lru::with_shards(bound, SHARDS)
    }

    /// Keeps exactly `bound` in weight under one lock: for few, heavy things.
    pub(super) fn single(bound: usize) -> Self {
        Lru::with_shards(bound, 1)
    }

    fn with_shards(bound: usize, shards: usize) -> Self {
        let bound = bound.div_ceil(shards).max(1);
        let shard = || Mutex::new(Shard { map: LruCache::unbounded(), weight: 0 });
        Lru { shards: (0..shards).map(|_| shard()).collect(), hasher: RandomState::new(), bound }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let at = self.hasher.hash_one(key) as usize % self.shards.len();
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.shard(key).map.get(key).map(|(_, value)| value.clone())
    }

    pub(super) fn put(&self, key: K, value: V) {
        self.put_weighing(key, value, 1);
    }

    pub(super) fn put_weighing(&self, key: K, value: V, weight: usize) {
        let mut dropped = Vec::new(); // outlives the lock: dropping may close a database
        let mut shard = self.shard(&key);
        shard.weight += weight;
        if let Some((old, value)) = shard.map.put(key, (weight, value)) {
            shard.weight -= old;
            dropped.push(value);
        }
        while shard.weight > self.bound && shard.map.len() > 1 {
            let Some((_, (old, value))) = shard.map.pop_lru() else { break };
            shard.weight -= old;
            dropped.push(value);
        }
        drop(shard);
    }

    /// Forgets `key`: what was kept turned out to be useless.
    pub(super) fn remove(&self, key: &K) {
        let dropped; // outlives the lock
        let mut shard = self.shard(key);
        dropped = shard.map.pop(key);
        shard.weight -= dropped.as_ref().map_or(0, |(weight, _)| *weight);
        drop(shard);
    }

    /// The sum of weights now; what other threads do meanwhile may be counted in part.
    pub(super) fn held(&self) -> u64 {
        let weight = |shard: &Mutex<Shard<K, V>>| shard.lock().unwrap_or_else(PoisonError::into_inner).weight as u64;
        self.shards.iter().map(weight).sum()
    }

    /// The bound of that sum.
    pub(super) fn most(&self) -> u64 {
        (self.bound * self.shards.len()) as u64
    }

    /// The value of `key`, or that of `make`, which is kept; two threads may both make it, then one stays.
    pub(super) fn get_or<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(value) = self.get(&key) {
            return Ok(value);
        }
        let value = make()?;
        self.put(key, value.clone());
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_weights_stays_bounded_and_the_newest_stays() {
        let lru = Lru::single(100);
        for i in 0..1000u32 {
            lru.put_weighing(i, i, (i % 40) as usize);
            assert_eq!(lru.get(&i), Some(i));
            let shard = lru.shard(&i);
            assert!(shard.weight <= 100);
            assert_eq!(shard.weight, shard.map.iter().map(|(_, (w, _))| w).sum::<usize>());
        }
        lru.put_weighing(7, 7, 5000);
        assert_eq!(lru.get(&7), Some(7), "one that is heavier than the bound is kept alone");
        lru.put(8, 8);
        assert_eq!((lru.get(&7), lru.held(), lru.most()), (None, 1, 100));
        lru.remove(&8);
        lru.remove(&8);
        assert_eq!((lru.get(&8), lru.shard(&8).weight), (None, 0));
    }
}
