//! Objects: what is named by the digest of its bytes, and how it lies in the store.
//!
//! A store is either *raw*: an object's file has the object's bytes; or *packed* (feature `zstd-objects`): the file has
//! each chunk compressed by itself, so that any of them can be had alone.
//!
//! ```text
//! packed object    "envfabric-zobj2\n"
//!                  u64 bytes of the object
//!                  per chunk: u32 stored length; the top bit says that the bytes are as they are
//!                  32 bytes sha256 of that number and the lengths
//!                  per chunk: its bytes as a zstd frame, or as they are where that is not shorter
//! ```
//!
//! What says where the chunks are comes first, so that one request brings it together with the first of them, which are
//! those that are used first. Numbers are little-endian. Nothing in it is trusted: whoever reads compares chunks with their digests, which come
//! from elsewhere.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::ops::Range;
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

const MAGIC: &[u8; 16] = b"envfabric-zobj2\n";
/// Of a stored length: the chunk is not compressed.
const AS_IT_IS: u32 = 1 << 31;
/// Where the lengths begin.
const LENGTHS: usize = MAGIC.len() + 8;
/// So many bytes of a packed object are read when it is opened: what one request of a network file system brings.
const HEAD: u64 = 1 << 20;
/// Requests are for whole pages.
const PAGE: u64 = 4096;
/// Chunks of a request at most, however well they are compressed: somebody waits for them to be unpacked.
pub(crate) const REQUEST_MAX: u64 = 32;

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
        self.in_room(object.room.name(), &object.digest.to_string())
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
        let Ok(file) = ObjectFile::open_with(self, object, 0) else { return false };
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
        let mut writer = ObjectWriter::new(self, object.size)?;
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
        let mut writer = ObjectWriter::new(self, object.size)?;
        let (size, copied) = publish::copy_hashing(&mut input, source, |bytes| writer.write(bytes))?;
        if copied != *digest || size != object.size {
            return Err(Error::new(Kind::Failed, format!("{} changed while it was read", source.display()))
                .hint("run the command again"));
        }
        writer.publish(&object, trust)
    }
}

/// An object that is being written.
pub(super) struct ObjectWriter<'s> {
    store: &'s Store,
    temporary: Temporary,
    sink: Sink<BufWriter<Writing>>,
}

impl<'s> ObjectWriter<'s> {
    /// Of an object of `size` bytes.
    pub(super) fn new(store: &'s Store, size: u64) -> Result<Self> {
        let mut temporary = Temporary::create(&store.root)?;
        let path = temporary.path().to_path_buf();
        let out = BufWriter::with_capacity(1 << 20, temporary.file().try_clone().at("writing", &path)?);
        let sink = Sink::new(out, store.codec(), size).at("writing", &path)?;
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
    /// The first chunk of each request, see [`ObjectFile::request`].
    requests: Box<[u32]>,
}

/// Where the chunks of a packed object are.
#[derive(Debug)]
struct Packed {
    /// Stored lengths, as they are in the file.
    lengths: Box<[u32]>,
    /// Where each begins, and where the last ends.
    starts: Box<[u64]>,
    /// The first bytes of the file, all where it is short.
    head: Box<[u8]>,
}

/// Chunks of an object as they are stored.
#[derive(Debug)]
pub struct StoredChunks {
    path: PathBuf,
    first: u64,
    frames: Vec<Frame>,
    bytes: Vec<u8>,
}

/// One of them.
#[derive(Debug)]
struct Frame {
    bytes: Range<usize>,
    is_packed: bool,
    /// Bytes of the chunk.
    length: usize,
}

impl ObjectFile {
    /// Opens `object` in `store`.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it is missing or is not as it was written.
    pub fn open(store: &Store, object: &Object) -> Result<ObjectFile> {
        ObjectFile::open_with(store, object, HEAD)
    }

    /// Opens `object`, with so many of its first bytes, or more.
    fn open_with(store: &Store, object: &Object, head: u64) -> Result<ObjectFile> {
        let path = store.object_path(object);
        let file = store.open_object(object)?;
        // What is asked for is what is needed: more, read ahead by the kernel, would be requests for nothing.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        let packed = match store.codec() {
            Codec::Raw => None,
            Codec::Zstd => Some(Packed::read(&file, &path, object.size, head)?),
        };
        let mut opened = ObjectFile { file, path, object: *object, packed, requests: Box::default() };
        opened.requests = opened.cut();
        Ok(opened)
    }

    /// The first chunk of each request.
    fn cut(&self) -> Box<[u32]> {
        let mut firsts = vec![0];
        // The head is there already.
        let mut begin = self.packed.as_ref().map_or(0, |packed| packed.head.len() as u64);
        for at in 1..self.object.chunks() {
            let first = firsts.last().copied().unwrap_or_default();
            let fits = self.start(at + 1).is_ok_and(|end| end.saturating_sub(begin) <= HEAD);
            if !fits || at - u64::from(first) >= REQUEST_MAX {
                firsts.push(u32::try_from(at).unwrap_or(u32::MAX));
                begin = self.start(at).unwrap_or_default().max(begin) / PAGE * PAGE;
            }
        }
        firsts.into()
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
                read_exact(&file, &path, &mut number, MAGIC.len() as u64)?;
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
        self.read_chunks(0, self.object.chunks())
    }

