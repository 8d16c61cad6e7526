//! What the import accelerator of an environment (`_envfabric.py`) reads instead of asking for each module.
//!
//! ```text
//! <n>/.imports/             reached by its name, not listed: nothing that walks an environment finds it
//!   index                   which layer has which top-level name, and how to compute inode numbers
//!   <ord>.index             a layer's modules, directory by directory
//!   <ord>.pack              the layer's pack as it is in the store: bytecode at the offsets that its index names
//! ```
//!
//! All are values in CPython's `marshal` format:
//!
//! ```text
//! index        (1, st_dev, (inode, path) of site-packages, {inode: path} of the standard library's directories,
//!               inode of row 0 of each layer, inode of its directory with row 0, {top-level name: ord, or -1})
//! <ord>.index  {directory: marshalled (row, {name: entry})}
//!   entry      (0, row, offset, size)   name.py with bytecode of `size` bytes at `offset` of the pack
//!              (1, row, offset, size)   name/__init__.py likewise
//!              (2, row, suffix)         name + suffix, an extension module
//!              (3, 0)                   anything else that could be meant: CPython has to look
//! ```
//!
//! A name that is not in a table is not there. Indexes are computed from catalogs when asked for and kept by the kernel.

use std::collections::{BTreeMap, HashMap};

use super::inode::LayerFile;
use super::marshal::Marshal;
use super::merge::{MergedDir, What};
use super::version::{Layers, Ord, VersionView};
use super::*;

const FORMAT: i64 = 1;

/// A name of a directory of modules.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Module { row: RowId, offset: u64, size: u64 },
    Package { row: RowId, offset: u64, size: u64 },
    Extension { row: RowId, suffix: String },
    Ask,
}

/// What a directory of a layer has that an import could mean.
#[derive(Debug, Default)]
struct Dir {
    path: String,
    subdirs: BTreeMap<String, RowId>,
    sources: BTreeMap<String, RowId>,
    /// By name: row and suffix of each extension module.
    extensions: BTreeMap<String, Vec<(RowId, String)>>,
    /// By name without its two suffixes: where it lies in the pack.
    bytecode: HashMap<String, (u64, u64)>,
    /// Names that only CPython may judge.
    odd: Vec<String>,
    /// True when there is a name that is not UTF-8: then nothing is told of the directory.
    unreadable: bool,
}

/// The index of one layer, whose catalog is `catalog` and whose bytecode is for `tag` (`cpython-311`).
pub(super) fn layer_index(catalog: &Catalog, tag: &str) -> Result<Vec<u8>> {
    let dirs = scan(catalog, &format!(".{tag}.pyc"))?;
    let mut whole = Marshal::default();
    whole.dict();
    for (row, dir) in &dirs {
        let entries = entries(dir, &dirs);
        if dir.unreadable || entries.is_empty() {
            continue;
        }
        let mut table = Marshal::default();
        table.tuple(2).int(i64::from(*row)).dict();
        for (name, entry) in entries {
            table.text(name);
            let packed = |table: &mut Marshal, kind, row: RowId, offset: u64, size: u64| {
                table.tuple(4).int(kind).int(i64::from(row)).int(offset as i64).int(size as i64);
            };
            match entry {
                Entry::Module { row, offset, size } => packed(&mut table, 0, row, offset, size),
                Entry::Package { row, offset, size } => packed(&mut table, 1, row, offset, size),
                Entry::Extension { row, suffix } => {
                    table.tuple(3).int(2).int(i64::from(row)).text(&suffix);
                }
                Entry::Ask => {
                    table.tuple(2).int(3).int(0);
                }
            }
        }
        table.end();
        whole.text(&dir.path).bytes(&table.finish());
    }
    whole.end();
    Ok(whole.finish())
}

