//! Ingests staged files as a layer: blobs, pack, catalog, document, in that order.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;

use rayon::prelude::*;
use rusqlite::{Connection, MAIN_DB};

use super::catalog::{CATALOG_FORMAT, SCHEMA};
use super::chunks::{CHUNK_SIZE, ChunkHasher, Chunks};
use super::hot::is_hot;
use super::large_files::LargeFiles;
use super::layer::{Canon, LayerDoc, LayerMeta, SMALL_FILE_MAX};
use super::object::{DOCUMENT_MAX, Object, ObjectWriter, Room};
use super::publish::{self, Trust, hash_chunks};
use super::row::{Node, Place};
use super::spine::{SpineText, TEXT_MAX, is_text, spine};
use super::staged::{Staged, StagedKind, complete_tree, invalid};
use super::{BootTime, FRESH, LayerKind, Store, to_json};
use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};

/// First bytes of a pack, so that `file` and people can tell what it is.
pub(super) const PACK_MAGIC: &[u8; 16] = b"envfabric-pack1\n";

/// Writes layers into one store.
#[derive(Debug, Clone, Copy)]
pub struct LayerWriter<'a> {
    pub(super) store: &'a Store,
    pub(super) trust: Trust,
}

/// A file with its digest, before it has a place.
enum Content {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Content {
    /// The bytes of a small file, which must be those of `digest` still.
    fn read(&self, digest: &Digest) -> Result<Cow<'_, [u8]>> {
        match self {
            Content::Bytes(bytes) => Ok(Cow::Borrowed(bytes)),
            Content::File(source) => {
                let bytes = fs::read(source).at("reading", source)?;
                if Digest::of(&bytes) != *digest {
                    return Err(Error::new(Kind::Failed, format!("{} changed while it was read", source.display()))
                        .hint("run the command again"));
                }
                Ok(Cow::Owned(bytes))
            }
        }
    }
}

struct Prepared {
    node: Node,
    /// Of a file that has more than one.
    chunks: Option<Chunks>,
    content: Option<Content>,
    /// Its object was written before.
    stored: bool,
}

impl<'a> LayerWriter<'a> {
    /// A writer into `store`.
    pub fn new(store: &'a Store) -> Self {
        LayerWriter { store, trust: Trust::Length }
    }

    /// A writer that reads and hashes what is there already instead of trusting its length, and repairs it.
    pub fn repairing(store: &'a Store) -> Self {
        LayerWriter { store, trust: Trust::Nothing }
    }

    /// Makes sure that the layer with these files is in the store and returns its document.
    ///
    /// The same files give the same digest on every machine; times, owners and the order of `staged` do not count. If
    /// the layer is there already, what is missing or cut short of it is written again, else nothing.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a path with `..`, an empty or over-long component, or two things at one path.
    pub fn write(&self, meta: LayerMeta, staged: Vec<Staged>) -> Result<LayerDoc> {
        self.write_with(meta, staged, None)
    }

