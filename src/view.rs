//! The view: version -> merged tree -> inode numbers -> attributes and bytes. Ordinary Rust, no kernel.
//!
//! ```text
//! /                                                 Root
//!   <workflow>/                                     Name      names that move: answers age
//!     <node>/                                       Name
//!       .venv -> .versions/<n>/.venv                Special   a new inode per target
//!       .python -> .versions/<n>/.python            Special   likewise
//!       pyproject.toml, pylock.toml, metadata.json  Special   links to the current version's
//!       .versions/                                  Versions
//!         <n>/                                      Special   from here on nothing ever changes
//!           metadata.json, pyproject.toml, lock     Special
//!           .imports/                               Special   what imports read; not listed
//!           .python/                                Dir       the interpreter's layer
//!             bin/python3.11                        Row
//!           .venv/                                  Dir       scaffold + layers, later wins
//!             pyvenv.cfg                            Special   rendered for whoever reads it
//!             bin/python -> ../../.python/bin/...   Special
//!             lib/python3.11/site-packages/...      Dir, Row
//! ```
//!
//! [`Tree`] answers by inode number ([`Ino`]) and keeps no state per inode that was looked at: everything behind a
//! number is found again from the number alone, with the help of bounded memories. It may be asked from many threads.

mod attrs;
mod bytes;
mod documents;
mod imports;
mod inode;
mod keys;
mod leases;
mod listing;
mod loading;
mod lru;
mod marshal;
mod memories;
mod merge;
pub mod mountinfo;
mod names;
mod reading;
mod slots;
mod starts;
mod version;
mod vouched;

use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

pub use inode::{Ino, LayerFile, Object, ROWS_MAX, SLOTS_MAX, Special};
pub use listing::EntryRef;
pub use names::{FRESH, NameChange, Time, WATCHED};
pub use version::CONFIG_SIZE;

use crate::cache::{Cache, Held};
use crate::environment::{Digest, EnvName, Version};
use crate::error::{Error, Kind, Result};
use crate::store::{Catalog, Index, LayerDoc, LayerKind, Node, Place, Row, RowId, ScannedKind, Store};
use attrs::{lasting_dir, lasting_file, moving_dir, of_workflow, row_attr};
use bytes::{Location, Needed, Objects};
pub use keys::Logs;
use keys::NameKey;
use leases::Leases;
use lru::Lru;
use merge::{Child, Content, MergedDir};
use names::{Age, Names};
pub use slots::Log;
use slots::Slots;
use starts::Starts;
pub use starts::Warming;
use version::{Layers, VersionView, damaged, gone};

/// Open catalogs: each costs about 150 KB and a descriptor.
const CATALOGS_MAX: usize = 256;
/// Names in listings that are kept, over all directories.
const NAMES_MAX: usize = 500_000;
/// Listings of directories outside versions that are kept.
const MOVING_MAX: usize = 16;
/// Directories whose parts are kept.
const DIRS_MAX: usize = 32_768;
/// Files whose place is kept.
const LOCATIONS_MAX: usize = 65_536;
/// Bytes of indexes for imports that are kept; the kernel keeps what is in use.
const IMPORTS_BYTES_MAX: usize = 4 << 20;
/// Versions whose documents are kept.
const VERSIONS_MAX: usize = 1024;
/// Failures that are told; a store that fails in more ways is known to be broken by then.
const TOLD_MAX: usize = 4096;

/// What sort of thing an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Dir,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
}

/// Attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// User and group whose it is; none: who mounted.
    pub owner: Option<(u32, u32)>,
    /// 2 and the number of subdirectories for a directory, else 1.
    pub nlink: u32,
    /// Modification time.
    pub mtime: Time,
    /// True when it never changes, nor what name leads to it.
    pub lasting: bool,
}

#[derive(Debug, Clone)]
struct DirEntry {
    /// See [`EntryRef::offset`].
    offset: u64,
    name: Vec<u8>,
    ino: Ino,
    kind: FileKind,
}

