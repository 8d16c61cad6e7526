//! Layers -> one tree, directory by directory, when somebody looks.
//!
//! A directory of the merged tree has one *part* for each layer that shows something in it, lowest first. Layers are
//! looked at from the highest down: a file ends the search, a directory adds a part. So what lies below a file of a
//! later layer is hidden, a directory is merged only where several layers share it, and what has a single part is that
//! layer's own directory, all the way down, with no look at any other layer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::inode::{Ino, MADE_UP_BIN, Object, Special};
use super::names::Time;
use super::version::{Layers, Part, VersionView, damaged, gone, more_rows};
use super::{Attr, FileKind, Tree, lasting_dir, lasting_file};
use crate::cache::Whole;
use crate::environment::Digest;
use crate::error::{Error, Result};
use crate::store::{Catalog, LayerDoc, Node, Row, RowId, ScannedKind};

/// What a directory shows beyond its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MadeUp {
    Nothing,
    /// `.venv`: `pyvenv.cfg`, and `bin` in any case.
    Venv,
    /// `.venv/bin`: the interpreter's names.
    Bin,
}

/// A directory of a version.
#[derive(Debug)]
pub(super) struct MergedDir {
    pub(super) ino: Ino,
    pub(super) parent: Ino,
    /// Lowest first.
    parts: Box<[Part]>,
    made_up: MadeUp,
}

/// A directory's content, sorted by name; immutable.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) entries: Vec<Entry>,
    pub(super) subdirs: u32,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Box<[u8]>,
    pub(super) ino: Ino,
    pub(super) what: What,
}

/// Enough of an entry to give its attributes.
#[derive(Debug)]
pub(super) enum What {
    File {
        size: u64,
        executable: bool,
    },
    Symlink {
        size: u64,
    },
    Special(Special),
    Dir {
        parts: Box<[Part]>,
        /// Where one layer alone has it.
        subdirs: Option<u32>,
    },
}

/// A row of a directory: its name, number and kind.
type Named = (Box<[u8]>, RowId, ScannedKind);

/// What became of one name while layers are looked at, highest first.
enum Found {
    /// A file or link of the highest layer: lower ones are hidden.
    Leaf(Part, ScannedKind),
    /// Directories, highest first; closed when a lower layer has a file there.
    Dirs { parts: Vec<Part>, subdirs: u32, closed: bool },
}

/// What a name in a directory leads to.
pub(super) enum Child {
    Dir(Arc<MergedDir>),
    /// A file or link whose row was read on the way.
    Leaf(Ino, Row),
    /// A file or link of which all is known.
    Known(Attr),
    /// Something else.
    Other(Ino),
}

impl Tree {
    /// `.python` or `.venv` of a version.
    pub(super) fn tree_root(&self, view: &VersionView, layers: &Layers, venv: bool) -> Result<Arc<MergedDir>> {
        let parent = special(view, Special::Root)?;
        let (parts, made_up): (Box<[Part]>, MadeUp) = match venv {
            false => ([Part { ord: 0, row: 0 }].into(), MadeUp::Nothing),
            true => ((1..layers.docs.len() as u32).map(|ord| Part { ord, row: 0 }).collect(), MadeUp::Venv),
        };
        let index = layers.index(*parts.first().ok_or_else(gone)?)?;
        let ino = Ino::encode(Object::Dir { version: view.slot, index })?;
        Ok(Arc::new(MergedDir { ino, parent, parts, made_up }))
    }

    /// The directory with index `index` of a version: found again from the number alone, by way of the path that its
    /// lowest layer knows.
    pub(super) fn merged_dir(&self, view: &VersionView, index: u32) -> Result<Arc<MergedDir>> {
        let key = (view.slot, index);
        if let Some(dir) = self.dirs.get(&key) {
            return Ok(dir);
        }
        let layers = self.layers(view)?;
        let dir = self.find_dir(view, &layers, index)?;
        self.dirs.put(key, dir.clone());
        Ok(dir)
    }

