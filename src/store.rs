//! The store: one directory, usually on a NAS, that holds everything for ever.
//!
//! ```text
//! <store>/
//!   fabric.json                              format number, feature flags, a random id
//!   blobs/<sha256>                           one large file each; also locks and other documents
//!   packs/<sha256>                           the small files of one layer, one after the other
//!   catalogs/<sha256>                        a layer's tree as an immutable SQLite file
//!   layers/<digest>.json                     a layer's document; a layer exists when this exists
//!   keys/<sha256>.json                       lock entry + ABI -> layer digest
//!   interpreters/<name>.json                 a Python that environments can run on
//!   envs/<workflow>/<node>/versions/<n>.json immutable version documents
//!   envs/<workflow>/<node>/current/<seq>.json which version is current; the highest sequence number wins; from 2 on
//!   envs/<workflow>/<node>/profiles/<n>.json what first starts of a version read; nothing needs them
//!   owners/<workflow>/<seq>.json             whose a workflow is, for mounts
//!   policy/<seq>.json                        who is to sign versions, for those who publish
//!   leases/<id>.json                         who uses which versions
//!   trash/<generation>/...                   what was collected lately, under its path; readers look here, too
//!   quarantine/                              damaged files that were replaced or of no use
//!   tmp/                                     files that are being written
//! ```
//!
//! **Concurrency.** There are no locks and no file is ever changed. Every file is written whole under `tmp/`, fsynced,
//! and `link()`ed to its name (`publish`): the first to link wins, and whoever finds the name taken either finds its
//! own bytes there (content addressing) or takes the next number. Objects are published before the documents that name
//! them, documents before pointers, so a reader that follows pointers never meets half of anything. Readers open and
//! read; they never trust directory times or a `stat` (NFS caches both).
//!
//! **Collecting** needs no locks either: see `gc`.
//!
//! **What is lost by a crash** is what lies in `tmp/`, nothing else.

mod catalog;
mod chunks;
pub mod disk;
mod environments;
mod fabric;
mod fsck;
mod gc;
mod hot;
mod index;
mod large_files;
mod layer;
mod layer_writer;
mod leases;
mod made;
mod object;
mod owners;
mod packed;
mod policy;
mod profiles;
mod publish;
mod repair;
mod row;
mod seal;
mod seen;
mod signatures;
mod signed;
mod spine;
mod staged;
mod summary;
mod switching;
mod trash;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(crate) use catalog::tests::hostile as hostile_catalogs;
pub use catalog::{Catalog, Scanned, ScannedKind};
pub use chunks::{CHUNK_SIZE, Chunks};
pub(crate) use environments::host;
pub use environments::{Claimed, Pointer};
pub use fabric::{Codec, Fabric, Features, STORE_FORMAT};
pub use fsck::{Finding, FsckReport, Severity};
pub use gc::{Amount, GRACE, GcOptions, GcReport, GcStep, Keep};
pub(crate) use gc::{BootTime, FRESH};
pub use index::{Index, Learned};
pub use large_files::LargeFiles;
pub use layer::{Bundle, Canon, FILE_MTIME, LayerDoc, LayerKind, LayerMeta, Requirement, SMALL_FILE_MAX};
pub use layer_writer::LayerWriter;
pub use leases::{Lease, LeaseDoc, Leased, STALE as LEASE_STALE};
pub(crate) use object::REQUEST_MAX;
pub use object::{Object, ObjectFile, Room, StoredChunks};
pub use owners::Ownership;
pub use policy::Policy;
pub use profiles::{Profile, STARTS_ENOUGH, Touched};
pub use publish::{Named, Tried};
pub use repair::PutAside;
pub use row::{Node, Place, Row, RowId};
pub use signatures::Signatures;
pub use signed::{KEYS_MAX, Signature, TrustedKeys, is_key};
pub use spine::{SpineDir, SpineText};
pub use staged::{Staged, StagedKind};
pub use summary::documents;

use publish::Trust;
use seal::Unreadable;
use seal::write as to_json;
pub use seal::write as sealed;

use crate::environment::{Digest, Document, Interpreter};
use crate::error::{Error, IoContext, Kind, Result};