/// A directory as it was at one time, `.` and `..` first, the rest in order of offset. Inside a version that is also the
/// order of names.
#[derive(Debug, Clone)]
pub struct Listing {
    head: [DirEntry; 2],
    rest: Rest,
}

#[derive(Debug, Clone)]
enum Rest {
    Lasting(Arc<Content>, Time),
    Moving(Arc<Vec<DirEntry>>),
}

/// How a file's bytes are to be had.
#[derive(Debug)]
pub enum Opened {
    /// They never change: the kernel may keep them.
    Lasting,
    /// They never change, and are all of an object.
    Whole {
        /// The file with all of them, where there is one that can be read in place.
        file: Option<Arc<File>>,
        /// How many there are.
        size: u64,
        /// To be kept as long as the file is open.
        held: Option<Held>,
    },
    /// They differ by who reads: the kernel must not keep them.
    ByReader,
}

/// Who reads: a thread id as this process sees it, where it sees it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reader {
    /// Thread id; none when the reader is outside this process's pid namespace.
    pub tid: Option<u32>,
}

/// Where a tree is mounted.
#[derive(Debug, Clone)]
pub struct Mountpoint {
    /// The directory.
    pub path: PathBuf,
    /// The device number that the mount got, major and minor.
    pub dev: (u32, u32),
}

/// What the kernel may have kept and is now wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// A directory whose listing and attributes changed.
    pub dir: Ino,
    /// Names in it that lead elsewhere now; only symbolic links are named here, because to invalidate the name of a
    /// directory would unmount everything below it.
    pub links: Vec<String>,
}

/// Everything that a mount of one store shows.
#[derive(Debug)]
pub struct Tree {
    store: Store,
    index: Arc<Index>,
    names: Arc<Names>,
    mountpoint: OnceLock<Mountpoint>,
    /// Whom to ask of readers that this process may not look at.
    elsewhere: OnceLock<Arc<dyn mountinfo::Elsewhere>>,
    layer_slots: Slots<Digest>,
    version_slots: Slots<(EnvName, u64)>,
    name_slots: Slots<NameKey>,
    versions: Lru<u32, Arc<VersionView>>,
    catalogs: Lru<Digest, Arc<Mutex<Catalog>>>,
    dirs: Lru<(u32, u32), Arc<MergedDir>>,
    contents: Lru<Ino, Arc<Content>>,
    /// Names and entries of directories outside versions.
    moving: Lru<Ino, NamedEntries>,
    locations: Lru<Ino, Location>,
    imports: Lru<Ino, Arc<[u8]>>,
    offer_imports: bool,
    objects: Objects,
    cache: Option<Arc<Cache>>,
    /// Objects of which the part that programs need was asked for.
    begun: Lru<crate::store::Object, Needed>,
    starts: Starts,
    leases: Arc<Leases>,
    /// Note what starts read, for the profiles of versions.
    records: bool,
    told: Mutex<HashSet<String>>,
    /// Where versions must be signed: what is known of their layers.
    vouched: vouched::Vouched,
}

/// Names as [`Names`] tells them, and the entries made of them.
type NamedEntries = (Arc<Vec<String>>, Arc<Vec<DirEntry>>);

impl Tree {
    /// Everything in `store`.
    pub fn new(store: Store, index: Arc<Index>) -> Tree {
        let names = Names::of_store(store.clone());
        Tree::with_names(store, index, names)
    }

    /// Nothing but `draft`, which need not be published (its layers must be in the store).
    pub fn of_draft(store: Store, index: Arc<Index>, draft: Version) -> Tree {
        Tree::with_names(store, index, Names::of_draft(draft))
    }

