//! The directory that plays the export: each call done on it, without waiting and without faults.

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirEntryExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat2};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mkdirat, mknodat, utimensat,
};
use nix::sys::statvfs::{Statvfs, fstatvfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};

use crate::nodes::{Handles, Listed, Node, Nodes, OpenDir, OpenFile, ROOT, Spot, Version, Victim, magic_link};
use crate::reads::Reads;

pub(crate) type Result<T> = std::result::Result<T, Errno>;

/// Who asks, and owns what it makes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What SETATTR changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Changes {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) size: Option<u64>,
    pub(crate) atime: Option<TimeOrNow>,
    pub(crate) mtime: Option<TimeOrNow>,
}

/// How the kernel may read a file that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caching {
    /// The pages it has are still right.
    Keep,
    /// They may not be.
    Anew,
    /// No pages: what is read is not what is there.
    Never,
}

/// A file that was opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opened {
    pub(crate) handle: u64,
    pub(crate) caching: Caching,
    /// The attributes that the kernel remembers are not right any more.
    pub(crate) outdated: bool,
}

/// The backing directory, and what the kernel knows of it.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) nodes: Nodes,
    pub(crate) files: Handles<OpenFile>,
    pub(crate) dirs: Handles<OpenDir>,
}

impl Backing {
    /// Keeps up to `descriptors` open besides those of open files.
    pub(crate) fn open(dir: &Path, descriptors: NonZeroUsize) -> std::io::Result<Self> {
        let root = openat(AT_FDCWD, dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let nodes = Nodes::new(root, descriptors)?;
        Ok(Backing { nodes, files: Handles::default(), dirs: Handles::default() })
    }

    /// Finds a name and counts a lookup of what it names.
    pub(crate) fn lookup(&self, spot: &Spot) -> Result<FileAttr> {
        self.nodes.look_up(spot).map(|(_, stat)| attr(&stat))
    }

    fn descriptor(&self, node: &Node) -> Result<Arc<OwnedFd>> {
        self.nodes.descriptor(node)
    }

    pub(crate) fn getattr(&self, node: &Node) -> Result<FileAttr> {
        let stat = fstat(&*self.descriptor(node)?)?;
        node.tells(Version::of(&stat));
        Ok(attr(&stat))
    }

    pub(crate) fn setattr(&self, node: &Node, open: Option<&OpenFile>, changes: &Changes) -> Result<FileAttr> {
        let fd = self.descriptor(node)?;
        let path = magic_link(&fd);
        if let Some(size) = changes.size {
            let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
            match open {
                Some(open) => nix::unistd::ftruncate(&open.fd, size)?,
                None => nix::unistd::truncate(path.as_str(), size)?,
            }
        }
        if let Some(mode) = changes.mode {
            let mode = Mode::from_bits_truncate(mode);
            fchmodat(AT_FDCWD, path.as_str(), mode, FchmodatFlags::FollowSymlink)?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            let (uid, gid) = (changes.uid.map(Uid::from_raw), changes.gid.map(Gid::from_raw));
            fchownat(AT_FDCWD, path.as_str(), uid, gid, AtFlags::empty())?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            let (atime, mtime) = (timespec(changes.atime), timespec(changes.mtime));
            // A magic link to a symlink ends at the symlink.
            utimensat(AT_FDCWD, path.as_str(), &atime, &mtime, UtimensatFlags::FollowSymlink)?;
        }
        self.getattr(node)
    }

    pub(crate) fn readlink(&self, node: &Node) -> Result<std::ffi::OsString> {
        readlinkat(&*self.descriptor(node)?, "")
    }

    pub(crate) fn statfs(&self) -> Result<Statvfs> {
        fstatvfs(&*self.descriptor(&*self.nodes.get(ROOT).ok_or(Errno::ESTALE)?)?)
    }

    pub(crate) fn mkdir(&self, spot: &Spot, mode: u32, caller: Caller) -> Result<FileAttr> {
        mkdirat(&*self.descriptor(&spot.dir)?, &*spot.name, Mode::from_bits_truncate(mode))?;
        self.made(spot, caller)
    }

    pub(crate) fn mknod(&self, spot: &Spot, mode: u32, rdev: u32, caller: Caller) -> Result<FileAttr> {
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        mknodat(&*self.descriptor(&spot.dir)?, &*spot.name, kind, Mode::from_bits_truncate(mode), u64::from(rdev))?;
        self.made(spot, caller)
    }

    pub(crate) fn symlink(&self, target: &Path, spot: &Spot, caller: Caller) -> Result<FileAttr> {
        symlinkat(target, &*self.descriptor(&spot.dir)?, &*spot.name)?;
        self.made(spot, caller)
    }

    pub(crate) fn link(&self, node: &Node, spot: &Spot) -> Result<FileAttr> {
        let old = self.descriptor(node)?;
        linkat(
            AT_FDCWD,
            magic_link(&old).as_str(),
            &*self.descriptor(&spot.dir)?,
            &*spot.name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        self.lookup(spot)
    }

    fn made(&self, spot: &Spot, caller: Caller) -> Result<FileAttr> {
        self.give(spot, caller)?;
        self.lookup(spot)
    }

    /// A file belongs to whoever made it, and not to the simulated NAS.
    fn give(&self, spot: &Spot, caller: Caller) -> Result<()> {
        if (caller.uid, caller.gid) == (0, 0) {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(caller.uid), Gid::from_raw(caller.gid));
        fchownat(&*self.descriptor(&spot.dir)?, &*spot.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    pub(crate) fn unlink(&self, spot: &Spot) -> Result<()> {
        self.remove(spot, UnlinkatFlags::NoRemoveDir)
    }

    pub(crate) fn rmdir(&self, spot: &Spot) -> Result<()> {
        self.remove(spot, UnlinkatFlags::RemoveDir)
    }

    fn remove(&self, spot: &Spot, flag: UnlinkatFlags) -> Result<()> {
        let victim = self.nodes.victim(spot);
        unlinkat(&*self.descriptor(&spot.dir)?, &*spot.name, flag)?;
        victim.into_iter().for_each(Victim::lose_name);
        Ok(())
    }

    pub(crate) fn rename(&self, from: &Spot, to: &Spot, flags: u32) -> Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        let (moved, replaced) = (self.nodes.victim(from), self.nodes.victim(to));
        let (old_dir, new_dir) = (self.descriptor(&from.dir)?, self.descriptor(&to.dir)?);
        renameat2(&*old_dir, &*from.name, &*new_dir, &*to.name, flags)?;
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            self.nodes.renamed(replaced, from);
        } else {
            replaced.into_iter().for_each(Victim::lose_name);
        }
        self.nodes.renamed(moved, to);
        Ok(())
    }

    /// Opens a file; `distorted`: what it reads will not be what is there.
    pub(crate) fn open_file(&self, node: &Arc<Node>, flags: i32, distorted: bool, reads: &Reads) -> Result<Opened> {
        // The kernel has seen to the rest: appending, truncating, creating.
        let flags = OFlag::from_bits_truncate(flags & libc::O_ACCMODE) | OFlag::O_CLOEXEC;
        let fd = openat(AT_FDCWD, magic_link(&*self.descriptor(node)?).as_str(), flags, Mode::empty())?;
        let version = Version::of(&fstat(&fd)?);
        let before = node.caches((!distorted).then_some(version));
        let caching = match before {
            _ if distorted => Caching::Never,
            Some(before) if before == version => Caching::Keep,
            _ => Caching::Anew,
        };
        let outdated = node.tells(version) != Some(version);
        Ok(Opened { handle: self.hold(fd, node, node.path().into(), caching, reads), caching, outdated })
    }

    /// Makes and opens a file, or opens the one that is there.
    pub(crate) fn create(
        &self,
        spot: &Spot,
        mode: u32,
        flags: i32,
        caller: Caller,
        distorted: bool,
        reads: &Reads,
    ) -> Result<(FileAttr, u64, Caching)> {
        let kept = libc::O_ACCMODE | libc::O_EXCL | libc::O_TRUNC;
        let flags = OFlag::from_bits_truncate(flags & kept) | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&*self.descriptor(&spot.dir)?, &*spot.name, flags, Mode::from_bits_truncate(mode))?;
        self.give(spot, caller)?;
        let (node, stat) = self.nodes.look_up(spot)?;
        let caching = if distorted { Caching::Never } else { Caching::Anew };
        node.caches((!distorted).then_some(Version::of(&stat)));
        let handle = self.hold(fd, &node, spot.path().into(), caching, reads);
        Ok((attr(&stat), handle, caching))
    }

    fn hold(&self, fd: OwnedFd, node: &Arc<Node>, path: Arc<str>, caching: Caching, reads: &Reads) -> u64 {
        let reads = reads.of(&path);
        self.files.insert(OpenFile { fd, node: node.clone(), path, reads, cached: caching != Caching::Never })
    }

    pub(crate) fn fsync(&self, open: &OpenFile, data_only: bool) -> Result<()> {
        if data_only { nix::unistd::fdatasync(&open.fd) } else { nix::unistd::fsync(&open.fd) }
    }

    pub(crate) fn fsync_dir(&self, dir: &Node) -> Result<()> {
        let fd = self.descriptor(dir)?;
        File::open(magic_link(&fd)).and_then(|dir| dir.sync_all()).map_err(|error| errno(&error))
    }

    pub(crate) fn open_dir(&self, dir: &Arc<Node>) -> u64 {
        self.dirs.insert(OpenDir { dir: dir.clone(), listing: Mutex::default() })
    }

    /// The listing of an open directory, taken anew when reading starts from the beginning.
    pub(crate) fn listing(&self, open: &OpenDir, from: u64) -> Result<Arc<Vec<Listed>>> {
        let mut listing = open.listing.lock().unwrap_or_else(PoisonError::into_inner);
        if from == 0 {
            let dir = self.descriptor(&open.dir)?;
            let own = fstat(&*dir)?.st_ino;
            let dot = |name: &str| Listed { name: name.into(), ino: own, kind: FileType::Directory };
            let mut entries = vec![dot("."), dot("..")];
            for entry in fs::read_dir(magic_link(&dir)).map_err(|error| errno(&error))? {
                let entry = entry.map_err(|error| errno(&error))?;
                let kind = entry.file_type().ok().and_then(FileType::from_std).unwrap_or(FileType::RegularFile);
                entries.push(Listed { name: entry.file_name(), ino: entry.ino(), kind });
            }
            *listing = Arc::new(entries);
        }
        Ok(listing.clone())
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn timespec(time: Option<TimeOrNow>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => TimeSpec::from_duration(since),
            Err(error) => {
                let before = error.duration();
                let (seconds, nanos) = (before.as_secs() as i64, i64::from(before.subsec_nanos()));
                if nanos == 0 { TimeSpec::new(-seconds, 0) } else { TimeSpec::new(-seconds - 1, 1_000_000_000 - nanos) }
            }
        },
    }
}

fn system_time(seconds: i64, nanos: i64) -> SystemTime {
    let nanos = Duration::from_nanos(nanos.unsigned_abs());
    match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds) + nanos,
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()) + nanos,
    }
}

pub(crate) fn attr(stat: &FileStat) -> FileAttr {
    let kind = match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    };
    FileAttr {
        ino: INodeNo(stat.st_ino),
        size: stat.st_size.unsigned_abs(),
        blocks: stat.st_blocks.unsigned_abs(),
        atime: system_time(stat.st_atime, stat.st_atime_nsec),
        mtime: system_time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: system_time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind,
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags: 0,
    }
}
