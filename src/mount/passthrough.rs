//! Passthrough: the kernel reads large files straight from the store's own file system.
//!
//! Rules of the kernel (fs/fuse/iomode.c): while an inode has a cached handle open it cannot be opened with passthrough,
//! and while it has a passthrough handle it takes no other backing id. So the mode is chosen at open, by what is open
//! already, and one backing id serves an inode as long as any handle of it lives. Whatever fails, an ordinary handle is
//! given instead; but never beside a passthrough one, because the kernel answers a mixture with EIO.
//!
//! Which handles there are, and which backing id they have, is kept beyond the process ([`super::kept`]): a worker that
//! takes over goes on with them. Where it may have died between getting an id and writing it down, the id is closed by
//! the next: ids are given out in order (idr_alloc_cyclic), so it is one between the last that was written down and
//! the first that the next worker gets.
//!
//! Only root may tell the kernel which files it is to read by itself. A worker that is not root asks its supervisor, which
//! may have no time: then a file is opened in the ordinary way, and what is to be closed is closed later, before anything
//! else is asked for.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use fuser::{BackingId, FileHandle};
use nix::sys::statfs::{self, FsType};

use super::kept::{Handle, Kept, Number, RESENT, Record, Way};
use super::supervisor::{Helper, is_for_now};
use crate::cache::Held;
use crate::sys;
use crate::view::Ino;

/// File systems tried with passthrough, by their `f_type`: those on local disks that do not stack on others.
const LOCAL: [FsType; 4] = [
    FsType(0xEF53),      // ext2, ext3, ext4
    FsType(0x5846_5342), // xfs
    FsType(0x9123_683E), // btrfs
    FsType(0x0102_1994), // tmpfs
];

/// Ids that a worker may have left at most.
const ORPHANS_MAX: u32 = 64;