    fn with_names(store: Store, index: Arc<Index>, names: Names) -> Tree {
        Tree {
            store,
            index,
            names: Arc::new(names),
            mountpoint: OnceLock::new(),
            elsewhere: OnceLock::new(),
            layer_slots: Slots::new(),
            version_slots: Slots::new(),
            name_slots: Slots::new(),
            versions: Lru::new(VERSIONS_MAX),
            catalogs: Lru::new(CATALOGS_MAX),
            dirs: Lru::new(DIRS_MAX),
            contents: Lru::single(NAMES_MAX),
            moving: Lru::single(MOVING_MAX),
            locations: Lru::new(LOCATIONS_MAX),
            imports: Lru::single(IMPORTS_BYTES_MAX),
            offer_imports: true,
            objects: Objects::new(),
            cache: None,
            begun: Lru::new(LOCATIONS_MAX / 16),
            starts: Starts::default(),
            leases: Arc::default(),
            records: false,
            told: Mutex::default(),
            vouched: vouched::Vouched::default(),
        }
    }

    /// The same, going on with what earlier processes have told of it.
    pub fn kept(self, logs: Logs) -> Tree {
        self.names.go_on(Slots::kept(logs.current));
        let Logs { layers, versions, names, .. } = logs;
        Tree {
            layer_slots: Slots::kept(layers),
            version_slots: Slots::kept(versions),
            name_slots: Slots::kept(names),
            ..self
        }
    }

    /// Sees whether the store can be read, as far as that is needed to begin.
    ///
    /// # Errors
    /// Those of the store.
    pub fn prove(&self) -> Result<()> {
        self.store.require_present()?;
        self.attr(Ino::ROOT).map(drop)
    }

    /// The same with what this node keeps of the store.
    pub fn cached(self, cache: Arc<Cache>) -> Tree {
        Tree { cache: Some(cache), ..self }
    }

    /// The same, adding to the profiles of versions what their starts read.
    pub fn recording(self) -> Tree {
        Tree { records: true, ..self }
    }

    /// The same without what accelerates imports.
    pub fn without_imports(self) -> Tree {
        Tree { offer_imports: false, ..self }
    }

