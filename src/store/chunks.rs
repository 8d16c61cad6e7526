//! Chunks: large objects are verified, fetched and kept by the piece.
//!
//! A catalog has the digest of every chunk of its pack and of its layer's large files, and the layer's digest covers
//! those of files ([`Chunks::root`]). So a part of a file can be proven right without the rest of it.
//!
//! An object of one chunk has the digest it has anyway. Chunks of others have a BLAKE3, which takes a quarter of the time
//! of a sha256: a node compares every byte that it gets.

use crate::environment::{Digest, Hasher};

/// Bytes of a chunk; the last one of an object may be shorter. Part of the store format.
pub const CHUNK_SIZE: u64 = 256 * 1024;

/// The digests of an object's chunks, in order; 32 bytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunks(Box<[[u8; 32]]>);

impl Chunks {
    /// How many chunks an object of `size` bytes has; an empty one has one, so that it has a digest.
    pub fn count(size: u64) -> u64 {
        size.div_ceil(CHUNK_SIZE).max(1)
    }

    /// The chunks of an object that is no larger than one.
    pub fn single(object: Digest) -> Chunks {
        Chunks([*object.as_bytes()].into())
    }

    /// The chunks of `bytes`.
    pub fn of(bytes: &[u8]) -> Chunks {
        let mut hasher = ChunkHasher::default();
        hasher.update(bytes);
        hasher.finish().1
    }

    /// Digests one after the other, 32 bytes each, of an object with `size` bytes; none when their number is wrong.
    pub fn from_bytes(bytes: &[u8], size: u64) -> Option<Chunks> {
        let (digests, rest) = bytes.as_chunks::<32>();
        let fits = rest.is_empty() && digests.len() as u64 == Chunks::count(size);
        fits.then(|| Chunks(digests.into()))
    }

    /// What [`Chunks::from_bytes`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.concat()
    }

    /// The digest that stands for all of them.
    pub fn root(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }

    /// True when `bytes` are those of chunk `at`.
    pub fn has(&self, at: usize, bytes: &[u8]) -> bool {
        match &*self.0 {
            [object] => at == 0 && Digest::of(bytes).as_bytes() == object,
            chunks => chunks.get(at).is_some_and(|chunk| blake3::hash(bytes).as_bytes() == chunk),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Digests an object and its chunks in one go.
#[derive(Default)]
pub(super) struct ChunkHasher {
    whole: Hasher,
    chunk: blake3::Hasher,
    /// Bytes in `chunk`.
    filled: u64,
    done: Vec<[u8; 32]>,
}

impl ChunkHasher {
    /// Takes in the next bytes.
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(((CHUNK_SIZE - self.filled) as usize).min(bytes.len()));
            self.chunk.update(now);
            self.filled += now.len() as u64;
            if self.filled == CHUNK_SIZE {
                self.done.push(self.chunk.finalize().into());
                self.chunk.reset();
                self.filled = 0;
            }
            bytes = rest;
        }
    }

    /// The digest of all that was taken in, and those of its chunks.
    pub(super) fn finish(mut self) -> (Digest, Chunks) {
        if self.filled > 0 {
            self.done.push(self.chunk.finalize().into());
        }
        let whole = self.whole.finish();
        match self.done.len() {
            0 | 1 => (whole, Chunks::single(whole)),
            _ => (whole, Chunks(self.done.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_do_not_depend_on_how_the_bytes_come() {
        let bytes: Vec<u8> = (0..CHUNK_SIZE * 2 + 7).map(|i| (i * 31 % 251) as u8).collect();
        for piece in [1000, CHUNK_SIZE as usize, 300_000, bytes.len()] {
            let mut hasher = ChunkHasher::default();
            bytes.chunks(piece).for_each(|piece| hasher.update(piece));
            let (whole, chunks) = hasher.finish();
            assert_eq!(whole, Digest::of(&bytes));
            for (at, chunk) in bytes.chunks(CHUNK_SIZE as usize).enumerate() {
                assert!(chunks.has(at, chunk) && !chunks.has(at, &chunk[1..]) && !chunks.has(at + 1, chunk));
            }
            assert_eq!(Chunks::from_bytes(&chunks.to_bytes(), bytes.len() as u64), Some(chunks));
        }
        let exact = Chunks::of(&bytes[..CHUNK_SIZE as usize]);
        assert_eq!(exact, Chunks::single(Digest::of(&bytes[..CHUNK_SIZE as usize])));
        assert!(exact.has(0, &bytes[..CHUNK_SIZE as usize]) && !exact.has(0, &bytes));
        assert_eq!(Chunks::of(b""), Chunks::single(Digest::of(b"")));
        assert_eq!(Chunks::from_bytes(&exact.to_bytes(), CHUNK_SIZE + 1), None, "one digest is missing");
        assert_eq!(Chunks::from_bytes(&[0; 33], 1), None);
    }
}
