//! Units for which there was no room, in memory until those who asked have them, and a little longer.

use std::sync::Arc;

use lru::LruCache;

use super::Key;

/// So many bytes are remembered.
const MAX: usize = 64 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Loose {
    units: LruCache<(Key, usize), Arc<Vec<u8>>>,
    bytes: usize,
}

impl Default for Loose {
    fn default() -> Self {
        Loose { units: LruCache::unbounded(), bytes: 0 }
    }
}

impl Loose {
    pub(super) fn get(&mut self, unit: &(Key, usize)) -> Option<Arc<Vec<u8>>> {
        self.units.get(unit).cloned()
    }

    pub(super) fn put(&mut self, unit: (Key, usize), bytes: Arc<Vec<u8>>) {
        self.bytes += bytes.len();
        self.bytes -= self.units.put(unit, bytes).map_or(0, |old| old.len());
        while self.bytes > MAX {
            let Some((_, oldest)) = self.units.pop_lru() else { break };
            self.bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Digest;
    use crate::store::Room;

    #[test]
    fn what_is_remembered_is_bounded_by_bytes() {
        let mut loose = Loose::default();
        let unit = |at| ((Room::Blobs, Digest::of(b"x")), at);
        for at in 0..100 {
            loose.put(unit(at), Arc::new(vec![0; MAX / 10]));
            loose.put(unit(at), Arc::new(vec![0; MAX / 10]));
        }
        assert_eq!((loose.units.len(), loose.bytes), (10, MAX / 10 * 10));
        assert!(loose.get(&unit(99)).is_some() && loose.get(&unit(89)).is_none());
        loose.put(unit(7), Arc::new(vec![0; MAX + 1]));
        assert_eq!((loose.units.len(), loose.bytes), (0, 0), "more than all of it");
    }
}