    fn find_dir(&self, view: &VersionView, layers: &Layers, index: u32) -> Result<Arc<MergedDir>> {
        if index == MADE_UP_BIN {
            let venv = self.tree_root(view, layers, true)?;
            return self.child_dir(view, layers, &venv, b"bin");
        }
        let part = layers.part(index)?;
        // From the row up to its layer's root.
        let mut way = self.with_catalog(layers.digest(part.ord)?, |catalog| {
            let mut way: Vec<Row> = Vec::new();
            let mut row = part.row;
            while row != 0 {
                let found = catalog.row(row)?.filter(|r| r.node.is_dir()).ok_or_else(gone)?;
                row = found.parent;
                way.push(found);
            }
            Ok(way)
        })?;
        // And down again through the merged tree, until only this layer is left.
        let mut dir = self.tree_root(view, layers, part.ord != 0)?;
        while let Some(next) = way.pop() {
            if let [only] = *dir.parts
                && dir.made_up == MadeUp::Nothing
            {
                if only.ord != part.ord {
                    return Err(gone()); // hidden by a file of a later layer
                }
                let row = way.first().map_or(next.id, |last| last.id);
                let parent = way.get(1).map_or(next.id, |row| row.id);
                let parent = if way.is_empty() { dir.ino } else { self.dir_ino(view, layers, part.ord, parent)? };
                let ino = self.dir_ino(view, layers, part.ord, row)?;
                let parts = [Part { ord: part.ord, row }].into();
                dir = Arc::new(MergedDir { ino, parent, parts, made_up: MadeUp::Nothing });
                break;
            }
            let at = layers.index(Part { ord: part.ord, row: next.id })?;
            dir = match self.dirs.get(&(view.slot, at)).filter(|known| known.parent == dir.ino) {
                Some(known) => known,
                None => self.child_dir(view, layers, &dir, &next.name)?,
            };
        }
        // A number of a directory that another layer has too, lower down, names nothing.
        if dir.ino != Ino::encode(Object::Dir { version: view.slot, index })? {
            return Err(gone());
        }
        Ok(dir)
    }

    fn dir_ino(&self, view: &VersionView, layers: &Layers, ord: u32, row: RowId) -> Result<Ino> {
        Ino::encode(Object::Dir { version: view.slot, index: layers.index(Part { ord, row })? })
    }

    /// The directory `name` in `dir`.
    fn child_dir(&self, view: &VersionView, layers: &Layers, dir: &MergedDir, name: &[u8]) -> Result<Arc<MergedDir>> {
        let content = self.content(view, layers, dir)?;
        let entry = content.find(name).ok_or_else(gone)?;
        match &entry.what {
            What::Dir { parts, .. } => Ok(Arc::new(child(dir, entry.ino, parts.clone(), name))),
            _ => Err(gone()),
        }
    }

    /// The entry `name` of `dir`, if it has one.
    pub(super) fn child(&self, view: &VersionView, dir: &MergedDir, name: &[u8]) -> Result<Option<Child>> {
        let layers = self.layers(view)?;
        if let ([part], MadeUp::Nothing) = (&*dir.parts, dir.made_up)
            && layers.spine(*part)?.is_none()
        {
            let row = self.with_catalog(layers.digest(part.ord)?, |catalog| catalog.lookup(part.row, name))?;
            let Some(row) = row else { return Ok(None) };
            if !row.node.is_dir() {
                let ino = Ino::encode(Object::Row { layer: layers.slot(part.ord)?, row: row.id })?;
                return Ok(Some(Child::Leaf(ino, row)));
            }
            let ino = self.dir_ino(view, &layers, part.ord, row.id)?;
            let below = Arc::new(child(dir, ino, [Part { ord: part.ord, row: row.id }].into(), name));
            self.keep(view, &below);
            return Ok(Some(Child::Dir(below)));
        }
        let content = self.content(view, &layers, dir)?;
        let Some(entry) = content.find(name) else { return Ok(None) };
        Ok(Some(match &entry.what {
            What::Dir { parts, .. } => {
                let below = Arc::new(child(dir, entry.ino, parts.clone(), name));
                self.keep(view, &below);
                Child::Dir(below)
            }
            _ => entry.attr(view.created()).map_or(Child::Other(entry.ino), Child::Known),
        }))
    }

    fn keep(&self, view: &VersionView, dir: &Arc<MergedDir>) {
        if let Some(Object::Dir { index, .. }) = dir.ino.decode() {
            self.dirs.put((view.slot, index), dir.clone());
        }
    }

    /// How many directories are directly in `dir`.
    pub(super) fn subdirs(&self, view: &VersionView, dir: &MergedDir) -> Result<u32> {
        let layers = self.layers(view)?;
        if let ([part], MadeUp::Nothing) = (&*dir.parts, dir.made_up)
            && layers.spine(*part)?.is_none()
        {
            let row = self.with_catalog(layers.digest(part.ord)?, |catalog| catalog.row(part.row))?;
            return match row.map(|row| row.node) {
                Some(Node::Dir { subdirs }) => Ok(subdirs),
                _ => Err(gone()),
            };
        }
        Ok(self.content(view, &layers, dir)?.subdirs)
    }