    /// The same for a store that may hang: no question to it is waited for longer than `limit`, and none on a thread that
    /// must not wait (see [`patience`](crate::patience)).
    pub fn distant(self, limit: Duration) -> Tree {
        self.names.set_distant(limit);
        self
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Tells where the tree is mounted, once that is known.
    pub fn set_mountpoint(&self, mountpoint: Mountpoint) {
        // A tree is mounted once.
        let _ = self.mountpoint.set(mountpoint);
    }

    /// Has `elsewhere` asked of readers that this process may not look at.
    pub fn look_elsewhere(&self, elsewhere: Arc<dyn mountinfo::Elsewhere>) {
        // It is said once.
        let _ = self.elsewhere.set(elsewhere);
    }

    /// Logs a failure the first time it is seen; an absent name is none.
    pub fn tell(&self, error: &Error) {
        // An outage was told when it began; which objects it concerns was not, and they are named by a context.
        let names_object = std::error::Error::source(error).is_some();
        let told = error.kind() == Kind::TimedOut && self.is_cut_off() && !names_object;
        if error.is_not_found() || error.kind() == Kind::WouldWait || told {
            return;
        }
        let text = error.chain();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TOLD_MAX && told.insert(text.clone()) {
            tracing::error!("{text}");
        }
    }

    /// Asks the store for changes of all names asked for lately; false when there were none.
    pub fn refresh(&self) -> bool {
        self.names.refresh()
    }

    /// True while the store does not answer, and what is known of it is told without asking.
    pub fn is_cut_off(&self) -> bool {
        self.names.are_cut_off()
    }

    /// What has changed since the last call.
    pub fn take_changes(&self) -> Vec<Changed> {
        let changes = self.names.take_changes();
        changes.into_iter().filter_map(|change| self.changed(change).ok().flatten()).collect()
    }

    fn changed(&self, change: NameChange) -> Result<Option<Changed>> {
        let slot = |key: NameKey| self.name_slots.slot(&key);
        let name = |slot: Option<u32>| slot.map(|slot| Ino::encode(Object::Name { slot })).transpose();
        let mut links = Vec::new();
        let dir = match change {
            NameChange::Workflows => Some(Ino::ROOT),
            // Only its own directory: that is where whoever may not look is kept out.
            NameChange::Nodes(workflow) | NameChange::Owner(workflow) => name(slot(NameKey::Workflow(workflow)))?,
            NameChange::Current(env) => {
                let names = [".venv", ".python", "metadata.json", "pyproject.toml", "pylock.toml", "uv.lock"];
                links.extend(names.map(String::from));
                name(slot(NameKey::Node(env)))?
            }
            NameChange::Versions(env) => {
                slot(NameKey::Node(env)).map(|slot| Ino::encode(Object::Versions { slot })).transpose()?
            }
        };
        Ok(dir.map(|dir| Changed { dir, links }))
    }

    /// Where `name` in directory `dir` leads; none when there is no such name. Knows `.` and `..`.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Option<Attr>> {
        if name == b"." {
            return self.attr(dir).map(Some);
        }
        if name == b".." {
            return self.parent(dir).and_then(|parent| self.attr(parent)).map(Some);
        }
        match dir.decode().ok_or_else(gone)? {
            Object::Root => {
                let Some(workflow) = part(name) else { return Ok(None) };
                if !self.names.has_workflow(workflow)? {
                    return Ok(None);
                }
                let slot = self.name_slots.ensure(&NameKey::Workflow(workflow.into()))?;
                self.name_attr(slot, Age::Any).map(Some)
            }
            Object::Name { slot } => self.lookup_name(slot, name),
            Object::Versions { slot } => self.lookup_version(slot, name),
            Object::Special { version, special: Special::Root } => {
                let view = self.version(version)?;
                match self.root_entry(&view, name)? {
                    Some(ino) => self.attr(ino).map(Some),
                    None => Ok(None),
                }
            }
            Object::Special { version, special: Special::Imports } => {
                let ino = self.imports_entry(&*self.version(version)?, name)?;
                ino.map(|ino| self.attr(ino)).transpose()
            }
            Object::Dir { version, index } => {
                let view = self.version(version)?;
                let dir = self.merged_dir(&view, index)?;
                match self.child(&view, &dir, name)? {
                    None => Ok(None),
                    Some(Child::Dir(below)) => self.dir_attr(&view, &below, below.ino).map(Some),
                    Some(Child::Leaf(ino, row)) => Ok(Some(row_attr(ino, &row.node))),
                    Some(Child::Known(attr)) => Ok(Some(attr)),
                    Some(Child::Other(ino)) => self.attr(ino).map(Some),
                }
            }
            Object::Row { .. } | Object::Layer { .. } | Object::Special { .. } => Err(not_a_directory()),
        }
    }

    fn lookup_name(&self, slot: u32, name: &[u8]) -> Result<Option<Attr>> {
        match self.name_slots.key(slot).ok_or_else(gone)? {
            NameKey::Workflow(workflow) => {
                let Some(env) = part(name).and_then(|node| EnvName::new(&workflow, node).ok()) else {
                    return Ok(None);
                };
                if self.names.env(&env, Age::Fresh)?.is_none() {
                    return Ok(None);
                }
                let slot = self.name_slots.ensure(&NameKey::Node(env))?;
                self.name_attr(slot, Age::Any).map(Some)
            }
            NameKey::Node(env) => {
                if name == b".versions" {
                    return self.versions_attr(slot, &env, Age::Any).map(Some);
                }
                let Some(current) = self.names.env(&env, Age::Fresh)? else { return Ok(None) };
                let view = self.version_of(&env, current.current)?;
                let link = node_links(&view).into_iter().find(|(link, _)| link.as_bytes() == name);
                link.map(|(_, special)| merge::special(&view, special).and_then(|ino| self.attr(ino))).transpose()
            }
        }
    }

    fn lookup_version(&self, slot: u32, name: &[u8]) -> Result<Option<Attr>> {
        let Some(NameKey::Node(env)) = self.name_slots.key(slot) else { return Err(gone()) };
        let Some(number) = std::str::from_utf8(name).ok().and_then(|text| text.parse::<u64>().ok()) else {
            return Ok(None);
        };
        if number.to_string().as_bytes() != name {
            return Ok(None); // a version has one name
        }
        let view = match self.version_of(&env, number) {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other?,
        };
        self.names.mark_used(&env);
        self.attr(merge::special(&view, Special::Root)?).map(Some)
    }