/// The handle of a file that could be passed through, on a connection without passthrough: nothing is kept of it.
const COUNTED: FileHandle = FileHandle(1);

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

    /// Counts a handle in that was there before this process.
    fn adopt(&mut self, backing: Option<B>) {
        match backing {
            Some(backing) => {
                self.passed += 1;
                self.backing = Some(backing);
            }
            None => self.cached += 1,
        }
    }

    /// Counts a handle out; gives the backing that none has any more.
    fn release(&mut self, passed: bool) -> Option<B> {
        match passed {
            true => self.passed = self.passed.saturating_sub(1),
            false => self.cached = self.cached.saturating_sub(1),
        }
        if self.passed == 0 { self.backing.take() } else { None }
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

/// What is open of files that could be opened with passthrough.
#[derive(Debug, Default)]
struct OpenFiles {
    /// What is open of an inode, and what keeps its bytes in the cache meanwhile.
    inodes: HashMap<Ino, (Handles<u32>, Option<Held>)>,
    /// Places for handles that are free again.
    free: Vec<usize>,
    /// The ids that a dead worker may have left are closed.
    tidied: bool,
    /// Ids to be closed, with the places that are free when they are.
    unclosed: Vec<(Option<usize>, u32)>,
}

/// Who tells the kernel which files it is to read by itself.
#[derive(Debug)]
pub(super) enum Backings {
    /// This process, on its connection.
    Own(OwnedFd),
    /// Its supervisor, because this process may not.
    Helped(Arc<Helper>),
}

impl Backings {
    fn open(&self, file: &File) -> io::Result<u32> {
        match self {
            Backings::Own(device) => BackingId::create_raw(device, file),
            Backings::Helped(helper) => helper.open_backing(file),
        }
    }

    /// Lets go of a file; false when that must be tried again.
    fn close(&self, backing: u32) -> bool {
        let closed = match self {
            Backings::Own(device) => sys::close_backing(device.as_fd(), backing),
            Backings::Helped(helper) => helper.close_backing(backing),
        };
        match closed {
            Err(error) if is_for_now(&error) => false,
            Err(error) => {
                tracing::warn!(%error, "a file that was passed through stays open in the kernel");
                true
            }
            Ok(()) => true,
        }
    }

    /// Files that were opened for nobody.
    fn strays(&self) -> Vec<u32> {
        match self {
            Backings::Own(_) => Vec::new(),
            Backings::Helped(helper) => helper.take_strays(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Passthrough {
    kept: Arc<Kept>,
    /// There once there is a connection that has passthrough.
    backings: OnceLock<Backings>,
    enabled: AtomicBool,
    /// Why it is not enabled, or not any more.
    why_not: Mutex<Option<NoPassthrough>>,
    open: Mutex<OpenFiles>,
}

/// How to answer an open.
#[derive(Debug)]
pub(super) enum Mode {
    Cached(FileHandle),
    Passed(FileHandle, u32),
    /// There are too many open.
    None,
}

/// Why the kernel does not read large files straight from the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPassthrough {
    /// The user wants none.
    SwitchedOff,
    /// Only root may ask for it.
    NotRoot,
    /// The store's files, or those of the cache, are on a network or stacked file system.
    NotLocal,
    /// The kernel does not offer it.
    Kernel,
    /// The mount was made without it, and goes on so.
    MadeWithout,
    /// The kernel refused it for every file, with this error.
    Refused(String),
}

impl fmt::Display for NoPassthrough {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoPassthrough::SwitchedOff => f.write_str("switched off (--no-passthrough)"),
            NoPassthrough::NotRoot => f.write_str("only a mount made by root has it"),
            NoPassthrough::NotLocal => {
                f.write_str("the files are not on a local file system that has it (ext4, xfs, btrfs, tmpfs)")
            }
            NoPassthrough::Kernel => f.write_str("this kernel does not offer it (Linux 6.9 and later do)"),
            NoPassthrough::MadeWithout => {
                f.write_str("the mount was made without it: unmount and mount again to have it")
            }
            NoPassthrough::Refused(error) => write!(f, "the kernel refused it: {error}"),
        }
    }
}

/// What keeps a mount of a store, whose large files are opened in `dir`, by this process from passthrough, but for the
/// kernel, which tells only a mount.
pub fn obstacle(dir: &Path, wanted: bool) -> Option<NoPassthrough> {
    obstacle_for(super::attach::is_root(), dir, wanted)
}

/// The same of a process that has the privilege for it, or whose supervisor has.
pub(super) fn obstacle_for(privilege: bool, dir: &Path, wanted: bool) -> Option<NoPassthrough> {
    if !wanted {
        Some(NoPassthrough::SwitchedOff)
    } else if !privilege {
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
    pub(super) fn new(kept: Arc<Kept>) -> Self {
        Passthrough {
            kept,
            backings: OnceLock::new(),
            enabled: AtomicBool::new(false),
            why_not: Mutex::default(),
            open: Mutex::default(),
        }
    }

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

    fn files(&self) -> MutexGuard<'_, OpenFiles> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to serve a connection that has passthrough: goes on with the handles that are kept. Nobody else may change
    /// them from now on.
    pub(super) fn serve(&self, backings: Backings) {
        let backings = self.backings.get_or_init(|| backings);
        let (handles, mut files) = (self.kept.handles(), self.files());
        for index in 0..handles.used() {
            match handles.record(index) {
                Record::Open { ino, way, .. } => {
                    let (open, _) = files.inodes.entry(Ino::from_raw(ino)).or_default();
                    open.adopt(match way {
                        Way::Passed(backing) => Some(backing),
                        Way::Cached => None,
                    });
                }
                Record::Closing { backing, .. } => files.unclosed.push((Some(index), backing)),
                Record::Free => files.free.push(index),
            }
        }
        // A supervisor answers only who serves already.
        if let Backings::Own(_) = backings {
            self.close_unclosed(backings, &mut files);
        }
    }

    /// Closes the ids that no handle has any more; false when some are left for the next time.
    fn close_unclosed(&self, backings: &Backings, files: &mut OpenFiles) -> bool {
        files.unclosed.extend(backings.strays().into_iter().map(|stray| (None, stray)));
        while let Some((place, backing)) = files.unclosed.pop() {
            if !backings.close(backing) {
                files.unclosed.push((place, backing));
                return false;
            }
            if let Some(place) = place {
                self.kept.handles().free(place);
                files.free.push(place);
            }
        }
        true
    }

    /// Chooses how `ino`, which is all of `file`, is opened, and counts the handle. Without a file it is opened in the
    /// ordinary way; `held` is kept as long as any handle is. `unique` is the kernel's number of the request.
    pub(super) fn open(&self, ino: Ino, file: Option<(&File, u64)>, held: Option<Held>, unique: u64) -> Mode {
        let handles = self.kept.handles();
        let mut files = self.files();
        let number = unique & !RESENT;
        let Some(backings) = self.backings.get() else {
            let (open, kept) = files.inodes.entry(ino).or_default();
            open.open(|| None);
            *kept = kept.take().or(held);
            return Mode::Cached(COUNTED);
        };
        let mode = |handle: Handle, way| match way {
            Way::Passed(backing) => Mode::Passed(FileHandle(handle.raw()), backing),
            Way::Cached => Mode::Cached(FileHandle(handle.raw())),
        };
        // The worker that had counted it died before the kernel had its answer.
        if unique & RESENT != 0
            && let Some((handle, way)) = handles.of_open(number)
        {
            return mode(handle, way);
        }
        let (mut open, kept) = files.inodes.remove(&ino).unwrap_or_default();
        let backing = open.open(|| file.and_then(|(file, size)| self.backing(backings, file, size, &mut files)));
        files.inodes.insert(ino, (open, kept.or(held)));
        let way = backing.map_or(Way::Cached, Way::Passed);
        let place = files.free.pop();
        match handles.open(place, number, ino.get(), way) {
            Some(handle) => mode(handle, way),
            None => {
                let unused = self.count_out(&mut files, ino, way);
                files.unclosed.extend(unused.map(|backing| (None, backing)));
                self.close_unclosed(backings, &mut files);
                Mode::None
            }
        }
    }

    /// How many handles are open of files that could be passed through.
    pub(super) fn handles(&self) -> u64 {
        self.files().inodes.values().map(|(open, _)| open.cached + open.passed).sum()
    }

    fn backing(&self, backings: &Backings, file: &File, size: u64, files: &mut OpenFiles) -> Option<u32> {
        // A blob of a wrong length is left to ordinary reads, which say so.
        if !self.is_enabled() || !file.metadata().is_ok_and(|m| m.len() == size) {
            return None;
        }
        // First what is to be closed: of ids that are written down nowhere there must be none below the next one.
        if !self.close_unclosed(backings, files) {
            return None;
        }
        match backings.open(file) {
            Ok(backing) => {
                let last = u32::try_from(self.kept.get(Number::LastBacking)).unwrap_or(u32::MAX);
                // One worker gets one at a time, so more than a few are something else.
                if !std::mem::replace(&mut files.tidied, true) && backing.saturating_sub(last) < ORPHANS_MAX {
                    files.unclosed.extend((last.saturating_add(1)..backing).map(|orphan| (None, orphan)));
                    self.close_unclosed(backings, files);
                }
                self.kept.set(Number::LastBacking, backing.into());
                Some(backing)
            }
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

    /// Counts a handle out of `ino`; gives the backing that none has any more.
    fn count_out(&self, files: &mut OpenFiles, ino: Ino, way: Way) -> Option<u32> {
        let (open, _) = files.inodes.get_mut(&ino)?;
        let unused = open.release(way != Way::Cached);
        if open.is_empty() {
            files.inodes.remove(&ino);
        }
        unused
    }

    /// Counts a handle out. One that is not there was counted out by a worker that died before the kernel had its answer.
    pub(super) fn release(&self, ino: Ino, handle: FileHandle) {
        let mut files = self.files();
        let Some(backings) = self.backings.get() else {
            self.count_out(&mut files, ino, Way::Cached);
            return;
        };
        let handles = self.kept.handles();
        let Some((index, way)) = handles.get(Handle::from_raw(handle.0)) else { return };
        match self.count_out(&mut files, ino, way) {
            Some(backing) => {
                handles.closing(index);
                files.unclosed.push((Some(index), backing));
                self.close_unclosed(backings, &mut files);
            }
            None => {
                handles.free(index);
                files.free.push(index);
            }
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
                    let unused = handles.release(backing.is_some());
                    prop_assert_eq!(unused.is_some(), backing.is_some() && open.is_empty());
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