    /// The sha256 of its bytes, all of which are read.
    pub fn hash(&self) -> Result<Digest> {
        self.hash_paced(&|_| ())
    }

    /// The same; `pace` is told before so many bytes are read, and may wait.
    pub(super) fn hash_paced(&self, pace: &dyn Fn(u64)) -> Result<Digest> {
        const AT_ONCE: u64 = 16;
        let mut hasher = Hasher::default();
        let mut at = 0;
        while at < self.object.chunks() {
            let count = AT_ONCE.min(self.object.chunks() - at);
            pace((at..at + count).map(|at| self.object.chunk_size(at)).sum());
            hasher.update(&self.read_chunks(at, count)?);
            at += count;
        }
        Ok(hasher.finish())
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of `count` chunks from chunk `first` on; not compared with any digest.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the file is too short or does not unpack to as many bytes as it should.
    pub fn read_chunks(&self, first: u64, count: u64) -> Result<Vec<u8>> {
        let stored = self.read_stored(first, count)?;
        if self.packed.is_none() {
            return Ok(stored.bytes);
        }
        let mut bytes = Vec::with_capacity((first..first + count).map(|at| self.object.chunk_size(at) as usize).sum());
        for at in first..first + count {
            bytes.append(&mut stored.unpack(at)?);
        }
        Ok(bytes)
    }

    /// Chunks `first..first + count` as they are stored, in one request at most.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the file is too short.
    pub fn read_stored(&self, first: u64, count: u64) -> Result<StoredChunks> {
        let (start, end) = (self.start(first)?, self.start(first + count)?);
        let mut bytes = vec![0; (end - start) as usize];
        let head = self.packed.as_ref().and_then(|packed| packed.head.get(start as usize..)).unwrap_or_default();
        let known = head.len().min(bytes.len());
        bytes[..known].copy_from_slice(&head[..known]);
        if known < bytes.len() {
            read_exact(&self.file, &self.path, &mut bytes[known..], start + known as u64)?;
        }
        let frame = |at: u64| {
            let bytes = (self.start(at)? - start) as usize..(self.start(at + 1)? - start) as usize;
            let is_packed = self.packed.as_ref().is_some_and(|packed| packed.lengths[at as usize] & AS_IT_IS == 0);
            Ok(Frame { bytes, is_packed, length: self.object.chunk_size(at) as usize })
        };
        let frames = (first..first + count).map(frame).collect::<Result<_>>()?;
        Ok(StoredChunks { path: self.path.clone(), first, frames, bytes })
    }

    /// Chunk `at` with those around it that one request of a network file system brings together: any two chunks of an
    /// object are either brought by the same request or by different ones.
    pub fn request(&self, at: u64) -> Range<u64> {
        let behind = self.requests.partition_point(|first| u64::from(*first) <= at);
        let end = self.requests.get(behind).map_or(self.object.chunks(), |end| u64::from(*end));
        u64::from(self.requests[..behind].last().copied().unwrap_or_default())..end
    }

    /// Where chunk `at` begins in the file; the one behind the last, where that ends.
    fn start(&self, at: u64) -> Result<u64> {
        let start = match &self.packed {
            None => (at <= self.object.chunks()).then(|| (at * CHUNK_SIZE).min(self.object.size)),
            Some(packed) => usize::try_from(at).ok().and_then(|at| packed.starts.get(at)).copied(),
        };
        start.ok_or_else(|| Error::new(Kind::Failed, format!("{} has no chunk {at}", self.path.display())))
    }
}

impl StoredChunks {
    /// How many bytes they have as they are stored.
    pub fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The file they are from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of chunk `at`, one of them; not compared with any digest.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it does not unpack to as many bytes as it should.
    pub fn unpack(&self, at: u64) -> Result<Vec<u8>> {
        let frame = at.checked_sub(self.first).and_then(|at| self.frames.get(at as usize));
        let unpacked = frame.and_then(|frame| {
            let bytes = self.bytes.get(frame.bytes.clone())?;
            let unpacked = match frame.is_packed {
                true => zstd::bulk::decompress(bytes, frame.length).ok()?,
                false => bytes.to_vec(),
            };
            (unpacked.len() == frame.length).then_some(unpacked)
        });
        unpacked.ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("{} has a damaged chunk {at}", self.path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        })
    }
}

/// Reads all of `bytes` from `offset` on.
fn read_exact(file: &File, path: &Path, bytes: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::Corrupt, format!("{} is shorter than its catalog says", path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        }
        _ => Error::io("reading", path, error),
    })
}