    /// Attributes of `ino`.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        match ino.decode().ok_or_else(gone)? {
            Object::Root => {
                // As for the nodes of a workflow.
                Ok(match self.names.workflows_if_read()? {
                    Some(known) => moving_dir(ino, known.value.len(), known.mtime),
                    None => Attr { nlink: 1, ..moving_dir(ino, 0, self.names.begun()) },
                })
            }
            Object::Name { slot } => self.name_attr(slot, Age::Fresh),
            Object::Versions { slot } => {
                let Some(NameKey::Node(env)) = self.name_slots.key(slot) else { return Err(gone()) };
                self.versions_attr(slot, &env, Age::Fresh)
            }
            Object::Row { layer, row } => Ok(row_attr(ino, &self.row(layer, row)?.node)),
            Object::Layer { file, .. } => {
                let size = match file {
                    LayerFile::Pack => self.location(ino)?.size,
                    LayerFile::Imports => self.imports_bytes(ino)?.len() as u64,
                };
                Ok(lasting_file(ino, size))
            }
            Object::Dir { version, index } => {
                let view = self.version(version)?;
                let dir = self.merged_dir(&view, index)?;
                self.dir_attr(&view, &dir, ino)
            }
            Object::Special { version, special } => self.special_attr(&*self.version(version)?, special),
        }
    }

    fn name_attr(&self, slot: u32, age: Age) -> Result<Attr> {
        let ino = Ino::encode(Object::Name { slot })?;
        match self.name_slots.key(slot).ok_or_else(gone)? {
            NameKey::Workflow(workflow) => {
                let whose = self.names.whose(&workflow)?;
                let known = self.names.nodes_if_read(&workflow, age)?;
                let attr = match known {
                    Some(known) => moving_dir(ino, known.value.len(), known.mtime),
                    // The way to one environment does not wait until thousands are counted: one link means, as on some
                    // other file systems, that subdirectories are not counted.
                    None => Attr { nlink: 1, ..moving_dir(ino, 0, self.names.begun()) },
                };
                Ok(of_workflow(attr, whose))
            }
            // A removed one that somebody stands in keeps its last time.
            NameKey::Node(env) => {
                let mtime = self.names.env(&env, age)?.map_or((0, 0), |env| env.mtime);
                Ok(of_workflow(moving_dir(ino, 1, mtime), self.names.whose(env.workflow())?))
            }
        }
    }

    fn versions_attr(&self, slot: u32, env: &EnvName, age: Age) -> Result<Attr> {
        let ino = Ino::encode(Object::Versions { slot })?;
        let known = self.names.versions_if_read(env, age)?;
        // As for the nodes of a workflow.
        let attr = match known {
            Some(known) => moving_dir(ino, known.value.len(), known.mtime),
            None => Attr { nlink: 1, ..moving_dir(ino, 0, self.names.begun()) },
        };
        Ok(of_workflow(attr, self.names.whose(env.workflow())?))
    }

    fn dir_attr(&self, view: &VersionView, dir: &MergedDir, ino: Ino) -> Result<Attr> {
        Ok(lasting_dir(ino, self.subdirs(view, dir)?, view.created()))
    }

    fn special_attr(&self, view: &VersionView, special: Special) -> Result<Attr> {
        let ino = merge::special(view, special)?;
        let file = |size: u64| lasting_file(ino, size);
        match special {
            Special::Root => Ok(lasting_dir(ino, 2, view.created())),
            Special::Imports => Ok(lasting_dir(ino, 0, view.created())),
            Special::ImportsIndex => Ok(file(self.imports_bytes(ino)?.len() as u64)),
            Special::Config => Ok(file(CONFIG_SIZE as u64)),
            Special::Metadata => Ok(file(view.metadata_size(&*self.layers(view)?)?)),
            Special::Lock | Special::Project => Ok(file(view.document(special).ok_or_else(gone)?.size)),
            link => {
                let size = view.link_target(link).ok_or_else(gone)?.len() as u64;
                let attr = Attr { kind: FileKind::Symlink, mode: 0o777, ..file(size) };
                if !link.is_node_link() {
                    return Ok(attr);
                }
                // The node's links have a new inode per target, but the name leads elsewhere one day.
                let whose = self.names.whose(view.version.environment.workflow())?;
                Ok(Attr { lasting: false, ..of_workflow(attr, whose) })
            }
        }
    }

    /// The directory that directory `ino` is in; the root is in itself.
    fn parent(&self, ino: Ino) -> Result<Ino> {
        match ino.decode().ok_or_else(gone)? {
            Object::Root => Ok(Ino::ROOT),
            Object::Name { slot } => match self.name_slots.key(slot).ok_or_else(gone)? {
                NameKey::Workflow(_) => Ok(Ino::ROOT),
                NameKey::Node(env) => {
                    let slot = self.name_slots.ensure(&NameKey::Workflow(env.workflow().into()))?;
                    Ino::encode(Object::Name { slot })
                }
            },
            Object::Versions { slot } => Ino::encode(Object::Name { slot }),
            Object::Special { version, special: Special::Root } => {
                let (env, _) = self.version_slots.key(version).ok_or_else(gone)?;
                Ino::encode(Object::Versions { slot: self.name_slots.ensure(&NameKey::Node(env))? })
            }
            Object::Dir { version, index } => Ok(self.merged_dir(&*self.version(version)?, index)?.parent),
            Object::Special { version, special: Special::Imports } => {
                Ino::encode(Object::Special { version, special: Special::Root })
            }
            Object::Row { .. } | Object::Layer { .. } | Object::Special { .. } => Err(not_a_directory()),
        }
    }

    fn row(&self, layer: u32, row: u32) -> Result<Row> {
        let digest = self.layer_slots.key(layer).ok_or_else(gone)?;
        self.with_catalog(&digest, |catalog| catalog.row(row))?.filter(|row| !row.node.is_dir()).ok_or_else(gone)
    }

    fn layers(&self, view: &VersionView) -> Result<Arc<Layers>> {
        view.layers(
            |digests, summaries| {
                self.leases.show(view.slot);
                self.layer_docs(digests, summaries)
            },
            |digest| self.layer_slots.ensure(digest),
        )
    }

    fn version(&self, slot: u32) -> Result<Arc<VersionView>> {
        self.versions.get_or(slot, || {
            let (env, number) = self.version_slots.key(slot).ok_or_else(gone)?;
            // It was shown, so it must be there.
            Ok(Arc::new(VersionView::new(self.names.version(&env, number).map_err(damaged)?, slot)))
        })
    }

    fn version_of(&self, env: &EnvName, number: u64) -> Result<Arc<VersionView>> {
        let key = (env.clone(), number);
        if let Some(slot) = self.version_slots.slot(&key) {
            return self.version(slot);
        }
        let version = self.names.version(env, number)?;
        let slot = self.version_slots.ensure(&key)?;
        let view = Arc::new(VersionView::new(version, slot));
        self.versions.put(slot, view.clone());
        Ok(view)
    }
}

/// The links that a node's directory shows while `view` is current.
fn node_links(view: &VersionView) -> Vec<(String, Special)> {
    let links =
        [(".venv", Special::LinkVenv), (".python", Special::LinkPython), ("metadata.json", Special::LinkMetadata)];
    let mut links: Vec<_> = links.into_iter().map(|(name, special)| (name.to_string(), special)).collect();
    for special in [Special::LinkLock, Special::LinkProject] {
        links.extend(view.document(special).map(|document| (document.name.clone(), special)));
    }
    links
}

/// `name` where it may be a workflow or a node.
fn part(name: &[u8]) -> Option<&str> {
    std::str::from_utf8(name).ok().filter(|text| EnvName::is_part(text))
}

fn not_a_directory() -> Error {
    Error::new(Kind::Os(libc::ENOTDIR), "this is no directory")
}

fn not_a_link() -> Error {
    Error::new(Kind::Invalid, "this is no symbolic link")
}