    /// The same, with files some of which are stored already.
    ///
    /// # Errors
    /// As [`LayerWriter::write`].
    pub fn write_with(&self, meta: LayerMeta, staged: Vec<Staged>, large: Option<&LargeFiles>) -> Result<LayerDoc> {
        self.store.require_writable()?;
        let mut begun = large.map_or_else(BootTime::now, |large| large.begun);
        let tree = complete_tree(staged)?;
        let prepare = |(path, kind): (Vec<u8>, _)| prepare(&path, kind, large).map(|prepared| (path, prepared));
        let mut rows: Vec<(Vec<u8>, Prepared)> = tree.into_par_iter().map(prepare).collect::<Result<_>>()?;
        rows.sort_by(|a, b| by_component(&a.0, &b.0));
        count_subdirs(&mut rows);

        let mut canon = Canon::default();
        for (path, row) in &rows {
            canon.row(path, &row.node, row.chunks.as_ref());
        }
        let digest = canon.finish();
        // Who signs what comes of it believes no document that it finds.
        let believes = self.store.signer().is_none();
        if self.trust == Trust::Length
            && believes
            && let Ok(doc) = self.store.layer(&digest)
            && self.store.has_objects_of(&doc)
            && self.store.has_layer(&digest)
        {
            return Ok(doc);
        }

        // As often as a collector may end what this one has looked for while it slept: hardly once.
        for _ in 0..3 {
            let doc = self.write_objects(&digest, meta.clone(), &mut rows)?;
            if begun.elapsed() > FRESH && !self.store.are_in_place(&doc)? {
                rows.iter_mut().for_each(|(_, row)| row.stored = false);
                begun = BootTime::now();
                continue;
            }
            let path = self.store.layer_path(&digest);
            // Where another document names another catalog, that one is as good, if it is there.
            publish::bytes_or_repair(self.store.root(), &path, &to_json(&doc)?, || {
                let there = self.store.layer(&digest);
                there.is_ok_and(|there| match believes {
                    true => there.catalog == doc.catalog || self.store.has_objects_of(&there),
                    false => there == doc,
                })
            })?;
            // Objects that were there already may have been collected before the document could be seen.
            if self.store.has_layer(&digest) && self.store.bring_back_layer(&digest)? {
                let there = if believes { self.store.layer(&digest)? } else { doc.clone() };
                if there == doc {
                    self.store.has_made(&doc);
                }
                return Ok(there);
            }
        }
        Err(super::gc::collected_layer(&digest))
    }

    /// Writes blobs, pack and catalog; returns the document that names them.
    fn write_objects(&self, digest: &Digest, meta: LayerMeta, rows: &mut [(Vec<u8>, Prepared)]) -> Result<LayerDoc> {
        let blobs = self.write_blobs(rows)?;
        let pack = self.write_pack(rows, meta.bytecode)?;
        let bytes = catalog_bytes(digest, pack.as_ref(), rows)?;
        if bytes.len() as u64 > DOCUMENT_MAX {
            return Err(Error::new(Kind::Invalid, format!("a layer of {} files is too large", rows.len())));
        }
        // Another SQLite version may have written other bytes with the same rows: the document says whose are used.
        let catalog = Digest::of(&bytes);
        self.store.ensure_bytes(Room::Catalogs, &bytes, &catalog, self.trust)?;

        let files = rows.iter().filter(|(_, r)| matches!(r.node, Node::File { .. })).count() as u32;
        let total = rows.iter().map(|(_, r)| if let Node::File { size, .. } = r.node { size } else { 0 }).sum();
        // An interpreter's tree is shown as it is, beside the others.
        let spine = match meta.kind {
            LayerKind::Interpreter => Vec::new(),
            _ => {
                let parents = parents(rows);
                spine(rows.iter().zip(parents).map(|((path, row), parent)| (path.as_slice(), &row.node, parent)))
            }
        };
        let texts = self.texts(rows)?;
        Ok(LayerDoc {
            format: 1,
            digest: *digest,
            claims: claims(rows.iter().filter(|(_, r)| !r.node.is_dir()).map(|(path, _)| path.as_slice())),
            meta,
            rows: rows.len() as u32,
            files,
            bytes: total,
            catalog,
            catalog_size: bytes.len() as u64,
            pack: pack.as_ref().map(|pack| pack.digest),
            pack_size: pack.as_ref().map_or(0, |pack| pack.size),
            pack_hot: pack.as_ref().map_or(0, |pack| pack.hot),
            bundle: None,
            blobs,
            spine,
            texts,
        })
    }

    fn texts(&self, rows: &[(Vec<u8>, Prepared)]) -> Result<Vec<SpineText>> {
        let mut texts = Vec::new();
        for (row, (path, prepared)) in rows.iter().enumerate() {
            if let (Node::File { size, digest, .. }, Some(content)) = (&prepared.node, &prepared.content)
                && is_text(path)
                && *size <= TEXT_MAX
                && let Ok(text) = String::from_utf8(content.read(digest)?.into_owned())
            {
                texts.push(SpineText { row: row as u32, text });
            }
        }
        Ok(texts)
    }

