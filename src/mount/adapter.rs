//! FUSE requests -> questions to a [`Tree`] -> replies. No decisions here but those about the kernel's caches.
//!
//! What the kernel asks once per connection and then never again because we answer ENOSYS: opendir (directories are
//! then cached as kept-open files and refreshed by their modification time), flush, fsync, fsyncdir, lseek, poll,
//! access, interrupt. (Linux 6.18, fs/fuse: `no_opendir`, `no_flush`, ...)

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    Version, WriteFlags,
};

use super::passthrough::{Mode, Passthrough};
use super::refresh::Refresher;
use super::stats::{self, Counters, How, Op};
use crate::error::{Error, Result};
use crate::view::{Attr, EntryRef, FileKind, Ino, Opened, Reader, Tree};

/// Inside a version nothing ever changes: ten years.
const LASTING: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Outside, the kernel asks again after this; with [`crate::view::FRESH`] on top, nothing is older than a second.
const MOVING: Duration = Duration::from_millis(500);
/// A name that is not there outside a version may be published any moment.
const NEVER: Duration = Duration::ZERO;
/// The longest name, in bytes; what `statfs` tells, too.
const NAME_MAX: usize = 255;

/// A mounted tree.
#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) tree: Arc<Tree>,
    pub(super) refresher: Arc<Refresher>,
    pub(super) owner: (u32, u32),
    /// Ask the kernel for passthrough.
    pub(super) try_passthrough: bool,
    pub(super) passthrough: Passthrough,
    pub(super) counters: Counters,
    /// Threads that answer.
    pub(super) threads: usize,
    /// Part of every file handle (`name_to_handle_at`): the numbers of another mount name other files, so a handle of
    /// it must not be taken for one of ours.
    pub(super) generation: Generation,
}

fn ino(number: INodeNo) -> Ino {
    Ino::from_raw(number.0)
}

fn ttl(lasting: bool) -> Duration {
    if lasting { LASTING } else { MOVING }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Dir => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
    }
}

fn system_time((seconds, nanos): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanos.into()))).unwrap_or(UNIX_EPOCH)
}