    /// Everything in `dir`.
    pub(super) fn content(&self, view: &VersionView, layers: &Layers, dir: &MergedDir) -> Result<Arc<Content>> {
        if let Some(content) = self.contents.get(&dir.ino) {
            return Ok(content);
        }
        let mut entries = match (&*dir.parts, dir.made_up) {
            ([part], MadeUp::Nothing) => {
                let rows = self.scan_dir(layers, *part)?;
                let entry = |(name, row, kind)| self.entry(view, layers, Part { ord: part.ord, row }, name, kind);
                rows.into_iter().map(entry).collect::<Result<_>>()?
            }
            _ => self.merged_entries(view, layers, dir)?,
        };
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let subdirs = entries.iter().filter(|e| matches!(e.what, What::Dir { .. })).count() as u32;
        let content = Arc::new(Content { entries, subdirs });
        self.contents.put_weighing(dir.ino, content.clone(), content.entries.len() + 8);
        Ok(content)
    }

    /// Everything that one layer has in a directory: names, row numbers, kinds.
    fn scan_dir(&self, layers: &Layers, part: Part) -> Result<Vec<Named>> {
        if let Some(dir) = layers.spine(part)? {
            let named = |(name, row, kind): (&str, RowId, ScannedKind)| (name.as_bytes().into(), row, kind);
            return Ok(dir.scanned().map(named).collect());
        }
        self.with_catalog(layers.digest(part.ord)?, |catalog| {
            let mut rows = Vec::new();
            catalog.scan_dir(part.row, |row| rows.push((row.name.into(), row.id, row.kind)))?;
            Ok(rows)
        })
    }

    fn entry(
        &self,
        view: &VersionView,
        layers: &Layers,
        part: Part,
        name: Box<[u8]>,
        kind: ScannedKind,
    ) -> Result<Entry> {
        let leaf = || Ino::encode(Object::Row { layer: layers.slot(part.ord)?, row: part.row });
        let (ino, what) = match kind {
            ScannedKind::Dir { subdirs } => {
                let what = What::Dir { parts: [part].into(), subdirs: Some(subdirs) };
                (self.dir_ino(view, layers, part.ord, part.row)?, what)
            }
            ScannedKind::File { size, executable, .. } => (leaf()?, What::File { size, executable }),
            ScannedKind::Symlink { size } => (leaf()?, What::Symlink { size }),
        };
        Ok(Entry { name, ino, what })
    }

    fn merged_entries(&self, view: &VersionView, layers: &Layers, dir: &MergedDir) -> Result<Vec<Entry>> {
        let mut found: HashMap<Box<[u8]>, Found> = HashMap::new();
        for part in dir.parts.iter().rev() {
            for (name, row, kind) in self.scan_dir(layers, *part)? {
                let here = Part { ord: part.ord, row };
                match (found.get_mut(&name), kind) {
                    (None, ScannedKind::Dir { subdirs }) => {
                        found.insert(name, Found::Dirs { parts: vec![here], subdirs, closed: false });
                    }
                    (None, _) => {
                        found.insert(name, Found::Leaf(here, kind));
                    }
                    (Some(Found::Dirs { parts, closed: false, .. }), ScannedKind::Dir { .. }) => parts.push(here),
                    (Some(Found::Dirs { closed, .. }), ScannedKind::File { .. } | ScannedKind::Symlink { .. }) => {
                        *closed = true;
                    }
                    (Some(_), _) => {}
                }
            }
        }
        let made_up: Vec<(Vec<u8>, Special)> = match dir.made_up {
            MadeUp::Nothing => vec![],
            MadeUp::Venv => vec![(b"pyvenv.cfg".to_vec(), Special::Config)],
            MadeUp::Bin => vec![
                (b"python".to_vec(), Special::Python),
                (b"python3".to_vec(), Special::Python3),
                (view.python_minor().into_bytes(), Special::PythonMinor),
            ],
        };
        let mut entries = Vec::with_capacity(found.len() + made_up.len() + 1);
        for (name, what) in made_up {
            found.remove(&name[..]);
            entries.push(Entry { name: name.into(), ino: special(view, what)?, what: What::Special(what) });
        }
        if dir.made_up == MadeUp::Venv && !matches!(found.get(&b"bin"[..]), Some(Found::Dirs { .. })) {
            found.remove(&b"bin"[..]);
            let ino = Ino::encode(Object::Dir { version: view.slot, index: MADE_UP_BIN })?;
            entries.push(Entry { name: b"bin"[..].into(), ino, what: What::Dir { parts: [].into(), subdirs: None } });
        }
        for (name, found) in found {
            entries.push(match found {
                Found::Leaf(part, kind) => self.entry(view, layers, part, name, kind)?,
                Found::Dirs { mut parts, subdirs, .. } => {
                    parts.reverse();
                    let ino = Ino::encode(Object::Dir { version: view.slot, index: layers.index(parts[0])? })?;
                    let subdirs = Some(subdirs).filter(|_| parts.len() == 1 && dir.made_up == MadeUp::Nothing);
                    Entry { name, ino, what: What::Dir { parts: parts.into(), subdirs } }
                }
            });
        }
        Ok(entries)
    }