/// An interpreter that the store offers, `interpreters/<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredInterpreter {
    /// `cpython-3.11.7-x86_64-linux-gnu-<12 digits of the layer digest>`.
    pub name: String,
    /// Its files.
    pub layer: Digest,
    /// What a venv of it adds (`bin/activate`, `lib64`, ...).
    pub scaffold: Digest,
    /// What it is.
    pub python: Interpreter,
    /// Where it was taken from, for people.
    pub origin: String,
    /// When it was ingested.
    pub created: Timestamp,
}

/// An open store.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    fabric: Fabric,
    writable: bool,
    signing: signed::Signing,
    made: Arc<made::Made>,
}

impl Store {
    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What `fabric.json` says.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Files up to this many bytes travel together in their layer's pack; larger ones are blobs.
    ///
    /// Where the kernel can read blobs in place, everything that a process maps should be one; where they are fetched,
    /// each costs several requests. (docs/benchmarks.md)
    pub(super) fn small_file_max(&self) -> u64 {
        match self.codec() {
            Codec::Raw => SMALL_FILE_MAX,
            Codec::Zstd => 4 << 20,
        }
    }

    /// Rooms are flat: each level of directories would cost a node that has seen nothing yet one more request an object.
    fn in_room(&self, room: &str, name: &str) -> PathBuf {
        self.root.join(room).join(name)
    }