    /// True for a file that goes into the pack.
    fn is_small(&self, node: &Node) -> bool {
        matches!(node, Node::File { size, .. } if *size <= self.store.small_file_max())
    }

    fn write_blobs(&self, rows: &[(Vec<u8>, Prepared)]) -> Result<Vec<Digest>> {
        let blobs = rows
            .par_iter()
            .filter(|(_, row)| !self.is_small(&row.node))
            .filter_map(|(_, row)| {
                let (Node::File { digest, .. }, Some(content)) = (&row.node, &row.content) else { return None };
                let done = match content {
                    _ if row.stored => Ok(()),
                    Content::File(source) => {
                        let chunks = row.chunks.clone().unwrap_or_else(|| Chunks::single(*digest));
                        self.store.ensure_file(Room::Blobs, source, &(*digest, chunks), self.trust)
                    }
                    Content::Bytes(bytes) => self.store.ensure_bytes(Room::Blobs, bytes, digest, self.trust),
                };
                Some(done.map(|()| *digest))
            })
            .collect::<Result<BTreeSet<Digest>>>()?;
        Ok(blobs.into_iter().collect())
    }

    /// Writes the small files one after the other, those first that programs need ([`is_hot`]), in order of path, equal
    /// ones once; gives each its offset.
    fn write_pack(&self, rows: &mut [(Vec<u8>, Prepared)], bytecode: bool) -> Result<Option<Pack>> {
        if !rows.iter().any(|(_, row)| self.is_small(&row.node)) {
            return Ok(None);
        }
        let mut size = PACK_MAGIC.len() as u64;
        let mut hot = 0;
        let mut seen: HashMap<Digest, u64> = HashMap::new();
        let mut order = Vec::new(); // of those that are written
        for hot_ones in [true, false] {
            for (at, (path, row)) in rows.iter_mut().enumerate() {
                if !self.is_small(&row.node) || is_hot(path, bytecode) != hot_ones {
                    continue;
                }
                let Node::File { digest, place, size: length, .. } = &mut row.node else { continue };
                let offset = *seen.entry(*digest).or_insert_with(|| {
                    order.push((at, *digest));
                    size += *length;
                    size - *length
                });
                *place = Place::Pack { offset };
            }
            hot = hot.max(if hot_ones { size } else { 0 });
        }

        let mut writer = ObjectWriter::new(self.store, size)?;
        let mut hasher = ChunkHasher::default();
        let mut put = |bytes: &[u8]| {
            hasher.update(bytes);
            writer.write(bytes)
        };
        put(PACK_MAGIC)?;
        for (at, digest) in order {
            if let Some(content) = &rows[at].1.content {
                put(&content.read(&digest)?)?;
            }
        }
        let (digest, chunks) = hasher.finish();
        writer.publish(&Object { room: Room::Packs, digest, size }, self.trust)?;
        Ok(Some(Pack { digest, size, hot, chunks }))
    }
}

/// The small files of a layer, written.
struct Pack {
    digest: Digest,
    size: u64,
    /// How much of its beginning is likely to be needed.
    hot: u64,
    chunks: Chunks,
}

/// Orders paths component by component, so that a directory's content directly follows it.
fn by_component(a: &[u8], b: &[u8]) -> Ordering {
    a.split(|c| *c == b'/').cmp(b.split(|c| *c == b'/'))
}

