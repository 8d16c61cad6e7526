//! How much may be kept.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts bytes kept, against a limit and against the free space of the disk.
#[derive(Debug)]
pub(super) struct Space {
    dir: PathBuf,
    pub(super) limit: u64,
    pub(super) keep_free: u64,
    used: AtomicU64,
}

impl Space {
    pub(super) fn new(dir: &Path, limit: u64, keep_free: u64) -> Self {
        Space { dir: dir.to_path_buf(), limit, keep_free, used: AtomicU64::new(0) }
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Counts `bytes` in, whether there is room or not.
    pub(super) fn take(&self, bytes: u64) {
        let more = |used: u64| Some(used.saturating_add(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Counts `bytes` in if there is room for them.
    pub(super) fn reserve(&self, bytes: u64) -> bool {
        if self.lacking_on_disk(bytes) > 0 {
            return false;
        }
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    pub(super) fn give_back(&self, bytes: u64) {
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How many bytes would have to go so that `bytes` more fit.
    pub(super) fn lacking(&self, bytes: u64) -> u64 {
        let by_limit = self.used().saturating_add(bytes).saturating_sub(self.limit);
        by_limit.max(self.lacking_on_disk(bytes))
    }

    fn lacking_on_disk(&self, bytes: u64) -> u64 {
        // A disk that does not tell is not held against the cache: writing will fail, and that is provided for.
        let Ok(stat) = nix::sys::statvfs::statvfs(&self.dir) else { return 0 };
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        self.keep_free.saturating_add(bytes).saturating_sub(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_reserved_than_the_limit_and_the_disk_allow() {
        let space = Space::new(Path::new("/"), 100, 0);
        assert!(space.reserve(60) && space.reserve(40) && !space.reserve(1));
        assert_eq!(space.lacking(30), 30);
        space.give_back(50);
        assert!(space.reserve(50) && !space.reserve(u64::MAX));
        for keep_free in [u64::MAX / 2, u64::MAX] {
            let full = Space::new(Path::new("/"), 100, keep_free);
            assert!(!full.reserve(1) && full.lacking(1) > 0);
        }
        space.take(u64::MAX);
        assert_eq!((space.used(), space.lacking(u64::MAX)), (u64::MAX, u64::MAX - 100));
    }
}
