//! Objects: what is named by the digest of its bytes, and how it lies in the store.
//!
//! A store is either *raw*: an object's file has the object's bytes; or *packed* (feature `zstd-objects`): the file has
//! each chunk compressed by itself, so that any of them can be had alone.
//!
//! ```text
//! packed object    "envfabric-zobj1\n"
//!                  per chunk: its bytes as a zstd frame, or as they are where that is not shorter
//!                  per chunk: u32 stored length; the top bit says that the bytes are as they are
//!                  u64 bytes of the object, 32 bytes sha256 of the lengths and of that number
//! ```
//!
//! Numbers are little-endian. Nothing in it is trusted: whoever reads compares chunks with their digests, which come
//! from elsewhere.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use super::chunks::{CHUNK_SIZE, Chunks};
use super::disk::Writing;
use super::publish::{self, Temporary, Trust};
use super::{Codec, Store};
use crate::environment::{Digest, Hasher};
use crate::error::{Error, IoContext, Kind, Result};

const MAGIC: &[u8; 16] = b"envfabric-zobj1\n";
/// Of a stored length: the chunk is not compressed.
const AS_IT_IS: u32 = 1 << 31;
/// Bytes of the number and digest at the end.
const END: u64 = 8 + 32;
/// A packed object that is no longer than this is read in one go.
const SMALL: u64 = 1 << 20;

/// Where in the store objects of one sort are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Room {
    /// Large files, and documents that are shown.
    Blobs,
    /// Small files of a layer.
    Packs,
    /// SQLite files.
    Catalogs,
}

impl Room {
    /// All of them.
    pub const ALL: [Room; 3] = [Room::Blobs, Room::Packs, Room::Catalogs];

    /// The directory's name.
    pub fn name(self) -> &'static str {
        match self {
            Room::Blobs => "blobs",
            Room::Packs => "packs",
            Room::Catalogs => "catalogs",
        }
    }
}

/// One object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Object {
    /// Where it is.
    pub room: Room,
    /// sha256 of its bytes.
    pub digest: Digest,
    /// Its length in bytes, unpacked.
    pub size: u64,
}

impl Object {
    /// Length of chunk `at`, in bytes.
    pub fn chunk_size(&self, at: u64) -> u64 {
        self.size.saturating_sub(at * CHUNK_SIZE).min(CHUNK_SIZE)
    }

    /// How many chunks it has.
    pub fn chunks(&self) -> u64 {
        Chunks::count(self.size)
    }

    /// `packs/1a2b3c...`, for people.
    pub fn label(&self) -> String {
        format!("{}/{}", self.room.name(), self.digest)
    }
}

impl Store {
    /// Where an object lies.
    pub fn object_path(&self, object: &Object) -> PathBuf {
        self.sharded(object.room.name(), &object.digest.to_string())
    }