fn scan(catalog: &Catalog, pyc: &str) -> Result<BTreeMap<RowId, Dir>> {
    let mut dirs = BTreeMap::from([(0, Dir::default())]);
    catalog.scan(|row| {
        // Rows come parent by parent, and a parent's number is below its children's: it is here already.
        let Some(dir) = dirs.get_mut(&row.parent) else { return };
        let Ok(name) = std::str::from_utf8(row.name) else {
            dir.unreadable = true;
            return;
        };
        let stem = name.split('.').next().unwrap_or(name);
        match row.kind {
            ScannedKind::Dir { .. } => {
                dir.subdirs.insert(name.to_string(), row.id);
                let path = if dir.path.is_empty() { name.to_string() } else { format!("{}/{name}", dir.path) };
                let unreadable = dir.unreadable;
                dirs.insert(row.id, Dir { path, unreadable, ..Dir::default() });
            }
            ScannedKind::Symlink { .. } => dir.odd.push(stem.to_string()),
            ScannedKind::File { size, offset, .. } => {
                if let Some(module) = name.strip_suffix(pyc) {
                    if let Some(offset) = offset {
                        dir.bytecode.insert(module.to_string(), (offset, size));
                    }
                } else if let Some(module) = name.strip_suffix(".py") {
                    dir.sources.insert(module.to_string(), row.id);
                } else if name.ends_with(".so") {
                    let suffix = name[stem.len()..].to_string();
                    dir.extensions.entry(stem.to_string()).or_default().push((row.id, suffix));
                } else if name.ends_with(".pyc") {
                    dir.odd.push(stem.to_string());
                }
            }
        }
    })?;
    Ok(dirs)
}

/// What each name of `dir` leads to, in the order in which CPython's `FileFinder` looks.
fn entries<'d>(dir: &'d Dir, dirs: &BTreeMap<RowId, Dir>) -> BTreeMap<&'d str, Entry> {
    let bytecode = |of: &Dir, name: &str| {
        let cache = of.subdirs.get("__pycache__").and_then(|row| dirs.get(row))?;
        cache.bytecode.get(name).copied().filter(|_| !cache.unreadable)
    };
    let mut entries = BTreeMap::new();
    for (name, row) in &dir.sources {
        let entry = match bytecode(dir, name) {
            Some((offset, size)) => Entry::Module { row: *row, offset, size },
            None => Entry::Ask,
        };
        entries.insert(name.as_str(), entry);
    }
    for (name, found) in &dir.extensions {
        let entry = match &found[..] {
            [(row, suffix)] if !dir.sources.contains_key(name) => {
                Entry::Extension { row: *row, suffix: suffix.clone() }
            }
            _ => Entry::Ask,
        };
        entries.insert(name, entry);
    }
    for (name, row) in dir.subdirs.iter().filter(|(name, _)| !name.contains('.')) {
        let Some(sub) = dirs.get(row) else { continue };
        let odd = sub.unreadable || sub.extensions.contains_key("__init__") || sub.odd.iter().any(|n| n == "__init__");
        let entry = match (sub.sources.get("__init__"), bytecode(sub, "__init__")) {
            (Some(row), Some((offset, size))) if !odd => Entry::Package { row: *row, offset, size },
            // Without any `__init__` a module of that name goes first.
            (None, _) if !odd && entries.contains_key(name.as_str()) => continue,
            _ => Entry::Ask,
        };
        entries.insert(name, entry);
    }
    for name in &dir.odd {
        entries.insert(name, Entry::Ask);
    }
    entries
}

/// `cpython-311` of a layer's ABI, `cpython-311-x86_64-linux-gnu+a70d0d0a`.
fn cache_tag(abi: &str) -> &str {
    abi.match_indices(['-', '+']).nth(1).map_or(abi, |(at, _)| &abi[..at])
}

impl Tree {
    /// What `name` in the `.imports` of a version leads to.
    pub(super) fn imports_entry(&self, view: &VersionView, name: &[u8]) -> Result<Option<Ino>> {
        if name == b"index" {
            return merge::special(view, Special::ImportsIndex).map(Some);
        }
        let parts = std::str::from_utf8(name).ok().and_then(|name| name.split_once('.'));
        let Some((number, what)) = parts else { return Ok(None) };
        let layers = self.layers(view)?;
        let ord = number.parse::<Ord>().ok().filter(|ord| ord.to_string() == number);
        let Some(ord) = ord.filter(|ord| (*ord as usize) < layers.docs.len()) else { return Ok(None) };
        let file = match what {
            "index" => LayerFile::Imports,
            "pack" if layers.docs[ord as usize].pack.is_some() => LayerFile::Pack,
            _ => return Ok(None),
        };
        Ino::encode(Object::Layer { layer: layers.slot(ord)?, file }).map(Some)
    }

