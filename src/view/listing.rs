//! Listings and extended attributes of a [`Tree`].

use super::merge::{self, What};
use super::names::Age;
use super::*;

impl Tree {
    /// Everything in directory `dir`.
    pub fn list(&self, dir: Ino) -> Result<Listing> {
        let here = |offset, name: &str, ino| DirEntry { offset, name: name.into(), ino, kind: FileKind::Dir };
        let head = [here(1, ".", dir), here(2, "..", self.parent(dir)?)];
        let rest = match dir.decode().ok_or_else(gone)? {
            Object::Dir { version, index } => {
                let view = self.version(version)?;
                let merged = self.merged_dir(&view, index)?;
                Rest::Lasting(self.content(&view, &*self.layers(&view)?, &merged)?, view.created())
            }
            Object::Root => {
                let workflows = self.names.workflows(Age::Fresh)?;
                Rest::Moving(self.name_entries(dir, &workflows.value, |name| Ok(NameKey::Workflow(name.into())))?)
            }
            Object::Name { slot } => match self.name_slots.key(slot).ok_or_else(gone)? {
                NameKey::Workflow(workflow) => {
                    let nodes = self.names.nodes(&workflow, Age::Fresh)?;
                    let key = |node: &str| EnvName::new(&workflow, node).map(NameKey::Node);
                    Rest::Moving(self.name_entries(dir, &nodes.value, key)?)
                }
                NameKey::Node(env) => Rest::Moving(self.node_entries(slot, &env)?),
            },
            Object::Versions { slot } => {
                let Some(NameKey::Node(env)) = self.name_slots.key(slot) else { return Err(gone()) };
                let mut entries = Vec::new();
                for number in self.names.versions(&env, Age::Fresh)?.value.iter() {
                    let version = self.version_slots.ensure(&(env.clone(), *number))?;
                    let ino = Ino::encode(Object::Special { version, special: Special::Root })?;
                    entries.push(here(slot_offset(version), &number.to_string(), ino));
                }
                entries.sort_unstable_by_key(|entry| entry.offset);
                Rest::Moving(Arc::new(entries))
            }
            Object::Special { version, special: Special::Root } => {
                let view = self.version(version)?;
                let mut entries = Vec::new();
                for name in root_names(&view) {
                    if let Some(ino) = self.root_entry(&view, name.as_bytes())? {
                        let kind = if name == ".venv" || name == ".python" { FileKind::Dir } else { FileKind::File };
                        entries.push(DirEntry { offset: entries.len() as u64 + 3, name: name.into_bytes(), ino, kind });
                    }
                }
                Rest::Moving(Arc::new(entries))
            }
            Object::Special { version, special: Special::Imports } => {
                let view = self.version(version)?;
                let ords = 0..self.layers(&view)?.docs.len();
                let names = ords.flat_map(|ord| [format!("{ord}.index"), format!("{ord}.pack")]);
                let mut entries = Vec::new();
                for name in std::iter::once("index".to_string()).chain(names) {
                    if let Some(ino) = self.imports_entry(&view, name.as_bytes())? {
                        let offset = entries.len() as u64 + 3;
                        entries.push(DirEntry { offset, name: name.into_bytes(), ino, kind: FileKind::File });
                    }
                }
                Rest::Moving(Arc::new(entries))
            }
            Object::Row { .. } | Object::Layer { .. } | Object::Special { .. } => return Err(not_a_directory()),
        };
        Ok(Listing { head, rest })
    }

    /// The entries of directory `dir`; those made last are kept, because a long listing is asked for in many parts.
    fn name_entries(
        &self,
        dir: Ino,
        names: &Arc<Vec<String>>,
        key: impl Fn(&str) -> Result<NameKey>,
    ) -> Result<Arc<Vec<DirEntry>>> {
        if let Some((_, entries)) = self.moving.get(&dir).filter(|(of, _)| Arc::ptr_eq(of, names)) {
            return Ok(entries);
        }
        let entry = |name: &String| -> Result<DirEntry> {
            let slot = self.name_slots.ensure(&key(name)?)?;
            let ino = Ino::encode(Object::Name { slot })?;
            Ok(DirEntry { offset: slot_offset(slot), name: name.clone().into_bytes(), ino, kind: FileKind::Dir })
        };
        let mut entries: Vec<_> = names.iter().map(entry).collect::<Result<_>>()?;
        entries.sort_unstable_by_key(|entry| entry.offset);
        let entries = Arc::new(entries);
        self.moving.put(dir, (names.clone(), entries.clone()));
        Ok(entries)
    }

    fn node_entries(&self, slot: u32, env: &EnvName) -> Result<Arc<Vec<DirEntry>>> {
        let mut entries = vec![DirEntry {
            offset: slot_offset(0),
            name: b".versions".to_vec(),
            ino: Ino::encode(Object::Versions { slot })?,
            kind: FileKind::Dir,
        }];
        if let Some(current) = self.names.env(env, Age::Fresh)? {
            let view = self.version_of(env, current.current)?;
            for (name, special) in node_links(&view) {
                let ino = merge::special(&view, special)?;
                let offset = slot_offset(special as u32);
                entries.push(DirEntry { offset, name: name.into_bytes(), ino, kind: FileKind::Symlink });
            }
        }
        entries.sort_unstable_by_key(|entry| entry.offset);
        Ok(Arc::new(entries))
    }