    /// The file of an object, as it lies there.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it is missing: something names it.
    pub(crate) fn open_object(&self, object: &Object) -> Result<File> {
        let path = self.object_path(object);
        match self.open_anywhere(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(self.missing(&path.display().to_string()))
            }
            other => Ok(other.at("opening", &path)?.0),
        }
    }

    /// True when `object` is there, as far as `trust` asks, to be used for something new.
    pub(super) fn has_object(&self, object: &Object, trust: Trust) -> bool {
        // The open is what revalidates on NFS; the size is asked of the handle.
        if self.reuse(&self.object_path(object)).is_err() {
            return false;
        }
        let Ok(file) = ObjectFile::open(self, object) else { return false };
        let has_size = match self.codec() {
            Codec::Raw => file.file.metadata().is_ok_and(|meta| meta.len() == object.size),
            Codec::Zstd => true,
        };
        has_size && (trust == Trust::Length || file.hash().is_ok_and(|found| found == object.digest))
    }

    /// Makes sure that an object with these bytes, whose digest is `digest`, is there.
    pub(super) fn ensure_bytes(&self, room: Room, bytes: &[u8], digest: &Digest, trust: Trust) -> Result<()> {
        let object = Object { room, digest: *digest, size: bytes.len() as u64 };
        if self.has_object(&object, trust) {
            return Ok(());
        }
        let mut writer = ObjectWriter::new(self)?;
        writer.write(bytes)?;
        writer.publish(&object, trust)
    }

    /// Makes sure that an object with the bytes of the file `source`, whose digest is `digest`, is there.
    pub(super) fn ensure_file(&self, room: Room, source: &Path, digest: &Digest, trust: Trust) -> Result<()> {
        let mut input = File::open(source).at("opening", source)?;
        let object = Object { room, digest: *digest, size: input.metadata().at("reading", source)?.len() };
        if self.has_object(&object, trust) {
            return Ok(());
        }
        let mut writer = ObjectWriter::new(self)?;
        let (size, copied) = publish::copy_hashing(&mut input, source, |bytes| writer.write(bytes))?;
        if copied != *digest {
            return Err(Error::new(Kind::Failed, format!("{} changed while it was read", source.display()))
                .hint("run the command again"));
        }
        writer.publish(&Object { size, ..object }, trust)
    }
}

/// An object that is being written.
pub(super) struct ObjectWriter<'s> {
    store: &'s Store,
    temporary: Temporary,
    sink: Sink<BufWriter<Writing>>,
}

impl<'s> ObjectWriter<'s> {
    pub(super) fn new(store: &'s Store) -> Result<Self> {
        let mut temporary = Temporary::create(&store.root)?;
        let path = temporary.path().to_path_buf();
        let out = BufWriter::with_capacity(1 << 20, temporary.file().try_clone().at("writing", &path)?);
        let sink = Sink::new(out, store.codec()).at("writing", &path)?;
        Ok(ObjectWriter { store, temporary, sink })
    }

    /// Takes the next bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write(bytes).at("writing", self.temporary.path())
    }

    /// Gives what was written the name of `object`, unless that is there already as far as `trust` asks.
    pub(super) fn publish(self, object: &Object, trust: Trust) -> Result<()> {
        self.sink.finish().at("writing", self.temporary.path())?;
        let target = self.store.object_path(object);
        self.temporary.link_or_repair(&target, || self.store.has_object(object, trust))
    }
}

/// An object of a store, open.
#[derive(Debug)]
pub struct ObjectFile {
    file: File,
    path: PathBuf,
    object: Object,
    packed: Option<Packed>,
}

/// Where the chunks of a packed object are.
#[derive(Debug)]
struct Packed {
    /// Stored lengths, as they are in the file.
    lengths: Box<[u32]>,
    /// Where each begins.
    starts: Box<[u64]>,
    /// The whole file where it is short.
    whole: Option<Box<[u8]>>,
}

