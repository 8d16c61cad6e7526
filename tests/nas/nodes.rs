//! The inodes that the kernel knows, and the files it has open.
//!
//! Each inode is held by a descriptor that can do nothing but name it (`O_PATH`), so renaming and unlinking do not lose
//! it, and its number is not given to another file before the kernel has forgotten it.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use nix::sys::stat::FileStat;

use crate::reads::FileReads;

/// How the kernel calls the root, whatever its inode.
pub(crate) const ROOT: u64 = 1;

/// What close-to-open consistency compares: time and size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    mtime: (i64, i64),
    size: i64,
}

impl Version {
    pub(crate) fn of(stat: &FileStat) -> Self {
        Version { mtime: (stat.st_mtime, stat.st_mtime_nsec), size: stat.st_size }
    }
}

/// An inode.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) fd: OwnedFd,
    /// Relative to the backing directory, as it was last looked up.
    path: Mutex<Arc<str>>,
    /// What the kernel may have cached.
    cached: Mutex<Option<Version>>,
}

impl Node {
    pub(crate) fn new(fd: OwnedFd, path: &str) -> Self {
        Node { fd, path: Mutex::new(path.into()), cached: Mutex::new(None) }
    }

    /// A path that leads to the inode itself, be it unlinked or a symlink.
    pub(crate) fn magic_link(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    pub(crate) fn path(&self) -> Arc<str> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn moved_to(&self, path: String) {
        let mut known = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        if **known != *path {
            *known = path.into();
        }
    }

    /// Sets what the kernel caches from now on; returns what it had.
    pub(crate) fn caches(&self, version: Option<Version>) -> Option<Version> {
        std::mem::replace(&mut *self.cached.lock().unwrap_or_else(PoisonError::into_inner), version)
    }
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub(crate) struct Spot {
    pub(crate) dir: Arc<Node>,
    pub(crate) name: Arc<OsStr>,
}

impl Spot {
    pub(crate) fn path(&self) -> String {
        let (dir, name) = (self.dir.path(), self.name.to_string_lossy());
        if dir.is_empty() { name.into_owned() } else { format!("{dir}/{name}") }
    }
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
}

/// Inodes by number.
#[derive(Debug)]
pub(crate) struct Nodes {
    table: Mutex<HashMap<u64, Known>>,
}

impl Nodes {
    pub(crate) fn new(root: OwnedFd) -> Self {
        let root = Known { node: Arc::new(Node::new(root, "")), lookups: 1 };
        Nodes { table: Mutex::new(HashMap::from([(ROOT, root)])) }
    }

    pub(crate) fn get(&self, ino: u64) -> Option<Arc<Node>> {
        self.table().get(&ino).map(|known| known.node.clone())
    }

    /// Counts one more lookup of an inode, which `fd` holds, and which is at `path` now.
    pub(crate) fn remember(&self, ino: u64, fd: OwnedFd, path: String) -> Arc<Node> {
        let mut table = self.table();
        let known = table.entry(ino);
        let known = known.or_insert_with(|| Known { node: Arc::new(Node::new(fd, &path)), lookups: 0 });
        known.lookups += 1;
        known.node.moved_to(path);
        known.node.clone()
    }

    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
        let mut table = self.table();
        let Some(known) = table.get_mut(&ino).filter(|_| ino != ROOT) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            // Closing a descriptor takes a while.
            let gone = table.remove(&ino);
            drop(table);
            drop(gone);
        }
    }

    /// Notes where a renamed inode is. What is below it is found out at the next lookup.
    pub(crate) fn renamed(&self, ino: u64, path: String) {
        if let Some(node) = self.get(ino) {
            node.moved_to(path);
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open file.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) fd: OwnedFd,
    pub(crate) node: Arc<Node>,
    /// As it was opened.
    pub(crate) path: Arc<str>,
    pub(crate) reads: Arc<FileReads>,
    /// Reads go through the kernel's page cache.
    pub(crate) cached: bool,
}

/// An entry of a listing.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) name: OsString,
    pub(crate) ino: u64,
    pub(crate) kind: fuser::FileType,
}

/// An open directory. The listing is taken when reading starts from the beginning.
#[derive(Debug)]
pub(crate) struct OpenDir {
    pub(crate) dir: Arc<Node>,
    pub(crate) listing: Mutex<Arc<Vec<Listed>>>,
}

/// What is open, by handle.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    next: AtomicU64,
    table: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Handles { next: AtomicU64::new(1), table: RwLock::default() }
    }
}

impl<T> Handles<T> {
    pub(crate) fn insert(&self, open: T) -> u64 {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.table.write().unwrap_or_else(PoisonError::into_inner).insert(handle, Arc::new(open));
        handle
    }

    pub(crate) fn get(&self, handle: u64) -> Option<Arc<T>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(&handle).cloned()
    }

    pub(crate) fn remove(&self, handle: u64) {
        let closed = self.table.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
        drop(closed);
    }

    pub(crate) fn len(&self) -> usize {
        self.table.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}
