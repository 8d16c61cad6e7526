//! Reads what lies in the cache again, slowly, and compares it: a disk may change bytes by itself.
//!
//! Sealed files are trusted by their identity, and the kernel may read them in place; neither sees a byte that a disk has
//! changed. So all of them are read from the disk in turn, at a rate that nobody notices.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::entry::Entry;
use super::{Inner, Key, lock};
use crate::environment::Hasher;
use crate::error::{Error, Kind};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

/// Where the round is.
#[derive(Default)]
pub(super) struct Scrub {
    last: Option<Key>,
    current: Option<Current>,
}

struct Current {
    entry: Arc<Entry>,
    file: Arc<File>,
    size: u64,
    at: u64,
    hasher: Hasher,
}

impl Scrub {
    /// Reads about `bytes` more.
    pub(super) fn go_on(&mut self, inner: &Inner, mut bytes: u64) {
        while bytes > 0 {
            let Some(mut current) = self.current.take().or_else(|| self.next(inner)) else { return };
            let length = PIECE.min(current.size - current.at);
            let mut piece = vec![0; length as usize];
            // From the disk, and not from memory, as far as the kernel lets go of it.
            let _ = posix_fadvise(
                &*current.file,
                current.at as i64,
                length as i64,
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            );
            let read = current.file.read_exact_at(&mut piece, current.at);
            current.hasher.update(&piece);
            current.at += length;
            inner.counters.scrubbed_bytes.fetch_add(length, Ordering::Relaxed);
            bytes = bytes.saturating_sub(length.max(4096));
            if read.is_ok() && current.at < current.size {
                self.current = Some(current);
                continue;
            }
            let key = current.entry.key();
            if read.is_err() || current.hasher.finish() != key.1 {
                let what = format!("{}/{} does not have the bytes of its name any more", key.0.name(), key.1);
                current.entry.discard(inner, &current.file, &Error::new(Kind::Corrupt, what));
                inner.ledger.forget(std::iter::once(key));
            }
        }
    }

    /// The next sealed file; none at the end of a round.
    fn next(&mut self, inner: &Inner) -> Option<Current> {
        loop {
            let key = {
                let entries = lock(&inner.entries);
                entries.keys().filter(|key| self.last.is_none_or(|last| **key > last)).min().copied()
            };
            self.last = key;
            let entry = lock(&inner.entries).get(&key?).cloned()?;
            if let Some((file, size)) = entry.sealed(inner) {
                return Some(Current { entry, file, size, at: 0, hasher: Hasher::default() });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::super::ledger::Identity;
    use super::super::{Cache, Options};
    use crate::environment::Digest;
    use crate::store::{Chunks, Object, Room, Store};

    /// What a disk does by itself leaves no trace: here the ledger is told that all is as it was.
    #[test]
    fn a_byte_that_the_disk_changed_is_found_by_comparing_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store")).unwrap();
        let bytes: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
        let object = Object { room: Room::Blobs, digest: Digest::of(&bytes), size: bytes.len() as u64 };
        store.ensure_blob(&bytes).unwrap();
        let open = || {
            let options = Options { keep_free: 0, scrub: 0, ..Options::at(dir.path().join("cache")) };
            Cache::open(options, store.clone()).unwrap()
        };
        let read = |cache: &Cache| cache.read(&object, || Ok(Chunks::of(&bytes)), 0, object.size).unwrap();
        let cache = open();
        assert_eq!(read(&cache), bytes);
        cache.settle();
        cache.scrub();
        assert_eq!((cache.stats().scrubbed_bytes, cache.stats().corrupt_in_cache), (object.size, 0));
        let key = (object.room, object.digest);
        let path = cache.inner.path(&key);
        for _ in 0..2 {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(b"!", 400_000).unwrap();
            cache.inner.ledger.seal(key, &Identity::of(&file.metadata().unwrap()), 1);
            let wrong = read(&cache);
            assert_ne!(wrong, bytes, "nothing tells it");
            let corrupt = cache.stats().corrupt_in_cache;
            cache.scrub();
            assert_eq!(cache.stats().corrupt_in_cache, corrupt + 1);
            assert_eq!(read(&cache), bytes);
            cache.settle();
        }
        // Also what nobody has asked for since the cache was opened.
        drop(cache);
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"!", 400_000).unwrap();
        let cache = open();
        cache.inner.ledger.seal(key, &Identity::of(&file.metadata().unwrap()), 1);
        cache.scrub();
        assert_eq!(cache.stats().corrupt_in_cache, 1);
        assert_eq!(read(&cache), bytes);
    }
}