impl Adapter {
    fn file_attr(&self, attr: &Attr) -> FileAttr {
        let time = system_time(attr.mtime);
        FileAttr {
            ino: INodeNo(attr.ino.get()),
            size: attr.size,
            blocks: attr.size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: file_type(attr.kind),
            perm: attr.mode,
            nlink: attr.nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The errno of a failure, which is logged.
    fn errno(&self, error: &Error) -> Errno {
        self.tree.tell(error);
        Errno::from_i32(errno_of(error))
    }

    /// Asks the tree; a failure is logged and becomes an errno.
    fn ask<T>(&self, question: impl FnOnce(&Tree) -> Result<T>) -> Result<T, Errno> {
        question(&self.tree).map_err(|error| self.errno(&error))
    }

    fn is_inside_version(number: INodeNo) -> bool {
        use crate::view::Object;
        match ino(number).decode() {
            Some(Object::Special { special, .. }) => !special.is_node_link(),
            Some(Object::Row { .. } | Object::Layer { .. } | Object::Dir { .. }) => true,
            _ => false,
        }
    }

    fn note_asked(&self, number: INodeNo) {
        if !Adapter::is_inside_version(number) {
            self.refresher.note_asked();
        }
    }

    /// Fills a reply with entries from `offset` on; `add` says true when it is full.
    fn fill(
        &self,
        number: INodeNo,
        offset: u64,
        mut add: impl FnMut(u64, EntryRef<'_>, &dyn Fn() -> Result<Attr>) -> bool,
    ) -> Result<(), Errno> {
        self.note_asked(number);
        let listing = self.ask(|tree| tree.list(ino(number)))?;
        for at in listing.behind(offset)..listing.len() {
            let Some(entry) = listing.get(at) else { break };
            if add(entry.offset, entry, &|| self.tree.entry_attr(&listing, at)) {
                break;
            }
        }
        Ok(())
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let Version(major, minor) = config.kernel_abi();
        self.counters.heard((major, minor));
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
        ];
        for flag in wanted {
            // An older kernel goes without.
            let _ = config.add_capabilities(flag);
        }
        // With a low number, reads that wait for a slow store would keep reads of local files waiting.
        let _ = config.set_max_background(u16::MAX);
        let _ = config.set_max_write(1 << 20);
        if self.try_passthrough
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
        {
            self.passthrough.enable();
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.counters.count(Op::Lookup);
        // FUSE itself passes on up to 1,024 bytes; programs expect what every other file system says.
        if name.len() > NAME_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        self.note_asked(parent);
        match self.ask(|tree| tree.lookup(ino(parent), name.as_bytes())) {
            Ok(Some(attr)) => reply.entry(&ttl(attr.lasting), &self.file_attr(&attr), self.generation),
            Ok(None) => {
                // Inode 0: there is no such name, and the kernel may remember that.
                let inside = Adapter::is_inside_version(parent);
                let nothing = Attr {
                    ino: Ino::from_raw(0),
                    kind: FileKind::File,
                    size: 0,
                    mode: 0,
                    nlink: 0,
                    mtime: (0, 0),
                    lasting: inside,
                };
                reply.entry(if inside { &LASTING } else { &NEVER }, &self.file_attr(&nothing), self.generation);
            }
            Err(errno) => reply.error(errno),
        }
    }

    // Numbers are computed: there is nothing to forget.
    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {
        self.counters.count(Op::Forget);
    }

    fn getattr(&self, _req: &Request, number: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.counters.count(Op::Getattr);
        self.note_asked(number);
        match self.ask(|tree| tree.attr(ino(number))) {
            Ok(attr) => reply.attr(&ttl(attr.lasting), &self.file_attr(&attr)),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _req: &Request, number: INodeNo, reply: ReplyData) {
        self.counters.count(Op::Readlink);
        match self.ask(|tree| tree.readlink(ino(number))) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _req: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.counters.count(Op::Open);
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(Errno::EROFS);
        }
        let kept = FopenFlags::FOPEN_KEEP_CACHE;
        match self.ask(|tree| tree.open(ino(number))) {
            Ok(Opened::ByReader) => {
                self.counters.opened(How::Direct);
                reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
            }
            Ok(Opened::Whole(file, size)) if self.try_passthrough => {
                match self.passthrough.open(ino(number), &file, size, &reply) {
                    Mode::Cached(handle) => {
                        self.counters.opened(How::Cached);
                        reply.opened(handle, kept);
                    }
                    Mode::Passed(handle, backing) => {
                        self.counters.opened(How::Passthrough);
                        reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
                    }
                }
            }
            Ok(Opened::Lasting | Opened::Whole(..)) => {
                self.counters.opened(How::Cached);
                reply.opened(FileHandle(0), kept);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        req: &Request,
        number: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.counters.count(Op::Read);
        let reader = Reader { tid: Some(req.pid()).filter(|tid| *tid != 0) };
        match self.ask(|tree| tree.read(ino(number), offset, size, reader)) {
            Ok(bytes) => {
                self.counters.read(bytes.len());
                reply.data(&bytes);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn release(
        &self,
        _req: &Request,
        number: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.counters.count(Op::Release);
        if fh != FileHandle(0) {
            self.passthrough.release(ino(number), fh);
        }
        reply.ok();
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.counters.count(Op::Opendir);
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, _req: &Request, number: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.counters.count(Op::Readdir);
        let filled = self.fill(number, offset, |next, entry, _| {
            reply.add(INodeNo(entry.ino.get()), next, file_type(entry.kind), OsStr::from_bytes(entry.name))
        });
        match filled {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        number: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.counters.count(Op::Readdirplus);
        let filled = self.fill(number, offset, |next, entry, attr| {
            // The kernel takes no attributes of these two.
            let dots = entry.name == b"." || entry.name == b"..";
            let known = if dots { None } else { attr().map_err(|error| self.tree.tell(&error)).ok() };
            let unknown = Attr {
                ino: entry.ino,
                kind: entry.kind,
                size: 0,
                mode: 0o755,
                nlink: 2,
                mtime: (0, 0),
                lasting: false,
            };
            // What cannot be told now is asked for when somebody needs it, and fails there.
            let valid = known.as_ref().map_or(NEVER, |attr| ttl(attr.lasting));
            let attr = self.file_attr(&known.unwrap_or(unknown));
            reply.add(attr.ino, next, OsStr::from_bytes(entry.name), &valid, &attr, self.generation)
        });
        match filled {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.counters.count(Op::Statfs);
        match nix::sys::statvfs::statvfs(self.tree.store().root()) {
            Ok(stat) => reply.statfs(
                stat.blocks(),
                stat.blocks_free(),
                stat.blocks_available(),
                stat.files(),
                stat.files_free(),
                stat.block_size() as u32,
                NAME_MAX as u32,
                stat.fragment_size() as u32,
            ),
            Err(errno) => reply.error(self.errno(&Error::io("looking at", self.tree.store().root(), errno.into()))),
        }
    }

    fn getxattr(&self, _req: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.counters.count(Op::Getxattr);
        if !name.as_bytes().starts_with(b"user.envfabric.") {
            return reply.error(Errno::ENODATA);
        }
        if name.as_bytes() == stats::ATTRIBUTE.to_bytes() {
            return reply_xattr(&self.counters.tell(&self.tree, &self.passthrough, self.threads), size, reply);
        }
        match self.ask(|tree| tree.xattrs(ino(number))) {
            Ok(attrs) => match attrs.iter().find(|(known, _)| name == *known) {
                Some((_, value)) => reply_xattr(value.as_bytes(), size, reply),
                None => reply.error(Errno::ENODATA),
            },
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr(&self, _req: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        self.counters.count(Op::Listxattr);
        match self.ask(|tree| tree.xattrs(ino(number))) {
            Ok(attrs) => {
                let names: Vec<u8> = attrs.iter().flat_map(|(name, _)| [name.as_bytes(), b"\0"].concat()).collect();
                reply_xattr(&names, size, reply);
            }
            Err(errno) => reply.error(errno),
        }
    }

    // Answered once with ENOSYS, then never asked again.
    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        self.counters.count(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    // Not remembered by the kernel: CPython up to 3.13 asks isatty() of every file it opens.
    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        self.counters.count(Op::Ioctl);
        reply.error(Errno::ENOTTY);
    }

    // The mount is read-only, so the kernel answers most of these itself.
    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _link_name: &OsStr,
        _target: &std::path::Path,
        reply: ReplyEntry,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        self.counters.count(Op::Other);
        reply.error(Errno::EROFS);
    }
}

/// The errno that a caller gets. A handle of the store that is stale says nothing about ours: programs take ESTALE for
/// the loss of the file that they asked for, and the kernel walks the whole path again.
fn errno_of(error: &Error) -> i32 {
    match error.errno() {
        libc::ESTALE => libc::EIO,
        errno => errno,
    }
}

fn reply_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match (u32::try_from(value.len()), size) {
        (Ok(len), 0) => reply.size(len),
        (Ok(len), size) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_stale_handle_of_the_store_is_an_input_output_error_of_ours() {
        let errno = |kind| errno_of(&Error::new(kind, "x"));
        assert_eq!(errno(Kind::Os(libc::ESTALE)), libc::EIO);
        assert_eq!(errno(Kind::Os(libc::EACCES)), libc::EACCES);
        assert_eq!(errno(Kind::NotFound), libc::ENOENT);
    }
}