impl ObjectFile {
    /// Opens `object` in `store`.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it is missing or is not as it was written.
    pub fn open(store: &Store, object: &Object) -> Result<ObjectFile> {
        let path = store.object_path(object);
        let file = store.open_object(object)?;
        // What is asked for is what is needed: more, read ahead by the kernel, would be requests for nothing.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        let packed = match store.codec() {
            Codec::Raw => None,
            Codec::Zstd => Some(Packed::read(&file, &path, object.size)?),
        };
        Ok(ObjectFile { file, path, object: *object, packed })
    }

    /// Opens what lies under the name of an object; its length is told by the file itself.
    pub(super) fn open_named(store: &Store, room: Room, digest: Digest) -> Result<ObjectFile> {
        let path = store.object_path(&Object { room, digest, size: 0 });
        let (file, _) = store.open_anywhere(&path).at("opening", &path)?;
        let stored = file.metadata().at("reading", &path)?.len();
        let size = match store.codec() {
            Codec::Raw => stored,
            Codec::Zstd => {
                let mut number = [0; 8];
                let at = stored.checked_sub(END).unwrap_or(u64::MAX >> 1);
                read_exact(&file, &path, &mut number, at)?;
                u64::from_le_bytes(number)
            }
        };
        ObjectFile::open(store, &Object { room, digest, size })
    }

    /// Its length in bytes, unpacked.
    pub fn size(&self) -> u64 {
        self.object.size
    }

    /// All of its bytes, which should not be many.
    pub fn read(&self) -> Result<Vec<u8>> {
        Ok(self.read_chunks(0, self.object.chunks())?.0)
    }

    /// The sha256 of its bytes, all of which are read.
    pub fn hash(&self) -> Result<Digest> {
        self.hash_paced(&|_| ())
    }

    /// The same; `pace` is told before so many bytes are read, and may wait.
    pub(super) fn hash_paced(&self, pace: &dyn Fn(u64)) -> Result<Digest> {
        if self.packed.is_some() {
            let mut magic = [0; MAGIC.len()];
            read_exact(&self.file, &self.path, &mut magic, 0)?;
            if &magic != MAGIC {
                return Err(Error::new(Kind::Corrupt, format!("{} is not a packed object", self.path.display())));
            }
        }
        const AT_ONCE: u64 = 16;
        let mut hasher = Hasher::default();
        let mut at = 0;
        while at < self.object.chunks() {
            let count = AT_ONCE.min(self.object.chunks() - at);
            pace((at..at + count).map(|at| self.object.chunk_size(at)).sum());
            hasher.update(&self.read_chunks(at, count)?.0);
            at += count;
        }
        Ok(hasher.finish())
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of `count` chunks from chunk `first` on, in one request where they are not packed small; not compared
    /// with any digest. Also tells how many bytes were asked of the store.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the file is too short or does not unpack to as many bytes as it should.
    pub fn read_chunks(&self, first: u64, count: u64) -> Result<(Vec<u8>, u64)> {
        let size = (first..first + count).map(|at| self.object.chunk_size(at)).sum::<u64>() as usize;
        match &self.packed {
            None => {
                let mut bytes = vec![0; size];
                read_exact(&self.file, &self.path, &mut bytes, first * CHUNK_SIZE)?;
                Ok((bytes, size as u64))
            }
            Some(packed) => packed.unpack(self, first as usize, count as usize, size),
        }
    }
}

/// Reads all of `bytes` from `offset` on.
fn read_exact(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::Corrupt, format!("{} is shorter than its catalog says", path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        }
        _ => Error::io("reading", path, error),
    })
}

