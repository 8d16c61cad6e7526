//! The FUSE side: turns the kernel's calls into calls of [`Server`], and what comes of them into answers.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::backing::{Caching, Caller, Changes, Result};
use crate::calls::Call;
use crate::nodes::{Node, OpenDir, OpenFile, Spot};
use crate::server::{About, Server};

/// The most bytes that a READ or a WRITE carries.
pub(crate) const LARGEST: u32 = 1 << 20;

/// Numbers are not given away while the kernel knows them.
const GENERATION: Generation = Generation(0);

/// The file system that the kernel talks to.
pub(crate) struct Loopback {
    server: Arc<Server>,
    ttl: Duration,
}

pub(crate) fn refused(errno: nix::errno::Errno) -> Errno {
    Errno::from_i32(errno as i32)
}

fn open_flags(caching: Caching) -> FopenFlags {
    match caching {
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
        Caching::Anew => FopenFlags::empty(),
        Caching::Never => FopenFlags::FOPEN_DIRECT_IO,
    }
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid() }
}

fn answer_empty(reply: ReplyEmpty) -> impl FnOnce(Result<()>) + Send + 'static {
    move |done| match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(refused(errno)),
    }
}

/// What the kernel takes for "there is no such name": remembered as long as a name.
fn missing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

impl Loopback {
    pub(crate) fn new(server: Arc<Server>, ttl: Duration) -> Self {
        Loopback { server, ttl }
    }

    fn node(&self, ino: INodeNo) -> Option<Arc<Node>> {
        self.server.backing.nodes.get(ino.0)
    }

    fn spot(&self, dir: INodeNo, name: &OsStr) -> Option<Spot> {
        self.node(dir).map(|dir| Spot { dir, name: name.into() })
    }

    fn file(&self, handle: FileHandle) -> Option<Arc<OpenFile>> {
        self.server.backing.files.get(handle.0)
    }

    fn dir(&self, handle: FileHandle) -> Option<Arc<OpenDir>> {
        self.server.backing.dirs.get(handle.0)
    }

    fn answer_entry(&self, reply: ReplyEntry) -> impl FnOnce(Result<FileAttr>) + Send + 'static {
        let ttl = self.ttl;
        move |found| match found {
            Ok(attr) => reply.entry(&ttl, &attr, GENERATION),
            Err(errno) => reply.error(refused(errno)),
        }
    }

    fn answer_attr(&self, reply: ReplyAttr) -> impl FnOnce(Result<FileAttr>) + Send + 'static {
        let ttl = self.ttl;
        move |found| match found {
            Ok(attr) => reply.attr(&ttl, &attr),
            Err(errno) => reply.error(refused(errno)),
        }
    }
}

