//! Passthrough: the kernel reads large files straight from the store's own file system.
//!
//! Rules of the kernel (fs/fuse/iomode.c): while an inode has a cached handle open it cannot be opened with passthrough,
//! and while it has a passthrough handle it takes no other backing id. So the mode is chosen at open, by what is open
//! already, and one backing id serves an inode as long as any handle of it lives. Whatever fails, an ordinary handle is
//! given instead; but never beside a passthrough one, because the kernel answers a mixture with EIO.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle, ReplyOpen};
use nix::sys::statfs::{self, FsType};

use crate::cache::Held;
use crate::view::Ino;

/// File systems tried with passthrough, by their `f_type`: those on local disks that do not stack on others.
const LOCAL: [FsType; 4] = [
    FsType(0xEF53),      // ext2, ext3, ext4
    FsType(0x5846_5342), // xfs
    FsType(0x9123_683E), // btrfs
    FsType(0x0102_1994), // tmpfs
];

/// Handles of files that could be opened with passthrough say how they were opened.
const CACHED: FileHandle = FileHandle(1);
const PASSED: FileHandle = FileHandle(2);

/// What is open of one inode: handles of one sort only.
#[derive(Debug)]
struct Handles<B> {
    cached: u64,
    passed: u64,
    /// There as long as a passthrough handle is.
    backing: Option<B>,
}

impl<B> Default for Handles<B> {
    fn default() -> Self {
        Handles { cached: 0, passed: 0, backing: None }
    }
}

impl<B: Clone> Handles<B> {
    /// Counts a new handle: with passthrough where the backing is given, else ordinary. `make` gives a backing where
    /// one is needed and can be had.
    fn open(&mut self, make: impl FnOnce() -> Option<B>) -> Option<B> {
        if self.cached == 0 {
            if self.backing.is_none() {
                self.backing = make();
            }
            if let Some(backing) = &self.backing {
                self.passed += 1;
                return Some(backing.clone());
            }
        }
        self.cached += 1;
        None
    }

    /// Counts a handle out.
    fn release(&mut self, handle: FileHandle) {
        match handle {
            CACHED => self.cached = self.cached.saturating_sub(1),
            PASSED => self.passed = self.passed.saturating_sub(1),
            _ => {}
        }
        if self.passed == 0 {
            self.backing = None;
        }
    }

    fn is_empty(&self) -> bool {
        self.passed == 0 && self.cached == 0
    }
}

/// True for a refusal that every file of the mount would meet: no privilege, a kernel without it, a store that lies on
/// a stacked file system. (fs/fuse/backing.c)
fn is_lasting(error: &io::Error) -> bool {
    let lasting = [libc::EPERM, libc::EACCES, libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY, libc::ELOOP];
    error.raw_os_error().is_some_and(|errno| lasting.contains(&errno))
}

/// What is open of an inode, and what keeps its bytes in the cache meanwhile.
type Open = (Handles<Arc<BackingId>>, Option<Held>);

/// What is open of files that could be opened with passthrough.
#[derive(Debug, Default)]
pub(super) struct Passthrough {
    enabled: AtomicBool,
    /// Why it is not enabled, or not any more.
    why_not: Mutex<Option<NoPassthrough>>,
    open: Mutex<HashMap<Ino, Open>>,
}

/// How to answer an open.
pub(super) enum Mode {
    Cached(FileHandle),
    Passed(FileHandle, Arc<BackingId>),
}

/// Why the kernel does not read large files straight from the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPassthrough {
    /// The user wants none.
    SwitchedOff,
    /// Only root may ask for it.
    NotRoot,
    /// The store is on a network or stacked file system.
    NotLocal,
    /// The kernel does not offer it.
    Kernel,
    /// The kernel refused it for every file, with this error.
    Refused(String),
}

impl fmt::Display for NoPassthrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoPassthrough::SwitchedOff => f.write_str("switched off (--no-passthrough)"),
            NoPassthrough::NotRoot => f.write_str("only a mount made by root has it"),
            NoPassthrough::NotLocal => {
                f.write_str("the store is not on a local file system that has it (ext4, xfs, btrfs, tmpfs)")
            }
            NoPassthrough::Kernel => f.write_str("this kernel does not offer it (Linux 6.9 and later do)"),
            NoPassthrough::Refused(error) => write!(f, "the kernel refused it: {error}"),
        }
    }
}

