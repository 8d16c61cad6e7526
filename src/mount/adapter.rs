//! FUSE requests -> questions to a [`Tree`](crate::view::Tree) -> replies. No decisions here but those about the kernel's caches.
//!
//! What the kernel asks once per connection and then never again because we answer ENOSYS: opendir (directories are
//! then cached as kept-open files and refreshed by their modification time), flush, fsync, fsyncdir, lseek, poll,
//! access, interrupt. (Linux 6.18, fs/fuse: `no_opendir`, `no_flush`, ...)

use std::ffi::OsStr;
use std::io;
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, Version, WriteFlags,
};

use super::replies::{NAME_MAX, Part, ino, reply_xattr, ttl};
use super::serving::Serving;
use super::shift::{Turn, Working};
use super::stats::{self, Op};
use super::warm;
use crate::error::{Kind, Result};
use crate::patience;
use crate::view::Reader;

/// A mounted tree.
///
/// Of a local store, the session's threads answer everything themselves. Of a distant one, they answer what needs no
/// waiting, and leave the rest to threads that may wait ([`patience`]).
#[derive(Debug, Clone)]
pub(super) struct Adapter(Arc<Serving>);

impl Adapter {
    pub(super) fn new(serving: Serving) -> Self {
        Adapter(Arc::new(serving))
    }

    /// Asks `question`, and hands `reply` what comes of it; a failure is logged and becomes an errno.
    ///
    /// Where that would have to wait for the store, both happen on another thread, and this one is free at once.
    fn answer<R: Send + 'static, T>(
        &self,
        begun: Working,
        mut reply: R,
        question: impl Fn(&Serving, &mut R) -> Result<T> + Send + 'static,
        tell: impl FnOnce(&Serving, R, Result<T, Errno>) + Send + 'static,
    ) {
        let Some(waiters) = &self.waiters else {
            let answer = question(self, &mut reply).map_err(|error| self.errno(&error));
            tell(self, reply, answer);
            return drop(begun);
        };
        match patience::at_once(|| question(self, &mut reply)) {
            Err(error) if error.kind() == Kind::WouldWait => {
                let serving = self.0.clone();
                waiters.run(move || {
                    begun.here();
                    let answer = question(&serving, &mut reply).map_err(|error| serving.errno(&error));
                    tell(&serving, reply, answer);
                    drop(begun);
                });
            }
            answer => {
                tell(self, reply, answer.map_err(|error| self.errno(&error)));
                drop(begun);
            }
        }
    }
}

impl Adapter {
    /// Counts a request whose answer needs nothing.
    fn turn(&self, op: Op) -> Turn<'_> {
        self.counters.count(op);
        self.shift.turn()
    }

    /// Counts a request and begins to follow it; none when it must be given up.
    fn begin(&self, req: &Request, op: Op, number: INodeNo) -> (Turn<'_>, Option<Working>) {
        let turn = self.turn(op);
        (turn, self.shift.begin(u64::from(req.unique()), op as u8, number.0))
    }
}

impl Deref for Adapter {
    type Target = Serving;

    fn deref(&self) -> &Serving {
        &self.0
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
        let _ = config.set_max_write(if self.shift.disagrees() { 1 << 19 } else { 1 << 20 });
        if self.agreed.resend {
            let _ = config.add_capabilities(InitFlags::FUSE_HAS_RESEND);
        }
        // A connection that has it keeps it, also when nobody wants it any more.
        let passthrough = self.agreed.passthrough.unwrap_or(self.try_passthrough);
        if passthrough
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
            && self.try_passthrough
        {
            self.passthrough.enable();
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (_turn, Some(begun)) = self.begin(req, Op::Lookup, parent) else { return reply.error(Errno::EIO) };
        // FUSE itself passes on up to 1,024 bytes; programs expect what every other file system says.
        if name.len() > NAME_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        self.shift.meet(name.as_bytes());
        self.note_asked(parent);
        let name = name.as_bytes().to_vec();
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.lookup(ino(parent), &name),
            move |serving, reply, found| match found {
                Ok(found) => serving.shown.entry(parent, found, reply),
                Err(errno) => reply.error(errno),
            },
        );
    }

    // Numbers are computed: there is nothing to forget.
    fn forget(&self, _req: &Request, _ino: INodeNo, _nlookup: u64) {
        let _turn = self.turn(Op::Forget);
    }

