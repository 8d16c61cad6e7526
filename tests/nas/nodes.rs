//! The inodes that the kernel knows, and the files it has open.
//!
//! An inode is known by the names under which it was found, and opened by one of them when it is needed, with a
//! descriptor that can do nothing but name it (`O_PATH`). A limited number of those is kept: a kernel remembers more
//! inodes than a process may have descriptors. While it is kept, the inode's number is not given to another file. What
//! loses its last name through the mount keeps its descriptor until the kernel forgets it.
//!
//! What loses its name behind the mount is ESTALE, as on NFS, once its descriptor is gone. A number that is given anew
//! then looks like a file that was changed: there are no generations.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use lru::LruCache;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat};

use crate::reads::FileReads;

/// How the kernel calls the root, whatever its inode.
pub(crate) const ROOT: u64 = 1;

/// Opens an inode, and not what it leads to.
pub(crate) const NAME_ONLY: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Names that are remembered of one inode, at most: any of them leads to it.
const NAMES: usize = 8;

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

/// A name in a directory.
#[derive(Debug, Clone)]
pub(crate) struct Spot {
    pub(crate) dir: Arc<Node>,
    pub(crate) name: Arc<OsStr>,
}

impl PartialEq for Spot {
    fn eq(&self, other: &Self) -> bool {
        self.dir.ino == other.dir.ino && self.name == other.name
    }
}

impl Spot {
    /// Relative to the backing directory.
    pub(crate) fn path(&self) -> String {
        let mut path = self.dir.path();
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(&self.name.to_string_lossy());
        path
    }
}

/// A directory has one name; whatever else it had was taken behind the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    Other,
}

impl Kind {
    fn of(stat: &FileStat) -> Self {
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR { Kind::Directory } else { Kind::Other }
    }
}

/// An inode.
#[derive(Debug)]
pub(crate) struct Node {
    /// As the kernel calls it.
    pub(crate) ino: u64,
    /// Where it is, the latest first; empty for the root, and for what is unlinked.
    names: Mutex<Vec<Spot>>,
    /// Holds what has no name.
    pinned: OnceLock<Arc<OwnedFd>>,
    /// Of which data the kernel may have pages.
    cached: Mutex<Option<Version>>,
    /// Which attributes the kernel got last.
    told: Mutex<Option<Version>>,
}

impl Node {
    fn new(ino: u64) -> Self {
        Node { ino, names: Mutex::default(), pinned: OnceLock::new(), cached: Mutex::default(), told: Mutex::default() }
    }

    /// Relative to the backing directory, under the name by which it was found last.
    pub(crate) fn path(&self) -> String {
        let name = self.names().first().cloned();
        name.map(|spot| spot.path()).unwrap_or_default()
    }

    /// Notes which attributes the kernel is about to get; returns which it had.
    pub(crate) fn tells(&self, version: Version) -> Option<Version> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).replace(version)
    }

    /// Sets of which data the kernel has pages from now on; returns of which it had.
    pub(crate) fn caches(&self, version: Option<Version>) -> Option<Version> {
        std::mem::replace(&mut *self.cached.lock().unwrap_or_else(PoisonError::into_inner), version)
    }

    fn found_at(&self, spot: &Spot, kind: Kind) {
        let mut names = self.names();
        if names.first() != Some(spot) {
            names.retain(|known| known != spot && kind == Kind::Other);
            names.insert(0, spot.clone());
            names.truncate(NAMES);
        }
    }

    /// Takes a name away; without any it is held by `fd`.
    fn lost(&self, spot: &Spot, fd: Arc<OwnedFd>) {
        let mut names = self.names();
        names.retain(|known| known != spot);
        if names.is_empty() {
            let _ = self.pinned.set(fd);
        }
    }

    fn names(&self) -> MutexGuard<'_, Vec<Spot>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A path that leads to the inode itself, be it unlinked or a symlink.
pub(crate) fn magic_link(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Debug)]
struct Table {
    known: HashMap<u64, Known>,
    descriptors: LruCache<u64, Arc<OwnedFd>>,
}

