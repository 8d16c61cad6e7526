//! Large files that are put into a store before the layers that have them are written.
//!
//! A build compiles bytecode, which takes all processors, and a store may be far away: what can be stored meanwhile is.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::BootTime;
use super::chunks::Chunks;
use super::layer_writer::{LayerWriter, hash_bytes};
use super::object::Room;
use super::publish::hash_chunks;
use crate::environment::Digest;
use crate::error::{IoContext, Result};

/// A file of so many bytes is read once and kept in memory until it is stored; a larger one is read twice.
const IN_MEMORY: u64 = 8 << 20;

/// Large files that were stored, by the paths that they were read from.
#[derive(Debug)]
pub struct LargeFiles {
    /// Before the first of them was looked for in the store.
    pub(super) begun: BootTime,
    files: HashMap<PathBuf, Stored>,
}

/// Bytes of a file, its digest and those of its chunks.
pub(super) type Stored = (u64, (Digest, Chunks));

impl LargeFiles {
    /// What was stored of the file `source`.
    pub(super) fn get(&self, source: &Path) -> Option<&Stored> {
        self.files.get(source)
    }
}

impl LayerWriter<'_> {
    /// Stores those of `sources` that get an object each. They must not change until the layers that have them are
    /// written. Until then nothing in the store names their objects, and a collector may end them after its grace time.
    ///
    /// # Errors
    /// Those of reading the files and of writing to the store.
    pub fn store_large(&self, sources: &[PathBuf]) -> Result<LargeFiles> {
        self.store.require_writable()?;
        let begun = BootTime::now();
        let store = |source: &PathBuf| {
            let size = fs::symlink_metadata(source).at("reading", source)?.len();
            if size <= self.store.small_file_max() {
                return Ok(None);
            }
            let stored = if size <= IN_MEMORY {
                let bytes = fs::read(source).at("reading", source)?;
                let digests = hash_bytes(&bytes);
                self.store.ensure_bytes(Room::Blobs, &bytes, &digests.0, self.trust)?;
                (bytes.len() as u64, digests)
            } else {
                let (size, digests) = hash_chunks(source)?;
                self.store.ensure_file(Room::Blobs, source, &digests, self.trust)?;
                (size, digests)
            };
            Ok(Some((source.clone(), stored)))
        };
        let stored = sources.par_iter().map(store).filter_map(Result::transpose).collect::<Result<_>>()?;
        Ok(LargeFiles { begun, files: stored })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::layer_writer::tests::meta;
    use crate::store::{Codec, Staged, StagedKind, Store};

    #[test]
    fn a_layer_is_the_same_when_its_large_files_are_stored_before_it_and_what_was_collected_is_stored_again() {
        let dir = tempfile::tempdir().unwrap();
        let lengths = [1, IN_MEMORY - 7, IN_MEMORY + 7];
        let sources: Vec<PathBuf> = lengths.iter().map(|length| dir.path().join(length.to_string())).collect();
        for (source, length) in sources.iter().zip(lengths) {
            fs::write(source, (0..length).map(|n| (n * n % 251) as u8).collect::<Vec<_>>()).unwrap();
        }
        let staged = || {
            let file = |(n, source): (usize, &PathBuf)| Staged {
                path: format!("lib/{n}").into_bytes(),
                kind: StagedKind::File { source: source.clone(), executable: false },
            };
            sources.iter().enumerate().map(file).collect::<Vec<_>>()
        };
        for codec in [Codec::Raw, Codec::Zstd] {
            let store = |name: &str| Store::init_with(&dir.path().join(format!("{codec:?}-{name}")), codec).unwrap();
            let (at_once, before) = (store("at-once"), store("before"));
            let expected = LayerWriter::new(&at_once).write(meta("x"), staged()).unwrap();
            let writer = LayerWriter::new(&before);
            let mut large = writer.store_large(&sources).unwrap();
            assert_eq!(large.files.len(), 2, "the small one is in no object of its own");
            let blobs = expected.blobs.iter().map(|blob| before.blob_path(blob));
            assert!(expected.blobs.len() == 2 && blobs.clone().all(|path| path.exists()));
            // As after a long time of compiling.
            large.begun = BootTime::first();
            blobs.clone().take(1).for_each(|path| fs::remove_file(path).unwrap());
            assert_eq!(writer.write_with(meta("x"), staged(), Some(&large)).unwrap(), expected);
            assert!(blobs.clone().all(|path| path.exists()) && before.has_objects_of(&expected));
        }
    }
}
