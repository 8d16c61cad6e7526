//! Bytes of files: from a pack or a blob, by position.
//!
//! A read needs nothing but the inode number: its place is kept in a bounded memory and found again in the catalog.
//!
//! Where there is a node cache ([`crate::cache`]), it is asked. Else the store's own files are read, each of which stays
//! open only as long as it is good: after a failure it is opened once more by its name, as it may have been repaired.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Tree;
use super::loading;
use super::lru::Lru;
use crate::cache::{Cache, Held};
use crate::environment::{Digest, Document};
use crate::error::{Error, Kind, Result};
use crate::store::{CHUNK_SIZE, Object, Room, Store};

/// Packs and blobs kept open. With the catalogs this stays below the usual limit of 1024 descriptors.
const OPEN_MAX: usize = 256;

/// Where the bytes of a file lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    /// The object that has them.
    pub(super) object: Object,
    /// The layer whose catalog knows the object's chunks; none for a document.
    pub(super) layer: Option<Digest>,
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl Location {
    /// All of `object`.
    pub(super) fn whole(object: Object, layer: Option<Digest>) -> Location {
        Location { object, layer, offset: 0, size: object.size }
    }

    pub(super) fn document(document: &Document) -> Location {
        Location::whole(Object { room: Room::Blobs, digest: document.blob, size: document.size }, None)
    }
}

/// How it was found out what is needed of an object that is being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needed {
    /// A profile tells: then nothing else is asked for before it is read.
    Known,
    Guessed,
}

impl Tree {
    /// Up to `size` bytes of the file at `at` from `offset` on; fewer only at its end.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the object is missing or too short.
    pub(super) fn bytes(&self, at: &Location, offset: u64, size: u32) -> Result<Vec<u8>> {
        let size = u64::from(size).min(at.size.saturating_sub(offset));
        let end = at.offset.checked_add(at.size).filter(|end| *end <= at.object.size);
        let Some(position) = end.and_then(|_| at.offset.checked_add(offset)) else {
            let what = format!("{} is shorter than its catalog says", self.store.object_path(&at.object).display());
            return Err(Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`"));
        };
        if size == 0 {
            return Ok(Vec::new());
        }
        self.touched(at, offset, size);
        match (&self.cache, &at.layer) {
            (None, _) => self.objects.read(&self.store, &at.object, position, size),
            (Some(cache), None) => {
                let bytes = cache.document(&at.object)?;
                Ok(bytes.get(position as usize..(position + size) as usize).unwrap_or_default().to_vec())
            }
            (Some(cache), Some(layer)) => {
                let chunks = || self.with_catalog(layer, |catalog| catalog.chunks(&at.object.digest, at.object.size));
                let read = cache.read(&at.object, chunks, position, size);
                let begun = self.begun.get(&at.object);
                if at.object.room == Room::Packs && begun.is_none() && !self.is_preparing() {
                    let hot = self.layer_doc(layer)?.pack_hot.div_ceil(CHUNK_SIZE);
                    cache.ask_around(&at.object, chunks, 0, hot)?;
                    self.begun.put(at.object, Needed::Guessed);
                }
                let bytes = read?;
                if offset == 0 && size < at.size && begun != Some(Needed::Known) {
                    for range in loading::ranges(&bytes) {
                        let first = (at.offset + range.start) / CHUNK_SIZE;
                        let end = (at.offset + range.end.min(at.size)).div_ceil(CHUNK_SIZE);
                        cache.ask_around(&at.object, chunks, first, end)?;
                    }
                }
                Ok(bytes)
            }
        }
    }

    /// The file that is all of `object`, if it is on a disk of this machine, or is to be treated as if; and what keeps it
    /// there.
    pub(super) fn whole_file(&self, object: &Object) -> Result<(Option<Arc<File>>, Option<Held>)> {
        match &self.cache {
            None => self.objects.open(&self.store, object).map(|file| (Some(file), None)),
            Some(cache) => cache.hold(object).map(|(file, held)| (file, Some(held))),
        }
    }

    /// The node cache.
    pub fn cache(&self) -> Option<&Arc<Cache>> {
        self.cache.as_ref()
    }
}

/// Open packs and blobs of the store.
#[derive(Debug)]
pub(super) struct Objects {
    files: Lru<Object, Arc<File>>,
}

impl Objects {
    pub(super) fn new() -> Self {
        Objects { files: Lru::new(OPEN_MAX) }
    }

    fn read(&self, store: &Store, object: &Object, position: u64, size: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; size as usize];
        if let Err(error) = self.read_at(store, object, position, &mut bytes) {
            tracing::debug!(error = error.chain(), "an object is opened again");
            self.read_at(store, object, position, &mut bytes)?;
        }
        Ok(bytes)
    }

    fn read_at(&self, store: &Store, object: &Object, position: u64, bytes: &mut [u8]) -> Result<()> {
        let file = self.open(store, object)?;
        file.read_exact_at(bytes, position).map_err(|error| {
            self.files.remove(object);
            let path = store.object_path(object);
            match error.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    Error::new(Kind::Corrupt, format!("{} is shorter than its catalog says", path.display()))
                        .hint("run `envfabric fsck` to see which environments need it")
                }
                _ => Error::io("reading", &path, error),
            }
        })
    }

    /// How many are open.
    pub(super) fn held(&self) -> u64 {
        self.files.held()
    }

    /// How many may be.
    pub(super) fn most(&self) -> u64 {
        self.files.most()
    }

    /// The open file of an object.
    pub(super) fn open(&self, store: &Store, object: &Object) -> Result<Arc<File>> {
        self.files.get_or(*object, || store.open_object(object).map(Arc::new))
    }
}