    /// Where a blob lies.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.in_room("blobs", &digest.to_string())
    }

    /// Where a pack lies.
    pub fn pack_path(&self, digest: &Digest) -> PathBuf {
        self.in_room("packs", &digest.to_string())
    }

    /// Where a catalog lies.
    pub fn catalog_path(&self, catalog: &Digest) -> PathBuf {
        self.in_room("catalogs", &catalog.to_string())
    }

    /// Where a layer's document lies.
    pub fn layer_path(&self, layer: &Digest) -> PathBuf {
        self.in_room("layers", &format!("{layer}.json"))
    }

    fn key_path(&self, key: &Digest) -> PathBuf {
        self.in_room("keys", &format!("{key}.json"))
    }

    /// Directory for files that are being written; on the same file system as everything else here.
    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Makes sure that a blob with these bytes is there, and returns its digest.
    pub fn ensure_blob(&self, bytes: &[u8]) -> Result<Digest> {
        self.require_writable()?;
        let digest = Digest::of(bytes);
        self.ensure_bytes(Room::Blobs, bytes, &digest, Trust::Length)?;
        Ok(digest)
    }

    /// True when catalog, pack and blobs of a layer are there and no shorter than they should be.
    fn has_objects_of(&self, doc: &LayerDoc) -> bool {
        let Ok(catalog) = self.catalog_of(doc) else { return false };
        let Ok(rows) = catalog.all() else { return false };
        let mut blobs = BTreeMap::new();
        for row in rows {
            if let Node::File { size, digest, place: Place::Blob, .. } = row.node {
                blobs.insert(digest, size);
            }
        }
        let is_there = |room, digest, size| self.has_object(&Object { room, digest, size }, Trust::Length);
        doc.pack.is_none_or(|pack| is_there(Room::Packs, pack, doc.pack_size))
            && blobs.into_iter().all(|(blob, size)| is_there(Room::Blobs, blob, size))
    }

    /// True when the documents of all `layers` are there, to be used for something new.
    pub(crate) fn has_layers(&self, layers: &[Digest]) -> bool {
        in_parallel(layers, |layer| self.has_layer(layer)).into_iter().all(|there| there)
    }

    /// True when the document of `layer` is in its place, to be used for something new; then what it names is there, too.
    pub(super) fn has_layer(&self, layer: &Digest) -> bool {
        // The open is what revalidates on NFS.
        match self.open_young(&self.layer_path(layer)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.bring_back_layer(layer).unwrap_or(false),
            opened => opened.is_ok(),
        }
    }

    /// True when the blob of `document` is there, as far as its length tells.
    pub(crate) fn has_document(&self, document: &Document) -> bool {
        let object = Object { room: Room::Blobs, digest: document.blob, size: document.size };
        self.has_object(&object, Trust::Length)
    }

    /// The bytes of a blob that is known to be small (a lock, a document), verified.
    pub fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let read = || ObjectFile::open_named(self, Room::Blobs, *digest)?.read_document();
        let bytes = publish::again_if_stale(read)?;
        if Digest::of(&bytes) != *digest {
            return Err(Error::new(
                Kind::Corrupt,
                format!("blob {} does not have the bytes of its name", path.display()),
            )
            .hint("run `envfabric fsck`"));
        }
        Ok(bytes)
    }

    /// A layer's document.
    pub fn layer(&self, layer: &Digest) -> Result<LayerDoc> {
        let path = self.layer_path(layer);
        let read = self.read_anywhere(&path).and_then(|bytes| parse(&path, &bytes));
        let doc: LayerDoc = read.map_err(|e| e.context(format!("layer {} cannot be read", layer.short())))?;
        if doc.digest != *layer {
            return Err(Error::new(Kind::Corrupt, format!("{} describes another layer", path.display()))
                .hint("run `envfabric fsck`"));
        }
        Ok(doc)
    }

    /// Opens a layer's catalog.
    pub fn catalog(&self, layer: &Digest) -> Result<Catalog> {
        self.catalog_of(&self.layer(layer)?)
    }

    /// Opens the catalog of the layer with this document.
    pub fn catalog_of(&self, doc: &LayerDoc) -> Result<Catalog> {
        match self.codec() {
            Codec::Raw => {
                let path = self.catalog_path(&doc.catalog);
                let mut there = path.clone();
                for _ in 0..trash::LOOKS {
                    match Catalog::open(&there, &doc.digest) {
                        // It is opened by its name, more than once: it may have moved to the trash, or back, in between.
                        Err(_) if fs::File::open(&there).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) => {
                            there = self.open_anywhere(&path).at("opening", &path)?.1;
                        }
                        other => return other,
                    }
                }
                Catalog::open(&there, &doc.digest)
            }
            Codec::Zstd => {
                let object = doc.catalog_object();
                Catalog::of_bytes(
                    ObjectFile::open(self, &object)?.read_document()?,
                    &self.object_path(&object),
                    &doc.digest,
                )
            }
        }
    }

    /// The layer that a key stands for, if one was built and is there.
    pub fn layer_of_key(&self, key: &Digest) -> Result<Option<Digest>> {
        let path = self.key_path(key);
        match read_json::<KeyDoc>(&path) {
            Ok(doc) => Ok(Some(doc.layer)),
            // One that was collected lately saves a build.
            Err(error) if error.is_not_found() => match self.bring_back(&self.below(&path)) {
                Ok(true) => read_json::<KeyDoc>(&path).map(|doc| Some(doc.layer)),
                _ => Ok(None),
            },
            Err(error) => Err(error),
        }
    }

    /// The same, of a key that may lie in the trash.
    fn layer_of_key_anywhere(&self, key: &Digest) -> Result<Option<Digest>> {
        let path = self.key_path(key);
        match self.read_anywhere(&path).and_then(|bytes| parse::<KeyDoc>(&path, &bytes)) {
            Err(error) if error.is_not_found() => Ok(None),
            other => Ok(Some(other?.layer)),
        }
    }

    /// Lets `key` stand for `layer`, unless it stands for another already; returns the one it stands for.
    ///
    /// Two builders may build one source distribution to two different layers: the first to publish wins.
    pub fn publish_key(&self, key: &Digest, layer: &Digest) -> Result<Digest> {
        self.require_writable()?;
        let path = self.key_path(key);
        let doc = to_json(&KeyDoc { layer: *layer })?;
        // A key that is damaged or whose layer is gone stands for nothing, and is replaced.
        let there = || self.layer_of_key(key).ok().flatten().filter(|layer| self.layer(layer).is_ok());
        publish::bytes_or_repair(&self.root, &path, &doc, || there().is_some())?;
        Ok(there().unwrap_or(*layer))
    }

    /// The interpreters of the store, newest version first. One whose document is damaged is left out with a warning:
    /// it must not keep the others from being used.
    pub fn interpreters(&self) -> Result<Vec<StoredInterpreter>> {
        let dir = self.root.join("interpreters");
        let mut found = Vec::new();
        for name in list_names(&dir)? {
            if !name.ends_with(".json") {
                continue;
            }
            match read_json::<StoredInterpreter>(&dir.join(&name)) {
                Ok(interpreter) => found.push(interpreter),
                Err(error) => tracing::warn!(error = error.chain(), "an interpreter of the store is left out"),
            }
        }
        found.sort_by_key(|i: &StoredInterpreter| std::cmp::Reverse((version_key(&i.python.version), i.name.clone())));
        Ok(found)
    }

    fn interpreter_path(&self, interpreter: &StoredInterpreter) -> PathBuf {
        self.root.join("interpreters").join(format!("{}.json", interpreter.name))
    }

    /// True when an interpreter of the store is there with its layers, to be used for something new.
    pub(crate) fn has_interpreter(&self, interpreter: &StoredInterpreter) -> bool {
        self.reuse(&self.interpreter_path(interpreter)).is_ok()
            && self.has_layers(&[interpreter.layer, interpreter.scaffold])
    }

    /// Publishes an interpreter; one with the same name is the same interpreter and stays.
    pub fn publish_interpreter(&self, interpreter: &StoredInterpreter) -> Result<()> {
        self.require_writable()?;
        let path = self.interpreter_path(interpreter);
        publish::bytes(&self.root, &path, &to_json(interpreter)?).map(|_| ())
    }
}