    /// Where `name` in a version's own directory leads.
    pub(super) fn root_entry(&self, view: &VersionView, name: &[u8]) -> Result<Option<Ino>> {
        let document = |special: Special| view.document(special).is_some_and(|d| d.name.as_bytes() == name);
        let special = match name {
            b".venv" | b".python" => {
                let root = self.tree_root(view, &*self.layers(view)?, name == b".venv")?;
                return Ok(Some(root.ino));
            }
            b"metadata.json" => Special::Metadata,
            b".imports" if self.offer_imports => Special::Imports,
            _ if document(Special::Lock) => Special::Lock,
            _ if document(Special::Project) => Special::Project,
            _ => return Ok(None),
        };
        merge::special(view, special).map(Some)
    }

    /// Attributes of entry `at` of `listing`.
    pub fn entry_attr(&self, listing: &Listing, at: usize) -> Result<Attr> {
        if let (Rest::Lasting(content, created), Some(at)) = (&listing.rest, at.checked_sub(2)) {
            let entry = content.entries.get(at).ok_or_else(gone)?;
            return entry.attr(*created).map_or_else(|| self.attr(entry.ino), Ok);
        }
        let entry = listing.get(at).ok_or_else(gone)?;
        match entry.ino.decode() {
            // Its pointer was looked at for the listing.
            Some(Object::Name { slot }) => self.name_attr(slot, Age::Any),
            _ => self.attr(entry.ino),
        }
    }

    /// The extended attributes of `ino`: names and values.
    ///
    /// A file tells `user.envfabric.layer`, `.digest` (sha256 of its bytes) and `.package` (`name==version`); a directory
    /// inside a version tells `user.envfabric.version` (`workflow/node@3`).
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<(&'static str, String)>> {
        let label = |version: u32| -> Result<Vec<(&'static str, String)>> {
            Ok(vec![("user.envfabric.version", self.version(version)?.label())])
        };
        match ino.decode().ok_or_else(gone)? {
            Object::Row { layer, row } => {
                let Node::File { digest, .. } = self.row(layer, row)?.node else { return Ok(vec![]) };
                let layer = self.layer_slots.key(layer).ok_or_else(gone)?;
                let doc = self.layer_doc(&layer)?;
                let mut found =
                    vec![("user.envfabric.layer", layer.to_string()), ("user.envfabric.digest", digest.to_string())];
                if doc.meta.kind != LayerKind::Scaffold {
                    let package = format!("{}=={}", doc.meta.name, doc.meta.version);
                    found.push(("user.envfabric.package", package));
                }
                Ok(found)
            }
            Object::Dir { version, .. } | Object::Special { version, special: Special::Root } => label(version),
            Object::Special { version, special: special @ (Special::Lock | Special::Project) } => {
                let view = self.version(version)?;
                let digest = view.document(special).ok_or_else(gone)?.blob.to_string();
                Ok(vec![("user.envfabric.digest", digest)])
            }
            _ => Ok(vec![]),
        }
    }
}

/// Where a listing that changes goes on behind the entry in `slot`: a slot is its entry's for ever, so between two calls
/// others may come and go.
fn slot_offset(slot: u32) -> u64 {
    u64::from(slot) + 3
}

fn root_names(view: &VersionView) -> Vec<String> {
    let mut names = vec![".venv".to_string(), ".python".to_string(), "metadata.json".to_string()];
    names.extend([Special::Lock, Special::Project].iter().filter_map(|s| view.document(*s)).map(|d| d.name.clone()));
    names.sort();
    names
}

impl Listing {
    /// How many entries there are, `.` and `..` included.
    pub fn len(&self) -> usize {
        2 + match &self.rest {
            Rest::Lasting(content, _) => content.entries.len(),
            Rest::Moving(entries) => entries.len(),
        }
    }

    /// Never true: there are always `.` and `..`.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The first entry behind `offset`, which is 0 or an [`EntryRef::offset`] of this directory, then or earlier.
    pub fn behind(&self, offset: u64) -> usize {
        match &self.rest {
            Rest::Moving(entries) if offset >= 2 => 2 + entries.partition_point(|entry| entry.offset <= offset),
            _ => usize::try_from(offset).unwrap_or(usize::MAX),
        }
    }

    /// Entry `at`: name, where it leads, what that is.
    pub fn get(&self, at: usize) -> Option<EntryRef<'_>> {
        let Some(behind) = at.checked_sub(2) else {
            return self.head.get(at).map(EntryRef::of);
        };
        match &self.rest {
            Rest::Moving(entries) => entries.get(behind).map(EntryRef::of),
            Rest::Lasting(content, _) => content.entries.get(behind).map(|entry| EntryRef {
                offset: at as u64 + 1,
                name: &entry.name,
                ino: entry.ino,
                kind: match entry.what {
                    What::Dir { .. } => FileKind::Dir,
                    What::Symlink { .. } => FileKind::Symlink,
                    What::File { .. } | What::Special(Special::Config) => FileKind::File,
                    What::Special(_) => FileKind::Symlink,
                },
            }),
        }
    }
}

/// One name in a [`Listing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef<'l> {
    /// Where a listing goes on behind it, above 0; grows from entry to entry.
    pub offset: u64,
    /// One path component, `.` or `..`.
    pub name: &'l [u8],
    /// Where it leads.
    pub ino: Ino,
    /// What that is.
    pub kind: FileKind,
}

impl<'l> EntryRef<'l> {
    fn of(entry: &'l DirEntry) -> Self {
        EntryRef { offset: entry.offset, name: &entry.name, ino: entry.ino, kind: entry.kind }
    }
}