    fn getattr(&self, req: &Request, number: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let (_turn, Some(begun)) = self.begin(req, Op::Getattr, number) else { return reply.error(Errno::EIO) };
        self.note_asked(number);
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.attr(ino(number)),
            |serving, reply, attr| match attr {
                Ok(attr) => reply.attr(&ttl(attr.lasting), &serving.shown.attr(&attr)),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn readlink(&self, req: &Request, number: INodeNo, reply: ReplyData) {
        let (_turn, Some(begun)) = self.begin(req, Op::Readlink, number) else { return reply.error(Errno::EIO) };
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.readlink(ino(number)),
            |_, reply, target| match target {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn open(&self, req: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (_turn, Some(begun)) = self.begin(req, Op::Open, number) else { return reply.error(Errno::EIO) };
        if flags.acc_mode() != OpenAccMode::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(Errno::EROFS);
        }
        let unique = u64::from(req.unique());
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.open(ino(number)),
            move |serving, reply, opened| match opened {
                Ok(opened) => serving.opened(number, unique, opened, reply),
                Err(errno) => reply.error(errno),
            },
        );
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
        let (_turn, Some(begun)) = self.begin(req, Op::Read, number) else { return reply.error(Errno::EIO) };
        let reader = Reader { tid: Some(req.pid()).filter(|tid| *tid != 0) };
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.read(ino(number), offset, size, reader),
            |serving, reply, bytes| match bytes {
                Ok(bytes) => {
                    serving.counters.read(bytes.len());
                    reply.data(&bytes);
                }
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn release(
        &self,
        req: &Request,
        number: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (_turn, Some(_begun)) = self.begin(req, Op::Release, number) else { return reply.error(Errno::EIO) };
        if fh != FileHandle(0) {
            self.passthrough.release(ino(number), fh);
        }
        reply.ok();
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.turn(Op::Opendir);
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, req: &Request, dir: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let (_turn, Some(begun)) = self.begin(req, Op::Readdir, dir) else { return reply.error(Errno::EIO) };
        self.note_asked(dir);
        self.answer(
            begun,
            Part { dir, offset, reply },
            |serving, part| part.fill(&serving.tree),
            |_, part, filled| match filled {
                Ok(()) => part.reply.ok(),
                Err(errno) => part.reply.error(errno),
            },
        );
    }

    fn readdirplus(&self, req: &Request, dir: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        let (_turn, Some(begun)) = self.begin(req, Op::Readdirplus, dir) else { return reply.error(Errno::EIO) };
        self.note_asked(dir);
        self.answer(
            begun,
            Part { dir, offset, reply },
            |serving, part| part.fill(&serving.tree, &serving.shown),
            move |_, part, filled| match filled {
                // What was told before it failed is so.
                Err(errno) if part.offset == offset => part.reply.error(errno),
                _ => part.reply.ok(),
            },
        );
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (_turn, Some(begun)) = self.begin(req, Op::Statfs, INodeNo(1)) else { return reply.error(Errno::EIO) };
        self.answer(
            begun,
            reply,
            |serving, _| serving.space(),
            |_, reply, space| match space {
                Ok(space) => space.tell(reply),
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn getxattr(&self, req: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (_turn, Some(begun)) = self.begin(req, Op::Getxattr, number) else { return reply.error(Errno::EIO) };
        if !name.as_bytes().starts_with(b"user.envfabric.") {
            return reply.error(Errno::ENODATA);
        }
        // Asks nobody else, so that it is told whatever hangs.
        if name.as_bytes() == stats::ATTRIBUTE.to_bytes() {
            return reply_xattr(
                &self.counters.tell(&self.tree, &self.passthrough, self.threads, &self.shift),
                size,
                reply,
            );
        }
        let name = name.to_os_string();
        if name.as_bytes().starts_with(b"user.envfabric.warm") {
            return self.answer(
                begun,
                reply,
                move |serving, _| warm::answer(&serving.tree, ino(number), name.as_bytes()).transpose(),
                move |_, reply, told| match told {
                    Ok(Some(told)) => reply_xattr(&told, size, reply),
                    Ok(None) => reply.error(Errno::ENODATA),
                    Err(errno) => reply.error(errno),
                },
            );
        }
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.xattrs(ino(number)),
            move |_, reply, attrs| match attrs {
                Ok(attrs) => match attrs.iter().find(|(known, _)| name == *known) {
                    Some((_, value)) => reply_xattr(value.as_bytes(), size, reply),
                    None => reply.error(Errno::ENODATA),
                },
                Err(errno) => reply.error(errno),
            },
        );
    }

    fn listxattr(&self, req: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let (_turn, Some(begun)) = self.begin(req, Op::Listxattr, number) else { return reply.error(Errno::EIO) };
        self.answer(
            begun,
            reply,
            move |serving, _| serving.tree.xattrs(ino(number)),
            move |_, reply, attrs| match attrs {
                Ok(attrs) => {
                    let names: Vec<u8> = attrs.iter().flat_map(|(name, _)| [name.as_bytes(), b"\0"].concat()).collect();
                    reply_xattr(&names, size, reply);
                }
                Err(errno) => reply.error(errno),
            },
        );
    }

    // Answered once with ENOSYS, then never asked again.
    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
        reply.error(Errno::ENOSYS);
    }
    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Ioctl);
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
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.turn(Op::Other);
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
        let _turn = self.turn(Op::Other);
        reply.error(Errno::EROFS);
    }
}