/// What keeps a mount of a store, whose large files are opened in `dir`, by this process from passthrough, but for the
/// kernel, which tells only a mount.
pub fn obstacle(dir: &Path, wanted: bool) -> Option<NoPassthrough> {
    if !wanted {
        Some(NoPassthrough::SwitchedOff)
    } else if !super::attach::is_root() {
        Some(NoPassthrough::NotRoot)
    } else if !is_local(dir) {
        Some(NoPassthrough::NotLocal)
    } else {
        None
    }
}

/// True when `dir` is on a file system of a local disk, with which passthrough is tried.
pub fn is_local(dir: &Path) -> bool {
    statfs::statfs(dir).is_ok_and(|stat| LOCAL.contains(&stat.filesystem_type()))
}

impl Passthrough {
    /// Called once the kernel has granted it.
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Called when it is not to be had, or not any more.
    pub(super) fn disable(&self, why: NoPassthrough) {
        self.enabled.store(false, Ordering::Relaxed);
        *self.why_not.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    /// None when it is enabled.
    pub(super) fn why_not(&self) -> Option<NoPassthrough> {
        let why = self.why_not.lock().unwrap_or_else(PoisonError::into_inner).clone();
        why.or_else(|| (!self.is_enabled()).then_some(NoPassthrough::Kernel))
    }

    /// Chooses how `ino`, which is all of `file`, is opened, and counts the handle. Without a file it is opened in the
    /// ordinary way; `held` is kept as long as any handle is.
    pub(super) fn open(&self, ino: Ino, file: Option<(&File, u64)>, held: Option<Held>, reply: &ReplyOpen) -> Mode {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (handles, kept) = open.entry(ino).or_default();
        let backing = handles.open(|| file.and_then(|(file, size)| self.backing(file, size, reply)));
        if kept.is_none() {
            *kept = held;
        }
        backing.map_or(Mode::Cached(CACHED), |backing| Mode::Passed(PASSED, backing))
    }

    fn backing(&self, file: &File, size: u64, reply: &ReplyOpen) -> Option<Arc<BackingId>> {
        // A blob of a wrong length is left to ordinary reads, which say so.
        if !self.is_enabled() || !file.metadata().is_ok_and(|m| m.len() == size) {
            return None;
        }
        match reply.open_backing(file) {
            Ok(backing) => Some(Arc::new(backing)),
            Err(error) if is_lasting(&error) => {
                self.disable(NoPassthrough::Refused(error.to_string()));
                tracing::info!(%error, "large files are served without passthrough");
                None
            }
            Err(error) => {
                tracing::debug!(%error, "a file is opened without passthrough");
                None
            }
        }
    }

    /// Counts a handle out.
    pub(super) fn release(&self, ino: Ino, handle: FileHandle) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((handles, _)) = open.get_mut(&ino) else { return };
        handles.release(handle);
        if handles.is_empty() {
            open.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What the kernel would answer with EIO: both sorts open at once, or two backings.
        #[test]
        fn an_inode_is_never_open_in_two_ways(steps in prop::collection::vec((any::<bool>(), any::<bool>()), 0..60)) {
            let mut handles = Handles::default();
            let mut open: Vec<Option<u32>> = Vec::new();
            let mut made = 0;
            for (opens, can_be_had) in steps {
                if opens {
                    let backing = handles.open(|| can_be_had.then(|| { made += 1; made }));
                    prop_assert!(open.iter().all(|other| *other == backing), "{open:?} and {backing:?}");
                    open.push(backing);
                } else if let Some(backing) = open.pop() {
                    handles.release(if backing.is_some() { PASSED } else { CACHED });
                }
                prop_assert_eq!(handles.is_empty(), open.is_empty());
                prop_assert_eq!(handles.backing.is_some(), open.first().is_some_and(|b| b.is_some()));
            }
        }
    }

    #[test]
    fn only_a_refusal_that_every_file_would_meet_ends_passthrough() {
        let lasting = |errno| is_lasting(&io::Error::from_raw_os_error(errno));
        assert!([libc::EPERM, libc::EOPNOTSUPP, libc::ELOOP, libc::ENOTTY].into_iter().all(lasting));
        assert!(![libc::ENOMEM, libc::ENOSPC, libc::EIO, libc::EMFILE, libc::ESTALE].into_iter().any(lasting));
    }
}