impl Packed {
    fn read(file: &File, path: &Path, size: u64) -> Result<Packed> {
        let damaged = || {
            Error::new(Kind::Corrupt, format!("{} is not a packed object of {size} bytes", path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        };
        let stored = file.metadata().at("reading", path)?.len();
        let count = Chunks::count(size) as usize;
        let table = count as u64 * 4 + END;
        let from = stored.checked_sub(table).filter(|from| *from >= MAGIC.len() as u64).ok_or_else(damaged)?;
        let whole = match stored <= SMALL {
            true => {
                let mut bytes = vec![0; stored as usize];
                read_exact(file, path, &mut bytes, 0)?;
                Some(bytes.into_boxed_slice())
            }
            false => None,
        };
        let table = match &whole {
            Some(whole) => whole[from as usize..].to_vec(),
            None => {
                let mut bytes = vec![0; table as usize];
                read_exact(file, path, &mut bytes, from)?;
                bytes
            }
        };
        let (counted, seal) = table.split_at(table.len() - 32);
        let (lengths, number) = counted.split_at(count * 4);
        if Digest::of(counted).as_bytes() != seal || number != size.to_le_bytes() {
            return Err(damaged());
        }
        let lengths: Box<[u32]> = lengths.as_chunks::<4>().0.iter().map(|n| u32::from_le_bytes(*n)).collect();
        let mut at = MAGIC.len() as u64;
        let mut starts = Vec::with_capacity(count + 1);
        for length in &lengths {
            starts.push(at);
            at += u64::from(length & !AS_IT_IS);
        }
        starts.push(at);
        if at != from {
            return Err(damaged());
        }
        Ok(Packed { lengths, starts: starts.into(), whole })
    }

    fn unpack(&self, of: &ObjectFile, first: usize, count: usize, size: usize) -> Result<(Vec<u8>, u64)> {
        let (Some(start), Some(end)) = (self.starts.get(first), self.starts.get(first + count)) else {
            return Err(Error::new(Kind::Failed, format!("{} has no such chunk", of.path.display())));
        };
        let stored: std::borrow::Cow<'_, [u8]> = match &self.whole {
            Some(whole) => whole[*start as usize..*end as usize].into(),
            None => {
                let mut bytes = vec![0; (end - start) as usize];
                read_exact(&of.file, &of.path, &mut bytes, *start)?;
                bytes.into()
            }
        };
        let mut bytes = Vec::with_capacity(size);
        let mut rest = &stored[..];
        for at in first..first + count {
            let (frame, behind) = rest.split_at((self.lengths[at] & !AS_IT_IS) as usize);
            rest = behind;
            if self.lengths[at] & AS_IT_IS != 0 {
                bytes.extend_from_slice(frame);
                continue;
            }
            let length = of.object.chunk_size(at as u64) as usize;
            let unpacked = zstd::bulk::decompress(frame, length).ok().filter(|bytes| bytes.len() == length);
            bytes.extend(unpacked.ok_or_else(|| {
                Error::new(Kind::Corrupt, format!("{} has a damaged chunk {at}", of.path.display()))
                    .hint("run `envfabric fsck` to see which environments need it")
            })?);
        }
        Ok((bytes, stored.len() as u64))
    }
}

/// Writes an object's bytes in the way of its store.
pub(super) enum Sink<W: Write> {
    Raw(W),
    Packed { out: W, level: i32, chunk: Vec<u8>, lengths: Vec<u8>, size: u64 },
}

impl<W: Write> Sink<W> {
    /// Into `out`, which is empty.
    pub(super) fn new(mut out: W, codec: Codec) -> std::io::Result<Self> {
        Ok(match codec {
            Codec::Raw => Sink::Raw(out),
            Codec::Zstd => {
                out.write_all(MAGIC)?;
                let chunk = Vec::with_capacity(CHUNK_SIZE as usize);
                Sink::Packed { out, level: LEVEL, chunk, lengths: Vec::new(), size: 0 }
            }
        })
    }