/// Directories that a store gets when there is something for them.
const LATER_NAMES: [&str; 4] = ["leases", "owners", "trash", "quarantine"];

/// Directories of a store.
const ROOM_NAMES: [&str; 9] = ["blobs", "packs", "catalogs", "layers", "keys", "interpreters", "envs", "policy", "tmp"];

#[derive(Serialize, Deserialize)]
struct KeyDoc {
    layer: Digest,
}

/// Numbers of a version for sorting; letters count as a break.
fn version_key(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// The time now, to the second.
pub fn now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &publish::read(path)?)
}

/// What the document at `path` with these bytes says.
fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    seal::read(bytes).map_err(|why| {
        let hint = "run `envfabric fsck` to see what is affected";
        match why {
            Unreadable::Broken => Error::new(Kind::Corrupt, format!("{} is damaged", path.display())).hint(hint),
            Unreadable::Other(source) => {
                Error::new(Kind::Corrupt, format!("{} is of an unknown format", path.display()))
                    .hint(hint)
                    .with_source(source)
            }
        }
    })
}

/// How many requests to a distant store are under way at once.
const REQUESTS: usize = 16;

/// What `ask` says of each of `items`, in their order. Where answers take long, as they do over a network, several are
/// waited for at once.
pub(crate) fn in_parallel<T: Sync, R: Send>(items: &[T], ask: impl Fn(&T) -> R + Sync) -> Vec<R> {
    // A local disk answers from memory within microseconds: threads would cost more than they bring.
    const TRIED: usize = 16;
    const SLOW: Duration = Duration::from_micros(50);
    let begun = Instant::now();
    let mut answers: Vec<R> = items.iter().take(TRIED).map(&ask).collect();
    let rest = &items[answers.len()..];
    let threads = match begun.elapsed() > SLOW * TRIED as u32 {
        true => REQUESTS,
        false if rest.len() < 1000 => 1,
        false => std::thread::available_parallelism().map_or(1, |n| n.get().min(REQUESTS)),
    };
    if threads == 1 || rest.is_empty() {
        answers.extend(rest.iter().map(&ask));
        return answers;
    }
    let parts = rest.chunks(rest.len().div_ceil(threads));
    let ask = &ask;
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || part.iter().map(ask).collect::<Vec<R>>())).collect();
        for thread in threads {
            match thread.join() {
                Ok(part) => answers.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    answers
}

/// Names in a directory; none when it does not exist, or is something else that somebody has put there.
fn list_names(dir: &Path) -> Result<Vec<String>> {
    list(dir, |_| true)
}

/// Those of [`list_names`] that are directories.
fn list_dirs(dir: &Path) -> Result<Vec<String>> {
    list(dir, |entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

fn list(dir: &Path, keep: impl Fn(&fs::DirEntry) -> bool) -> Result<Vec<String>> {
    Ok(list_if_there(dir, keep)?.unwrap_or_default())
}

fn list_if_there(dir: &Path, keep: impl Fn(&fs::DirEntry) -> bool) -> Result<Option<Vec<String>>> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let entries = match fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => return Ok(None),
        other => other.at("reading", dir)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.at("reading", dir)?;
        if keep(&entry)
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(Some(names))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_order_however_many_and_slow_they_are() {
        for (count, pause) in [(0, 0), (5, 100), (100, 100), (5000, 0)] {
            let items: Vec<u64> = (0..count).collect();
            let answers = in_parallel(&items, |n| {
                std::thread::sleep(Duration::from_micros(pause));
                n * 2
            });
            assert_eq!(answers, items.iter().map(|n| n * 2).collect::<Vec<_>>());
        }
    }
}