    /// Runs `f` on the open catalog of `layer`. After a failure the catalog is opened once more by its name (it may have
    /// been repaired, or its handle be stale) and `f` runs again.
    pub(super) fn with_catalog<T>(&self, layer: &Digest, f: impl Fn(&Catalog) -> Result<T>) -> Result<T> {
        match self.try_catalog(layer, &f) {
            Err(error) if !error.is_not_found() && !error.is_about_waiting() => {
                tracing::debug!(error = error.chain(), "a catalog is opened again");
                self.try_catalog(layer, &f)
            }
            other => other,
        }
    }

    fn open_catalog(&self, doc: &LayerDoc) -> Result<Catalog> {
        let Some(cache) = &self.cache else { return self.store.catalog_of(doc) };
        let object = doc.catalog_object();
        if let Some(bundle) = &doc.bundle {
            let bytes = cache.part(&bundle.object(), bundle.at, object.size)?;
            if Digest::of(&bytes) == doc.catalog {
                return Catalog::of_bytes(bytes, &self.store.object_path(&object), &doc.digest);
            }
            tracing::warn!(layer = doc.digest.short(), "a bundle of catalogs has another catalog than it should");
        }
        match cache.whole(&object)? {
            Whole::File(path, _held) => Catalog::open(&path, &doc.digest),
            Whole::Bytes(bytes) => Catalog::of_bytes(bytes, &self.store.object_path(&object), &doc.digest),
        }
    }

    fn try_catalog<T>(&self, layer: &Digest, f: &impl Fn(&Catalog) -> Result<T>) -> Result<T> {
        let catalog = self.catalogs.get_or(*layer, || {
            let doc = self.layer_doc(layer)?;
            let catalog = self.open_catalog(&doc).map_err(damaged)?;
            // Directories are numbered by what the documents count.
            if doc.rows != catalog.len() {
                return Err(more_rows(&doc));
            }
            Ok::<_, Error>(Arc::new(Mutex::new(catalog)))
        })?;
        let result = f(&catalog.lock().unwrap_or_else(PoisonError::into_inner));
        // Not found is an answer.
        if result.as_ref().is_err_and(|error| !error.is_not_found() && !error.is_about_waiting()) {
            self.catalogs.remove(layer);
        }
        result
    }
}

impl Entry {
    /// Its attributes in a version that was published at `created`, where they need no further look.
    pub(super) fn attr(&self, created: Time) -> Option<Attr> {
        match self.what {
            What::File { size, executable } => {
                let mode = if executable { 0o755 } else { 0o644 };
                Some(Attr { mode, ..lasting_file(self.ino, size) })
            }
            What::Symlink { size } => {
                Some(Attr { kind: FileKind::Symlink, mode: 0o777, ..lasting_file(self.ino, size) })
            }
            What::Dir { subdirs: Some(subdirs), .. } => Some(lasting_dir(self.ino, subdirs, created)),
            What::Dir { .. } | What::Special(_) => None,
        }
    }
}

impl Content {
    pub(super) fn find(&self, name: &[u8]) -> Option<&Entry> {
        self.entries.binary_search_by(|e| (*e.name).cmp(name)).ok().map(|at| &self.entries[at])
    }
}

/// The directory `name` in `dir`, of these parts.
fn child(dir: &MergedDir, ino: Ino, parts: Box<[Part]>, name: &[u8]) -> MergedDir {
    let made_up = if dir.made_up == MadeUp::Venv && name == b"bin" { MadeUp::Bin } else { MadeUp::Nothing };
    MergedDir { ino, parent: dir.ino, parts, made_up }
}

pub(super) fn special(view: &VersionView, special: Special) -> Result<Ino> {
    Ino::encode(Object::Special { version: view.slot, special })
}
