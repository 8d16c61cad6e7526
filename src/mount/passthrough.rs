//! Passthrough: the kernel reads large files straight from the store's own file system.
//!
//! Rules of the kernel (fs/fuse/iomode.c): while an inode has a cached handle open it cannot be opened with passthrough,
//! and while it has a passthrough handle it takes no other backing id. So the mode is chosen at open, by what is open
//! already, and one backing id serves an inode as long as any handle of it lives. Whatever fails, an ordinary handle is
//! given instead.

use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackingId, FileHandle, ReplyOpen};
use nix::sys::statfs::{self, FsType};

use crate::store::Store;
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

#[derive(Debug, Default)]
struct Handles {
    cached: u64,
    passed: u64,
    backing: Option<Arc<BackingId>>,
}

/// What is open of files that could be opened with passthrough.
#[derive(Debug, Default)]
pub(super) struct Passthrough {
    enabled: AtomicBool,
    open: Mutex<HashMap<Ino, Handles>>,
}

/// How to answer an open.
pub(super) enum Mode {
    Cached(FileHandle),
    Passed(FileHandle, Arc<BackingId>),
}

/// True when the files of `store` lie on a file system that passthrough is tried with.
pub fn is_local(store: &Store) -> bool {
    statfs::statfs(store.root()).is_ok_and(|stat| LOCAL.contains(&stat.filesystem_type()))
}

impl Passthrough {
    /// Called once the kernel has granted it.
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Chooses how `ino`, which is all of `file`, is opened, and counts the handle.
    pub(super) fn open(&self, ino: Ino, file: &File, size: u64, reply: &ReplyOpen) -> Mode {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let handles = open.entry(ino).or_default();
        if handles.cached == 0 && self.is_enabled() {
            // A blob of a wrong length is left to ordinary reads, which say so.
            let whole = handles.backing.is_some() || file.metadata().is_ok_and(|m| m.len() == size);
            if handles.backing.is_none() && whole {
                match reply.open_backing(file) {
                    Ok(backing) => handles.backing = Some(Arc::new(backing)),
                    Err(error) => {
                        // Not for this mount (no privilege, a stacked file system) and so not for any file of it.
                        self.enabled.store(false, Ordering::Relaxed);
                        tracing::info!(%error, "large files are served without passthrough");
                    }
                }
            }
            if let Some(backing) = &handles.backing {
                handles.passed += 1;
                return Mode::Passed(PASSED, backing.clone());
            }
        }
        handles.cached += 1;
        Mode::Cached(CACHED)
    }

    /// Counts a handle out.
    pub(super) fn release(&self, ino: Ino, handle: FileHandle) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(handles) = open.get_mut(&ino) else { return };
        match handle {
            CACHED => handles.cached = handles.cached.saturating_sub(1),
            PASSED => handles.passed = handles.passed.saturating_sub(1),
            _ => return,
        }
        if handles.passed == 0 {
            handles.backing = None;
        }
        if handles.passed == 0 && handles.cached == 0 {
            open.remove(&ino);
        }
    }
}