    /// Takes the next bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Sink::Raw(out) => out.write_all(bytes),
            Sink::Packed { chunk, .. } if chunk.len() + bytes.len() < CHUNK_SIZE as usize => {
                chunk.extend_from_slice(bytes);
                Ok(())
            }
            Sink::Packed { out, level, chunk, lengths, size } => {
                while !bytes.is_empty() {
                    let (now, rest) = bytes.split_at((CHUNK_SIZE as usize - chunk.len()).min(bytes.len()));
                    chunk.extend_from_slice(now);
                    bytes = rest;
                    if chunk.len() == CHUNK_SIZE as usize {
                        pack(out, *level, chunk, lengths, size)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// All was written.
    pub(super) fn finish(self) -> std::io::Result<()> {
        match self {
            Sink::Raw(mut out) => out.flush(),
            Sink::Packed { mut out, level, mut chunk, mut lengths, mut size } => {
                if !chunk.is_empty() || lengths.is_empty() {
                    pack(&mut out, level, &mut chunk, &mut lengths, &mut size)?;
                }
                lengths.extend(size.to_le_bytes());
                out.write_all(&lengths)?;
                out.write_all(Digest::of(&lengths).as_bytes())?;
                out.flush()
            }
        }
    }
}

/// How hard objects are compressed: see docs/benchmarks.md.
const LEVEL: i32 = 3;

fn pack(
    out: &mut impl Write,
    level: i32,
    chunk: &mut Vec<u8>,
    lengths: &mut Vec<u8>,
    size: &mut u64,
) -> std::io::Result<()> {
    let packed = zstd::bulk::compress(chunk, level)?;
    // What saves next to nothing is not worth unpacking.
    let length = if packed.len() < chunk.len() - chunk.len() / 16 {
        out.write_all(&packed)?;
        packed.len() as u32
    } else {
        out.write_all(chunk)?;
        chunk.len() as u32 | AS_IT_IS
    };
    lengths.extend(length.to_le_bytes());
    *size += chunk.len() as u64;
    chunk.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn stores(dir: &Path) -> [Store; 2] {
        [Codec::Raw, Codec::Zstd].map(|codec| Store::init_with(&dir.join(format!("{codec:?}")), codec).unwrap())
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(|at| if at / 300_000 % 2 == 0 { (at % 7) as u8 } else { next() }).collect()
    }

    #[test]
    fn whatever_was_written_is_read_back_chunk_by_chunk() {
        let dir = tempfile::tempdir().unwrap();
        for store in stores(dir.path()) {
            for length in [0, 1, CHUNK_SIZE as usize, CHUNK_SIZE as usize + 1, 3_000_000] {
                let bytes = noise(length);
                let object = Object { room: Room::Blobs, digest: Digest::of(&bytes), size: length as u64 };
                store.ensure_bytes(Room::Blobs, &bytes, &object.digest, Trust::Length).unwrap();
                let file = ObjectFile::open(&store, &object).unwrap();
                assert_eq!((file.read().unwrap(), file.hash().unwrap()), (bytes.clone(), object.digest));
                for (at, chunk) in bytes.chunks(CHUNK_SIZE as usize).enumerate() {
                    assert_eq!(file.read_chunks(at as u64, 1).unwrap().0, chunk);
                }
                let named = ObjectFile::open_named(&store, Room::Blobs, object.digest).unwrap();
                assert_eq!(named.size(), length as u64);
                assert!(store.has_object(&object, Trust::Nothing));
                assert!(!store.has_object(&Object { size: object.size + 1, ..object }, Trust::Length));
            }
        }
    }

    #[test]
    fn a_copy_that_is_not_what_its_name_says_is_never_published() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::write(&source, b"changed").unwrap();
        let digest = Digest::of(b"as it was");
        for store in stores(dir.path()) {
            assert!(store.ensure_file(Room::Blobs, &source, &digest, Trust::Length).is_err());
            assert!(!store.blob_path(&digest).exists());
        }
    }

    #[test]
    fn a_damaged_object_is_replaced_by_the_bytes_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for store in stores(dir.path()) {
            let content = noise(700_000);
            let object = Object { room: Room::Blobs, digest: Digest::of(&content), size: content.len() as u64 };
            let target = store.object_path(&object);
            let ensure = |trust| store.ensure_bytes(Room::Blobs, &content, &object.digest, trust).unwrap();
            ensure(Trust::Length);
            let stored = fs::read(&target).unwrap();
            let damage = |bytes: &[u8]| {
                fs::remove_file(&target).unwrap();
                fs::write(&target, bytes).unwrap();
            };
            for cut in [0, 10, stored.len() - 1] {
                damage(&stored[..cut]);
                assert!(!store.has_object(&object, Trust::Length));
                ensure(Trust::Length);
                assert_eq!(fs::read(&target).unwrap(), stored);
            }
            for bit in (0..stored.len() * 8).step_by(stored.len() * 8 / 50) {
                let mut flipped = stored.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                damage(&flipped);
                assert!(!store.has_object(&object, Trust::Nothing), "bit {bit}");
            }
            ensure(Trust::Nothing);
            assert_eq!(fs::read(&target).unwrap(), stored);
            assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
        }
    }
}