/// Inodes by number.
#[derive(Debug)]
pub(crate) struct Nodes {
    table: Mutex<Table>,
    dev: u64,
}

impl Nodes {
    /// Keeps up to `descriptors` open.
    pub(crate) fn new(root: OwnedFd, descriptors: NonZeroUsize) -> Result<Self, Errno> {
        let dev = fstat(&root)?.st_dev;
        let node = Node::new(ROOT);
        let _ = node.pinned.set(Arc::new(root));
        let known = HashMap::from([(ROOT, Known { node: Arc::new(node), lookups: 1 })]);
        Ok(Nodes { table: Mutex::new(Table { known, descriptors: LruCache::new(descriptors) }), dev })
    }

    pub(crate) fn get(&self, ino: u64) -> Option<Arc<Node>> {
        self.table().known.get(&ino).map(|known| known.node.clone())
    }

    /// A descriptor of an inode.
    ///
    /// # Errors
    /// ESTALE when it is not where it was.
    pub(crate) fn descriptor(&self, node: &Node) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = node.pinned.get() {
            return Ok(fd.clone());
        }
        if let Some(fd) = self.table().descriptors.get(&node.ino) {
            return Ok(fd.clone());
        }
        let names = node.names().clone();
        for spot in names {
            if let Ok((fd, stat)) = self.open(&spot)
                && stat.st_ino == node.ino
            {
                let fd = Arc::new(fd);
                let closed = self.table().descriptors.push(node.ino, fd.clone());
                drop(closed);
                return Ok(fd);
            }
        }
        // Unlinked in between.
        node.pinned.get().cloned().ok_or(Errno::ESTALE)
    }

    fn open(&self, spot: &Spot) -> Result<(OwnedFd, FileStat), Errno> {
        let fd = openat(&*self.descriptor(&spot.dir)?, &*spot.name, NAME_ONLY, Mode::empty())?;
        let stat = fstat(&fd)?;
        // Inode numbers of another file system may be those of others here.
        if stat.st_dev == self.dev { Ok((fd, stat)) } else { Err(Errno::EXDEV) }
    }

    /// Finds a name, and counts a lookup of what it names.
    pub(crate) fn look_up(&self, spot: &Spot) -> Result<(Arc<Node>, FileStat), Errno> {
        let (fd, stat) = self.open(spot)?;
        let mut table = self.table();
        let new = || Known { node: Arc::new(Node::new(stat.st_ino)), lookups: 0 };
        let known = table.known.entry(stat.st_ino).or_insert_with(new);
        known.lookups += 1;
        known.node.found_at(spot, Kind::of(&stat));
        known.node.tells(Version::of(&stat));
        let node = known.node.clone();
        let closed = table.descriptors.push(stat.st_ino, Arc::new(fd));
        drop(table);
        drop(closed);
        Ok((node, stat))
    }

    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&ino).filter(|_| ino != ROOT) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            let gone = (table.known.remove(&ino), table.descriptors.pop(&ino));
            drop(table);
            // Closing a descriptor takes a while.
            drop(gone);
        }
    }

    /// What has a name that is about to be taken away or over.
    pub(crate) fn victim(&self, spot: &Spot) -> Option<Victim> {
        let (fd, stat) = self.open(spot).ok()?;
        let node = self.get(stat.st_ino)?;
        Some(Victim { node, kind: Kind::of(&stat), spot: spot.clone(), fd: Arc::new(fd) })
    }

    /// Notes that what `from` named is now at `to`.
    pub(crate) fn renamed(&self, moved: Option<Victim>, to: &Spot) {
        if let Some(moved) = moved {
            moved.node.found_at(to, moved.kind);
            moved.lose_name();
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An inode that is about to lose a name.
#[derive(Debug)]
pub(crate) struct Victim {
    node: Arc<Node>,
    kind: Kind,
    spot: Spot,
    fd: Arc<OwnedFd>,
}

impl Victim {
    /// Notes that it has lost it.
    pub(crate) fn lose_name(self) {
        self.node.lost(&self.spot, self.fd);
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
