//! How an object is taken apart, and which parts of it a file has.

use std::fs::File;
use std::ops::Range;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek64};

use crate::environment::Digest;
use crate::error::{Error, Kind, Result};
use crate::store::{CHUNK_SIZE, Chunks, Object};

/// File systems give a file its room in blocks of so many bytes.
const BLOCK: u64 = 4096;
/// An object that is said to be larger, in bytes, is not fetched whole: the largest catalogs and documents are far below.
const WHOLE_MAX: u64 = 1 << 30;

/// Room that `length` bytes of a file take on the disk.
pub(super) fn room(length: u64) -> u64 {
    length.div_ceil(BLOCK).saturating_mul(BLOCK)
}

/// How an object is taken apart.
#[derive(Debug)]
pub(super) enum Units {
    /// Not at all: its own digest is all there is.
    Whole,
    /// Into chunks with these digests.
    Chunks(Chunks),
}

/// An object with its units.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) object: Object,
    pub(super) units: Units,
}

impl Known {
    /// # Errors
    /// [`Kind::Corrupt`] when the object is said to be larger than any can be.
    pub(super) fn new(object: Object, units: Units) -> Result<Known> {
        let fits = match &units {
            Units::Whole => object.size <= WHOLE_MAX,
            Units::Chunks(chunks) => chunks.len() as u64 == object.chunks(),
        };
        if !fits {
            let what = format!("{} cannot have {} bytes", object.label(), object.size);
            return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"));
        }
        Ok(Known { object, units })
    }

    /// How many units there are, at least one.
    pub(super) fn count(&self) -> usize {
        match &self.units {
            Units::Whole => 1,
            Units::Chunks(chunks) => chunks.len(),
        }
    }

    /// Length of unit `at`, in bytes.
    pub(super) fn length(&self, at: usize) -> u64 {
        match &self.units {
            Units::Whole => self.object.size,
            Units::Chunks(_) => self.object.chunk_size(at as u64),
        }
    }

    /// The unit that has byte `offset`.
    pub(super) fn at(&self, offset: u64) -> usize {
        match &self.units {
            Units::Whole => 0,
            Units::Chunks(_) => (offset / CHUNK_SIZE) as usize,
        }
    }

    /// Where unit `at` begins.
    pub(super) fn start(&self, at: usize) -> u64 {
        at as u64 * CHUNK_SIZE
    }

    /// True when `bytes` are those of unit `at`.
    pub(super) fn is_right(&self, at: usize, bytes: &[u8]) -> bool {
        let is_right = match &self.units {
            Units::Whole => Digest::of(bytes) == self.object.digest,
            Units::Chunks(chunks) => chunks.has(at, bytes),
        };
        bytes.len() as u64 == self.length(at) && is_right
    }

    /// Units all of whose bytes are in `file`, as far as the file system tells.
    pub(super) fn with_data(&self, file: &File) -> Vec<usize> {
        let has_data = |at: &usize| {
            let start = self.start(*at) as i64;
            let end = start + self.length(*at) as i64;
            // The next byte of data, and the hole behind it; an empty object has none, and needs none.
            let data = lseek64(file, start, Whence::SeekData);
            end == start || (data == Ok(start) && lseek64(file, start, Whence::SeekHole).is_ok_and(|hole| hole >= end))
        };
        (0..self.count()).filter(has_data).collect()
    }

    /// Gives back the room of what `file` has of `units`. Where a file system cannot do that, it stays taken until the
    /// units come again.
    pub(super) fn punch(&self, file: &File, units: Range<usize>) {
        let (start, end) = (self.start(units.start), units.end.checked_sub(1));
        let end = end.map_or(0, |last| self.start(last) + self.length(last));
        let length = room(end.saturating_sub(start)) as i64;
        if length > 0 {
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let _ = fallocate(file, how, start as i64, length);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::store::Room;

    fn object(size: u64) -> Object {
        Object { room: Room::Blobs, digest: Digest::of(b"x"), size }
    }

    #[test]
    fn an_object_of_an_impossible_size_is_refused() {
        for size in [WHOLE_MAX + 1, u64::MAX] {
            assert_eq!(Known::new(object(size), Units::Whole).unwrap_err().kind(), Kind::Corrupt);
            let one = Units::Chunks(Chunks::single(Digest::of(b"x")));
            assert_eq!(Known::new(object(size), one).unwrap_err().kind(), Kind::Corrupt);
        }
        assert_eq!((room(0), room(1), room(4096), room(u64::MAX)), (0, 4096, 4096, u64::MAX));
    }

    #[test]
    fn units_are_found_by_their_data_and_their_room_is_given_back() {
        let bytes: Vec<u8> = (0..CHUNK_SIZE * 3 + 10).map(|n| n as u8 | 1).collect();
        let known = Known::new(object(bytes.len() as u64), Units::Chunks(Chunks::of(&bytes))).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        assert!(known.with_data(&file).is_empty());
        let write = |from: u64, to: u64| file.write_all_at(&bytes[from as usize..to as usize], from).unwrap();
        write(0, CHUNK_SIZE);
        write(CHUNK_SIZE, CHUNK_SIZE + 9_000);
        write(CHUNK_SIZE * 3, CHUNK_SIZE * 3 + 10);
        assert_eq!(known.with_data(&file), [0, 3], "the second is not whole");
        known.punch(&file, 0..3);
        assert_eq!(known.with_data(&file), [3]);
        assert_eq!(
            (file.metadata().unwrap().blocks() * 512, file.metadata().unwrap().len()),
            (4096, bytes.len() as u64)
        );
    }
}
