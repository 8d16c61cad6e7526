//! Objects: what is named by the digest of its bytes, and how it lies in the store.
//!
//! A store is either *raw*: an object's file has the object's bytes; or *packed* (feature `zstd-objects`): the file has
//! each chunk compressed by itself (`packed`).
//!
//! Nothing in it is trusted: whoever reads compares chunks with their digests, which come from elsewhere.

use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use super::chunks::{CHUNK_SIZE, Chunks};
use super::disk::Writing;
use super::packed::{HEAD, NUMBER_AT, Packed, Sink, decompress, read_exact, too_short};
use super::publish::{self, Temporary, Trust};
use super::{Codec, Store};
use crate::environment::{Digest, Hasher};
use crate::error::{Error, IoContext, Kind, Result};

/// Requests are for whole pages.
const PAGE: u64 = 4096;
/// Bytes of a document, a catalog or a summary at most, unpacked: they are read as a whole.
pub(super) const DOCUMENT_MAX: u64 = 256 << 20;
/// Chunks of a request at most, however well they are compressed: they take memory until they are unpacked.
pub(crate) const REQUEST_MAX: u64 = 128;

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

    /// Makes sure that an object with the bytes of the file `source`, whose digest and chunks are known, is there.
    pub(super) fn ensure_file(
        &self,
        room: Room,
        source: &Path,
        (digest, chunks): &(Digest, Chunks),
        trust: Trust,
    ) -> Result<()> {
        let mut input = File::open(source).at("opening", source)?;
        let object = Object { room, digest: *digest, size: input.metadata().at("reading", source)?.len() };
        if self.has_object(&object, trust) {
            return Ok(());
        }
        let changed = || {
            Error::new(Kind::Failed, format!("{} changed while it was read", source.display()))
                .hint("run the command again")
        };
        let mut writer = ObjectWriter::new(self, object.size)?;
        let mut at = 0;
        publish::read_through(&mut input, source, CHUNK_SIZE, |chunk| {
            // As strong as the digest of all of it, which was made of the same bytes, and faster.
            if !chunks.has(at, chunk) {
                return Err(changed());
            }
            at += 1;
            writer.write(chunk)
        })?;
        // An empty file has a chunk as well.
        if at.max(1) != chunks.len() {
            return Err(changed());
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
            // A size is somebody's word until the file has as much: memory is taken for what it says.
            Codec::Raw if file.metadata().at("reading", &path)?.len() < object.size => return Err(too_short(&path)),
            Codec::Raw => None,
            Codec::Zstd => Some(Packed::read(&file, &path, object.size, head)?),
        };
        let mut opened = ObjectFile { file, path, object: *object, packed, requests: Box::default() };
        opened.requests = opened.cut();
        Ok(opened)
    }

    /// The first chunk of each request.
    fn cut(&self) -> Box<[u32]> {
        let firsts = std::iter::successors(Some(0), |first| Some(self.reach(*first)));
        let firsts = firsts.take_while(|first| *first == 0 || *first < self.object.chunks());
        firsts.map(|first| u32::try_from(first).unwrap_or(u32::MAX)).collect()
    }

    /// The end of the chunks from `first` on that one request of a network file system brings together.
    pub fn reach(&self, first: u64) -> u64 {
        // The head is there already.
        let head = self.packed.as_ref().map_or(0, |packed| packed.head.len() as u64);
        let begin = self.start(first).unwrap_or_default().max(head) / PAGE * PAGE;
        let most = self.object.chunks().min(first.saturating_add(REQUEST_MAX));
        let fits = |end: &u64| self.start(*end).is_ok_and(|end| end.saturating_sub(begin) <= HEAD);
        (first + 2..=most).take_while(fits).last().unwrap_or(first + 1)
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
                read_exact(&file, &path, &mut number, NUMBER_AT)?;
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

    /// All bytes of a document or a catalog.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when there are more than [`DOCUMENT_MAX`], as there are in no such object.
    pub(super) fn read_document(&self) -> Result<Vec<u8>> {
        if self.object.size > DOCUMENT_MAX {
            let what =
                format!("{} would have {} bytes, more than a document has", self.path.display(), self.object.size);
            return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck` to see which environments need it"));
        }
        self.read()
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
        // How much it unpacks to is somebody's word.
        let mut bytes = Vec::with_capacity(stored.bytes.len());
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
            let is_packed = self.packed.as_ref().is_some_and(|packed| packed.is_packed(at as usize));
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
                true => decompress(bytes, frame.length).ok()?,
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
            assert!(store.ensure_file(Room::Blobs, &source, &(digest, Chunks::single(digest)), Trust::Length).is_err());
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