fn prepare(path: &[u8], kind: StagedKind, large: Option<&LargeFiles>) -> Result<Prepared> {
    let file = |size: u64, executable: bool, (digest, chunks): (Digest, Chunks), content: Content| Prepared {
        node: Node::File { size, executable, digest, place: Place::Blob },
        chunks: Some(chunks).filter(|_| size > CHUNK_SIZE),
        content: Some(content),
        stored: false,
    };
    Ok(match kind {
        StagedKind::Dir => Prepared { node: Node::Dir { subdirs: 0 }, chunks: None, content: None, stored: false },
        StagedKind::Symlink { target } => {
            if target.is_empty() || target.len() >= 4096 || target.contains(&0) {
                return Err(invalid(path, "is a symbolic link with a bad target"));
            }
            Prepared { node: Node::Symlink { target }, chunks: None, content: None, stored: false }
        }
        StagedKind::Bytes { content, executable } => {
            file(content.len() as u64, executable, hash_bytes(&content), Content::Bytes(content))
        }
        StagedKind::File { source, executable } => {
            if let Some((size, digests)) = large.and_then(|large| large.get(&source)) {
                return Ok(Prepared {
                    stored: true,
                    ..file(*size, executable, digests.clone(), Content::File(source))
                });
            }
            let size = fs::symlink_metadata(&source).at("reading", &source)?.len();
            // Small files are read again for the pack: a layer may have many times more of them than there is memory.
            let (size, digests) = if size <= SMALL_FILE_MAX {
                let bytes = fs::read(&source).at("reading", &source)?;
                (bytes.len() as u64, hash_bytes(&bytes))
            } else {
                hash_chunks(&source)?
            };
            file(size, executable, digests, Content::File(source))
        }
    })
}

pub(super) fn hash_bytes(bytes: &[u8]) -> (Digest, Chunks) {
    match bytes.len() as u64 {
        // The chunk is the file: hashed once.
        0..=CHUNK_SIZE => {
            let digest = Digest::of(bytes);
            (digest, Chunks::single(digest))
        }
        _ => {
            let mut hasher = ChunkHasher::default();
            hasher.update(bytes);
            hasher.finish()
        }
    }
}

/// Index of the parent of each row; rows are sorted, the root first.
fn parents(rows: &[(Vec<u8>, Prepared)]) -> Vec<usize> {
    let mut open: Vec<usize> = Vec::new(); // directories from the root to the row before
    let mut parents = Vec::with_capacity(rows.len());
    for (i, (path, row)) in rows.iter().enumerate() {
        let depth = if path.is_empty() { 0 } else { 1 + path.iter().filter(|b| **b == b'/').count() };
        open.truncate(depth);
        parents.push(open.last().copied().unwrap_or(0));
        if row.node.is_dir() {
            open.push(i);
        }
    }
    parents
}

fn count_subdirs(rows: &mut [(Vec<u8>, Prepared)]) {
    let parents = parents(rows);
    for (i, parent) in parents.into_iter().enumerate().skip(1) {
        if rows[i].1.node.is_dir()
            && let Node::Dir { subdirs } = &mut rows[parent].1.node
        {
            *subdirs += 1;
        }
    }
}

/// A catalog, built in memory: SQLite never works on the store itself.
fn catalog_bytes(layer: &Digest, pack: Option<&Pack>, rows: &[(Vec<u8>, Prepared)]) -> Result<Vec<u8>> {
    let sql = |e: rusqlite::Error| Error::new(Kind::Failed, "a catalog cannot be built").with_source(e);
    let mut db = Connection::open_in_memory().map_err(sql)?;
    db.execute_batch(SCHEMA).map_err(sql)?;
    let transaction = db.transaction().map_err(sql)?;
    {
        let mut meta = transaction.prepare("INSERT INTO meta VALUES (?1, ?2)").map_err(sql)?;
        meta.execute(("format", CATALOG_FORMAT)).map_err(sql)?;
        meta.execute(("layer", layer.to_string())).map_err(sql)?;
        meta.execute(("rows", rows.len() as i64)).map_err(sql)?;
        if let Some(pack) = pack {
            meta.execute(("pack", pack.digest.to_string())).map_err(sql)?;
            meta.execute(("pack_size", pack.size as i64)).map_err(sql)?;
        }
        let mut chunk = transaction.prepare("INSERT OR IGNORE INTO chunk VALUES (?1, ?2)").map_err(sql)?;
        let mut insert_chunks =
            |object: &Digest, chunks: &Chunks| chunk.execute((object.as_bytes(), chunks.to_bytes())).map_err(sql);
        if let Some(pack) = pack {
            insert_chunks(&pack.digest, &pack.chunks)?;
        }
        for (_, row) in rows {
            if let (Node::File { digest, .. }, Some(chunks)) = (&row.node, &row.chunks) {
                insert_chunks(digest, chunks)?;
            }
        }
        let parents = parents(rows);
        let mut insert =
            transaction.prepare("INSERT INTO entry VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)").map_err(sql)?;
        for (id, ((path, row), parent)) in rows.iter().zip(&parents).enumerate() {
            let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            let (size, digest, offset, target) = match &row.node {
                Node::Dir { subdirs } => (i64::from(*subdirs), None, None, None),
                Node::File { size, digest, place, .. } => {
                    let offset = match place {
                        Place::Pack { offset } => Some(*offset as i64),
                        Place::Blob => None,
                    };
                    (*size as i64, Some(digest.as_bytes().to_vec()), offset, None)
                }
                Node::Symlink { target } => (target.len() as i64, None, None, Some(target)),
            };
            let mode = i64::from(row.node.mode());
            insert
                .execute((*parent as i64, name, id as i64, row.node.kind_number(), mode, size, digest, offset, target))
                .map_err(sql)?;
        }
    }
    transaction.commit().map_err(sql)?;
    db.execute_batch("VACUUM").map_err(sql)?;
    Ok(db.serialize(MAIN_DB).map_err(sql)?.to_vec())
}

