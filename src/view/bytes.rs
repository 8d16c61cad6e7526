//! Bytes of files: from a pack or a blob of the store, by position.
//!
//! A read needs nothing but the inode number: its place is kept in a bounded memory and found again in the catalog.
//!
//! An object stays open only as long as it is good. After a failure it is opened once more by its name: the file may
//! have been repaired under it, or the server of the NAS may have changed and call every old handle stale.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::lru::Lru;
use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::Store;

/// Packs and blobs kept open. With the catalogs this stays below the usual limit of 1024 descriptors.
const OPEN_MAX: usize = 256;

/// An object of the store that has bytes of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    Pack(Digest),
    Blob(Digest),
}

/// Where the bytes of a file lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) holder: Holder,
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// Open packs and blobs.
#[derive(Debug)]
pub(super) struct Objects {
    files: Lru<Holder, Arc<File>>,
}

impl Objects {
    pub(super) fn new() -> Self {
        Objects { files: Lru::new(OPEN_MAX) }
    }

    /// Up to `size` bytes from `offset` on; fewer only at the end of the file.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when the object is missing or too short.
    pub(super) fn read(&self, store: &Store, at: &Location, offset: u64, size: u32) -> Result<Vec<u8>> {
        let size = u64::from(size).min(at.size.saturating_sub(offset));
        let mut bytes = vec![0u8; size as usize];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        let position = at.offset.checked_add(offset).ok_or_else(|| short(&path(store, at.holder)))?;
        if let Err(error) = self.read_at(store, at.holder, position, &mut bytes) {
            tracing::debug!(error = error.chain(), "an object is opened again");
            self.read_at(store, at.holder, position, &mut bytes)?;
        }
        Ok(bytes)
    }

    fn read_at(&self, store: &Store, holder: Holder, position: u64, bytes: &mut [u8]) -> Result<()> {
        let file = self.open(store, holder)?;
        file.read_exact_at(bytes, position).map_err(|error| {
            self.files.remove(&holder);
            let path = path(store, holder);
            match error.kind() {
                std::io::ErrorKind::UnexpectedEof => short(&path),
                _ => Error::io("reading", &path, error),
            }
        })
    }

    /// How many bytes an object has.
    pub(super) fn length(&self, store: &Store, holder: Holder) -> Result<u64> {
        let file = self.open(store, holder)?;
        Ok(file.metadata().at("reading", path(store, holder))?.len())
    }

    /// The open file of an object.
    pub(super) fn open(&self, store: &Store, holder: Holder) -> Result<Arc<File>> {
        self.files.get_or(holder, || {
            let path = path(store, holder);
            let file = File::open(&path).at("opening", &path).map_err(|error| match error.is_not_found() {
                true => Error::new(Kind::Corrupt, format!("{} is missing from the store", path.display()))
                    .hint("run `envfabric fsck` to see which environments need it"),
                false => error,
            })?;
            Ok(Arc::new(file))
        })
    }
}

fn path(store: &Store, holder: Holder) -> PathBuf {
    match holder {
        Holder::Pack(digest) => store.pack_path(&digest),
        Holder::Blob(digest) => store.blob_path(&digest),
    }
}

fn short(path: &std::path::Path) -> Error {
    Error::new(Kind::Corrupt, format!("{} is shorter than its catalog says", path.display()))
        .hint("run `envfabric fsck` to see which environments need it")
}