impl Packed {
    /// What says where the chunks of an object of `size` bytes are, with `head` of the first bytes, or more.
    fn read(file: &File, path: &Path, size: u64, head: u64) -> Result<Packed> {
        let damaged = || {
            Error::new(Kind::Corrupt, format!("{} is not a packed object of {size} bytes", path.display()))
                .hint("run `envfabric fsck` to see which environments need it")
        };
        let stored = file.metadata().at("reading", path)?.len();
        let count = Chunks::count(size);
        // A size that no file can have is somebody's lie.
        let first = count.checked_mul(4).and_then(|lengths| lengths.checked_add(LENGTHS as u64 + 32));
        let first = first.filter(|first| *first <= stored).ok_or_else(damaged)?;
        let mut head = vec![0; stored.min(first.max(head)) as usize];
        read_exact(file, path, &mut head, 0)?;
        let (table, seal) = head[..first as usize].split_at(first as usize - 32);
        let counted = table.strip_prefix(MAGIC).ok_or_else(damaged)?;
        let (number, lengths) = counted.split_at(8);
        if Digest::of(counted).as_bytes() != seal || number != size.to_le_bytes() {
            return Err(damaged());
        }
        let lengths: Box<[u32]> = lengths.as_chunks::<4>().0.iter().map(|n| u32::from_le_bytes(*n)).collect();
        let mut at = first;
        let mut starts = Vec::with_capacity(lengths.len() + 1);
        for length in &lengths {
            starts.push(at);
            at += u64::from(length & !AS_IT_IS);
        }
        starts.push(at);
        if at != stored {
            return Err(damaged());
        }
        Ok(Packed { lengths, starts: starts.into(), head: head.into() })
    }
}

/// Writes an object's bytes in the way of its store.
pub(super) enum Sink<W: Write + Seek> {
    Raw(W),
    Packed { out: W, level: i32, chunk: Vec<u8>, table: Vec<u8>, size: u64 },
}

impl<W: Write + Seek> Sink<W> {
    /// For `size` bytes into `out`, which is empty.
    pub(super) fn new(mut out: W, codec: Codec, size: u64) -> io::Result<Self> {
        Ok(match codec {
            Codec::Raw => Sink::Raw(out),
            Codec::Zstd => {
                // Filled in at the end.
                let first = LENGTHS as u64 + Chunks::count(size) * 4 + 32;
                io::copy(&mut io::repeat(0).take(first), &mut out)?;
                let chunk = Vec::with_capacity(CHUNK_SIZE as usize);
                Sink::Packed { out, level: LEVEL, chunk, table: size.to_le_bytes().into(), size: 0 }
            }
        })
    }

    /// Takes the next bytes.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Raw(out) => out.write_all(bytes),
            Sink::Packed { chunk, .. } if chunk.len() + bytes.len() < CHUNK_SIZE as usize => {
                chunk.extend_from_slice(bytes);
                Ok(())
            }
            Sink::Packed { out, level, chunk, table, size } => {
                while !bytes.is_empty() {
                    let (now, rest) = bytes.split_at((CHUNK_SIZE as usize - chunk.len()).min(bytes.len()));
                    chunk.extend_from_slice(now);
                    bytes = rest;
                    if chunk.len() == CHUNK_SIZE as usize {
                        pack(out, *level, chunk, table, size)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// All was written.
    ///
    /// # Errors
    /// When it is not as much as was said.
    pub(super) fn finish(self) -> io::Result<()> {
        match self {
            Sink::Raw(mut out) => out.flush(),
            Sink::Packed { mut out, level, mut chunk, mut table, mut size } => {
                if !chunk.is_empty() || table.len() == 8 {
                    pack(&mut out, level, &mut chunk, &mut table, &mut size)?;
                }
                if table[..8] != size.to_le_bytes() {
                    return Err(io::Error::other("it has another length than was said"));
                }
                out.seek(io::SeekFrom::Start(0))?;
                out.write_all(MAGIC)?;
                out.write_all(&table)?;
                out.write_all(Digest::of(&table).as_bytes())?;
                out.flush()
            }
        }
    }
}

/// How hard objects are compressed: see docs/benchmarks.md.
const LEVEL: i32 = 3;

fn pack(out: &mut impl Write, level: i32, chunk: &mut Vec<u8>, table: &mut Vec<u8>, size: &mut u64) -> io::Result<()> {
    let packed = zstd::bulk::compress(chunk, level)?;
    // What saves next to nothing is not worth unpacking.
    let length = if packed.len() < chunk.len() - chunk.len() / 16 {
        out.write_all(&packed)?;
        packed.len() as u32
    } else {
        out.write_all(chunk)?;
        chunk.len() as u32 | AS_IT_IS
    };
    table.extend(length.to_le_bytes());
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
                    assert_eq!(file.read_chunks(at as u64, 1).unwrap(), chunk);
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