/// Paths cut to one component below `site-packages`, or to three components elsewhere.
fn claims<'p>(paths: impl Iterator<Item = &'p [u8]>) -> Vec<String> {
    let mut found = BTreeSet::new();
    for path in paths {
        let parts: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
        let keep = match parts.iter().position(|p| *p == b"site-packages") {
            Some(at) => at + 2,
            None => 3,
        };
        found.insert(String::from_utf8_lossy(&parts[..keep.min(parts.len())].join(&b'/')).into_owned());
    }
    found.into_iter().collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::store::LayerKind;
    use std::collections::BTreeMap;

    pub(crate) fn meta(name: &str) -> LayerMeta {
        LayerMeta {
            kind: LayerKind::Wheel,
            name: name.into(),
            version: "1.0".into(),
            abi: "cpython-311-x86_64-linux-gnu+a70d0d0a".into(),
            requires: vec![],
            requires_python: None,
            startup_files: vec![],
            uncompiled: BTreeMap::new(),
            bytecode: true,
        }
    }

    fn text(path: &str, content: &str) -> Staged {
        Staged { path: path.into(), kind: StagedKind::Bytes { content: content.into(), executable: false } }
    }

    #[test]
    fn the_same_files_give_the_same_layer_whatever_order_and_place_they_come_from() {
        let dir = tempfile::tempdir().unwrap();
        let big = dir.path().join("big");
        fs::write(&big, vec![7u8; SMALL_FILE_MAX as usize + 1]).unwrap();
        let large = Staged { path: b"lib/big.so".into(), kind: StagedKind::File { source: big, executable: true } };
        let a = vec![text("lib/a.py", "a"), text("lib-x/b", "b"), text("lib/sub/c.py", "a"), large.clone()];
        let mut b = a.clone();
        b.reverse();
        let first = Store::init(&dir.path().join("one")).unwrap();
        let second = Store::init(&dir.path().join("two")).unwrap();
        let one = LayerWriter::new(&first).write(meta("x"), a).unwrap();
        let two = LayerWriter::new(&second).write(meta("x"), b).unwrap();
        assert_eq!(one, two);
        let catalog = first.catalog(&one.digest).unwrap();
        let rows = catalog.verify().unwrap();
        assert_eq!(rows.len() as u32, one.rows);
        let paths: Vec<String> =
            rows.iter().map(|r| String::from_utf8(catalog.path_of(r.id).unwrap()).unwrap()).collect();
        assert_eq!(paths, ["", "lib", "lib/a.py", "lib/big.so", "lib/sub", "lib/sub/c.py", "lib-x", "lib-x/b"]);
        assert_eq!(rows[1].node, Node::Dir { subdirs: 1 });
        // Equal small files lie in the pack once.
        let place = |path: &[u8]| match catalog.find(path).unwrap().unwrap().node {
            Node::File { place, .. } => place,
            _ => panic!("no file"),
        };
        assert_eq!(place(b"lib/a.py"), place(b"lib/sub/c.py"));
        assert_eq!(place(b"lib/big.so"), Place::Blob);
    }

    #[test]
    fn hostile_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        for path in ["../x", "a/../b", "/etc/passwd", "a//b", "", ".", "a/./b", "a\0b", &"x".repeat(256)] {
            assert!(LayerWriter::new(&store).write(meta("x"), vec![text(path, "")]).is_err(), "{path:?}");
        }
        assert!(LayerWriter::new(&store).write(meta("x"), vec![text("a", ""), text("a", "")]).is_err());
        assert!(LayerWriter::new(&store).write(meta("x"), vec![text("a", ""), text("a/b", "")]).is_err());
    }

    #[test]
    fn a_truncated_catalog_is_told_and_never_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let files = (0..500).map(|i| text(&format!("lib/{i}.py"), &format!("{i}"))).collect();
        let doc = LayerWriter::new(&store).write(meta("x"), files).unwrap();
        let path = store.catalog_path(&doc.catalog);
        let bytes = fs::read(&path).unwrap();
        for keep in [0, 50, 4096, bytes.len() - 1] {
            fs::remove_file(&path).unwrap();
            fs::write(&path, &bytes[..keep]).unwrap();
            let error = store.catalog(&doc.digest).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{keep}: {error:?}");
        }
    }

    #[test]
    fn writing_a_layer_again_brings_back_what_was_lost_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let large = StagedKind::Bytes { content: vec![3; SMALL_FILE_MAX as usize + 1], executable: false };
        let files = || vec![text("a.py", "a"), Staged { path: b"big".into(), kind: large.clone() }];
        let doc = LayerWriter::new(&store).write(meta("x"), files()).unwrap();
        let pack = store.pack_path(&doc.pack.unwrap());
        let blob = store.blob_path(&doc.blobs[0]);
        let catalog = store.catalog_path(&doc.catalog);
        let all = [pack, blob, catalog, store.layer_path(&doc.digest)];
        let is_whole = || store.fsck(&|_, _| {}).unwrap().is_clean() && all.iter().all(|p| p.exists());
        for path in &all {
            let bytes = fs::read(path).unwrap();
            fs::remove_file(path).unwrap();
            assert!(!is_whole());
            assert_eq!(LayerWriter::new(&store).write(meta("x"), files()).unwrap(), doc);
            assert!(is_whole(), "{} was not brought back", path.display());
            fs::remove_file(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
            assert_eq!(LayerWriter::new(&store).write(meta("x"), files()).unwrap(), doc);
            assert!(is_whole(), "{} was not completed", path.display());
        }
        // Damage that keeps the length is found by a writer that is told to look.
        for path in &all[..2] {
            let mut bytes = fs::read(path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::remove_file(path).unwrap();
            fs::write(path, bytes).unwrap();
            assert!(!is_whole());
            LayerWriter::repairing(&store).write(meta("x"), files()).unwrap();
            assert!(is_whole(), "{} was not repaired", path.display());
        }
    }

    #[test]
    fn claims_are_short_and_cover_every_file() {
        let sp = "lib/python3.11/site-packages";
        let paths = [format!("{sp}/numpy/core/x.py"), format!("{sp}/numpy/y.py"), format!("{sp}/six.py")];
        let mut all: Vec<&[u8]> = paths.iter().map(|p| p.as_bytes()).collect();
        all.push(b"share/jupyter/lab/static/x.js");
        all.push(b"bin/tool");
        let expected =
            ["bin/tool".to_string(), format!("{sp}/numpy"), format!("{sp}/six.py"), "share/jupyter/lab".into()];
        assert_eq!(claims(all.into_iter()), expected);
    }
}