    /// The bytes of `index` or `<ord>.index`.
    pub(super) fn imports_bytes(&self, ino: Ino) -> Result<Arc<[u8]>> {
        if let Some(bytes) = self.imports.get(&ino) {
            return Ok(bytes);
        }
        let bytes: Arc<[u8]> = match ino.decode().ok_or_else(gone)? {
            Object::Special { version, special: Special::ImportsIndex } => {
                self.version_index(&*self.version(version)?)?.into()
            }
            Object::Layer { layer, file: LayerFile::Imports } => {
                let digest = self.layer_slots.key(layer).ok_or_else(gone)?;
                let doc = self.layer_doc(&digest)?;
                self.with_catalog(&digest, |catalog| layer_index(catalog, cache_tag(&doc.meta.abi)))?.into()
            }
            _ => return Err(gone()),
        };
        self.imports.put_weighing(ino, bytes.clone(), bytes.len());
        Ok(bytes)
    }

    fn version_index(&self, view: &VersionView) -> Result<Vec<u8>> {
        let layers = self.layers(view)?;
        let python = &view.version.interpreter;
        let library = format!("lib/{}", python_dir(&python.executable));
        let site = format!("{library}/site-packages");
        let device = self.mountpoint.get().map_or(0, |at| libc::makedev(at.dev.0, at.dev.1));
        let mut index = Marshal::default();
        index.tuple(7).int(FORMAT).int(device as i64);
        let site_dir = self.dir_at(view, &layers, true, &site)?;
        index.tuple(2).int(site_dir.as_ref().map_or(0, |dir| dir.ino.get() as i64)).text(&site);
        index.dict();
        for path in [library.clone(), format!("{library}/lib-dynload")] {
            if let Some(dir) = self.dir_at(view, &layers, false, &path)? {
                index.int(dir.ino.get() as i64).text(&path);
            }
        }
        index.end();
        index.tuple(layers.slots.len());
        for slot in &layers.slots {
            index.int(Ino::encode(Object::Row { layer: *slot, row: 0 })?.get() as i64);
        }
        index.tuple(layers.slots.len());
        for ord in 0..layers.slots.len() as Ord {
            let first = layers.index(version::Part { ord, row: 0 })?;
            index.int(Ino::encode(Object::Dir { version: view.slot, index: first })?.get() as i64);
        }
        index.dict();
        for (name, ord) in self.top_level(view, &layers, site_dir.as_deref())? {
            index.text(&name).int(ord);
        }
        index.end();
        Ok(index.finish())
    }

    /// Which layer alone has what each top-level name could mean; -1 where several have.
    fn top_level(
        &self,
        view: &VersionView,
        layers: &Layers,
        site: Option<&MergedDir>,
    ) -> Result<BTreeMap<String, i64>> {
        let mut names = BTreeMap::new();
        let Some(site) = site else { return Ok(names) };
        let slots: HashMap<u32, i64> = layers.slots.iter().zip(0..).map(|(slot, ord)| (*slot, ord)).collect();
        for entry in &self.content(view, layers, site)?.entries {
            let name = String::from_utf8_lossy(&entry.name);
            let stem = name.split('.').next().unwrap_or(&name);
            let matters = match entry.what {
                What::Dir { .. } => stem == name,
                _ => stem == name || [".py", ".so", ".pyc"].iter().any(|suffix| name.ends_with(suffix)),
            };
            if !matters {
                continue;
            }
            let ord = match (&entry.what, entry.ino.decode()) {
                (What::Dir { parts, .. }, _) if parts.len() == 1 => i64::from(parts[0].ord),
                (_, Some(Object::Row { layer, .. })) => slots.get(&layer).copied().unwrap_or(-1),
                _ => -1,
            };
            let known = names.entry(stem.to_string()).or_insert(ord);
            if *known != ord {
                *known = -1;
            }
        }
        Ok(names)
    }

    fn dir_at(&self, view: &VersionView, layers: &Layers, venv: bool, path: &str) -> Result<Option<Arc<MergedDir>>> {
        let mut dir = self.tree_root(view, layers, venv)?;
        for name in path.split('/') {
            match self.child(view, &dir, name.as_bytes())? {
                Some(Child::Dir(below)) => dir = below,
                _ => return Ok(None),
            }
        }
        Ok(Some(dir))
    }
}

/// `python3.11` of `bin/python3.11`: the standard library's directory is called like the executable.
fn python_dir(executable: &str) -> &str {
    executable.rsplit('/').next().unwrap_or(executable)
}