impl Filesystem for Loopback {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each as far as the kernel goes.
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            let _ = config.add_capabilities(flag);
        }
        if let Err(most) = config.set_max_readahead(LARGEST) {
            let _ = config.set_max_readahead(most);
        }
        if let Err(most) = config.set_max_write(LARGEST) {
            let _ = config.set_max_write(most);
        }
        let _ = config.set_max_background(u16::MAX);
        let _ = config.set_congestion_threshold(u16::MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let ttl = self.ttl;
        // A miss is an answer; an ENOENT that was asked for is a failure, which nobody remembers.
        let work = {
            let spot = spot.clone();
            move |server: &Server| match server.backing.lookup(&spot) {
                Err(nix::errno::Errno::ENOENT) => Ok(missing()),
                found => found,
            }
        };
        self.server.call(Call::Lookup, About::Spot(spot), work, move |found| match found {
            Ok(attr) => reply.entry(&ttl, &attr, GENERATION),
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.server.counts.count(Call::Forget, 1);
        self.server.backing.nodes.forget(ino.0, lookups);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let work = {
            let node = node.clone();
            move |server: &Server| server.backing.getattr(&node)
        };
        self.server.call(Call::Getattr, About::Node(node), work, self.answer_attr(reply));
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let open = handle.and_then(|handle| self.file(handle));
        let changes = Changes { mode, uid, gid, size, atime, mtime };
        let work = {
            let node = node.clone();
            move |server: &Server| server.backing.setattr(&node, open.as_deref(), &changes)
        };
        self.server.call(Call::Setattr, About::Node(node), work, self.answer_attr(reply));
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let work = {
            let node = node.clone();
            move |server: &Server| server.backing.readlink(&node)
        };
        self.server.call(Call::Readlink, About::Node(node), work, move |target| match target {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let (caller, at) = (caller(request), spot.clone());
        let work = move |server: &Server| server.backing.mknod(&at, mode, rdev, caller);
        self.server.call(Call::Mknod, About::Spot(spot), work, self.answer_entry(reply));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let (caller, at) = (caller(request), spot.clone());
        let work = move |server: &Server| server.backing.mkdir(&at, mode, caller);
        self.server.call(Call::Mkdir, About::Spot(spot), work, self.answer_entry(reply));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let at = spot.clone();
        let work = move |server: &Server| server.backing.unlink(&at);
        self.server.call(Call::Unlink, About::Spot(spot), work, answer_empty(reply));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let at = spot.clone();
        let work = move |server: &Server| server.backing.rmdir(&at);
        self.server.call(Call::Rmdir, About::Spot(spot), work, answer_empty(reply));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let (caller, at, target) = (caller(request), spot.clone(), target.to_path_buf());
        let work = move |server: &Server| server.backing.symlink(&target, &at, caller);
        self.server.call(Call::Symlink, About::Spot(spot), work, self.answer_entry(reply));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (Some(from), Some(to)) = (self.spot(parent, name), self.spot(new_parent, new_name)) else {
            return reply.error(Errno::ESTALE);
        };
        let about = About::Spots(from.clone(), to.clone());
        let work = move |server: &Server| server.backing.rename(&from, &to, flags.bits());
        self.server.call(Call::Rename, about, work, answer_empty(reply));
    }

    fn link(&self, _request: &Request, ino: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        let (Some(node), Some(spot)) = (self.node(ino), self.spot(new_parent, new_name)) else {
            return reply.error(Errno::ESTALE);
        };
        let about = About::Link(node.clone(), spot.clone());
        let work = move |server: &Server| server.backing.link(&node, &spot);
        self.server.call(Call::Link, about, work, self.answer_entry(reply));
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let work = {
            let node = node.clone();
            move |server: &Server| {
                let distorted = server.faults.distort(&node.path());
                let opened = server.backing.open_file(&node, flags.0, distorted, &server.reads)?;
                if opened.outdated {
                    server.forget_attributes(&node);
                }
                Ok(opened)
            }
        };
        self.server.call(Call::Open, About::Node(node), work, move |opened| match opened {
            Ok(opened) => reply.opened(FileHandle(opened.handle), open_flags(opened.caching)),
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let Some(spot) = self.spot(parent, name) else { return reply.error(Errno::ESTALE) };
        let (caller, at, ttl) = (caller(request), spot.clone(), self.ttl);
        let work = move |server: &Server| {
            let distorted = server.faults.distort(&at.path());
            server.backing.create(&at, mode, flags, caller, distorted, &server.reads)
        };
        self.server.call(Call::Create, About::Spot(spot), work, move |made| match made {
            Ok((attr, handle, caching)) => {
                reply.created(&ttl, &attr, GENERATION, FileHandle(handle), open_flags(caching));
            }
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.file(handle) else { return reply.error(Errno::EBADF) };
        self.server.read(file, offset, size, reply);
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(file) = self.file(handle) else { return reply.error(Errno::EBADF) };
        self.server.write(file, offset, data, reply);
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // The kernel asks once, and then never again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.server.counts.count(Call::Release, 1);
        self.server.backing.files.remove(handle.0);
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let Some(file) = self.file(handle) else { return reply.error(Errno::EBADF) };
        let work = {
            let file = file.clone();
            move |server: &Server| server.backing.fsync(&file, data_only)
        };
        self.server.call(Call::Fsync, About::File(file), work, answer_empty(reply));
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let dir = node.clone();
        let work = move |server: &Server| Ok(server.backing.open_dir(&dir));
        self.server.call(Call::Opendir, About::Node(node), work, move |opened| match opened {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, from: u64, mut reply: ReplyDirectory) {
        let Some(open) = self.dir(handle) else { return reply.error(Errno::EBADF) };
        let about = About::Node(open.dir.clone());
        let work = move |server: &Server| server.backing.listing(&open, from);
        self.server.call(Call::Readdir, about, work, move |listing| match listing {
            Ok(listing) => {
                for (entry, next) in listing.iter().zip(1u64..).skip(from as usize) {
                    if reply.add(INodeNo(entry.ino), next, entry.kind, &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        from: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(open) = self.dir(handle) else { return reply.error(Errno::EBADF) };
        let (about, ttl, server) = (About::Node(open.dir.clone()), self.ttl, self.server.clone());
        let dir = open.dir.clone();
        let work = move |server: &Server| server.backing.listing(&open, from);
        self.server.call(Call::Readdirplus, about, work, move |listing| match listing {
            Ok(listing) => {
                for (entry, next) in listing.iter().zip(1u64..).skip(from as usize) {
                    // The kernel does not look the first two up.
                    let looked_up = next > 2;
                    let spot = Spot { dir: dir.clone(), name: entry.name.as_os_str().into() };
                    let found = if looked_up { server.backing.lookup(&spot) } else { server.backing.getattr(&dir) };
                    // Gone since it was listed.
                    let Ok(attr) = found else { continue };
                    if reply.add(attr.ino, next, &entry.name, &ttl, &attr, GENERATION) {
                        if looked_up {
                            server.backing.nodes.forget(attr.ino.0, 1);
                        }
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(refused(errno)),
        });
    }

    fn releasedir(&self, _request: &Request, _ino: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.server.counts.count(Call::Releasedir, 1);
        self.server.backing.dirs.remove(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let dir = node.clone();
        let work = move |server: &Server| server.backing.fsync_dir(&dir);
        self.server.call(Call::Fsyncdir, About::Node(node), work, answer_empty(reply));
    }

    fn statfs(&self, _request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let Some(node) = self.node(ino) else { return reply.error(Errno::ESTALE) };
        let work = |server: &Server| server.backing.statfs();
        self.server.call(Call::Statfs, About::Node(node), work, move |found| match found {
            Ok(fs) => reply.statfs(
                fs.blocks(),
                fs.blocks_free(),
                fs.blocks_available(),
                fs.files(),
                fs.files_free(),
                fs.block_size() as u32,
                fs.name_max() as u32,
                fs.fragment_size() as u32,
            ),
            Err(errno) => reply.error(refused(errno)),
        });
    }
}
