//! What the tree says, as the kernel wants to hear it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileType, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyStatfs,
    ReplyXattr,
};
use nix::sys::statvfs::Statvfs;

use crate::error::{Error, Kind, Result};
use crate::patience;
use crate::view::{Attr, FileKind, Ino, Object, Tree};

/// Inside a version nothing ever changes: ten years.
pub(super) const LASTING: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Outside, the kernel asks again after this; with [`crate::view::FRESH`] on top, nothing is older than a second.
pub(super) const MOVING: Duration = Duration::from_millis(500);
/// A name that is not there outside a version may be published any moment.
pub(super) const NEVER: Duration = Duration::ZERO;
/// The longest name, in bytes; what `statfs` tells, too.
pub(super) const NAME_MAX: usize = 255;

pub(super) fn ino(number: INodeNo) -> Ino {
    Ino::from_raw(number.0)
}

pub(super) fn ttl(lasting: bool) -> Duration {
    if lasting { LASTING } else { MOVING }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Dir => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
    }
}

pub(super) fn system_time((seconds, nanos): (i64, u32)) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanos.into()))).unwrap_or(UNIX_EPOCH)
}

/// True when `number` is of something that never changes.
pub(super) fn is_inside_version(number: INodeNo) -> bool {
    match ino(number).decode() {
        Some(Object::Special { special, .. }) => !special.is_node_link(),
        Some(Object::Row { .. } | Object::Layer { .. } | Object::Dir { .. }) => true,
        _ => false,
    }
}

/// How inodes are shown: whose they are where nothing else is said, and of which mount.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    pub(super) owner: (u32, u32),
    /// Part of every file handle (`name_to_handle_at`): the numbers of another mount name other files, so a handle of
    /// it must not be taken for one of ours.
    pub(super) generation: Generation,
}

impl Shown {
    pub(super) fn attr(&self, attr: &Attr) -> FileAttr {
        let time = system_time(attr.mtime);
        let (uid, gid) = attr.owner.unwrap_or(self.owner);
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
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Answers a lookup in directory `parent`.
    pub(super) fn entry(&self, parent: INodeNo, found: Option<Attr>, reply: ReplyEntry) {
        match found {
            Some(attr) => reply.entry(&ttl(attr.lasting), &self.attr(&attr), self.generation),
            None => {
                // Inode 0: there is no such name, and the kernel may remember that.
                let inside = is_inside_version(parent);
                let nothing = Attr {
                    ino: Ino::from_raw(0),
                    kind: FileKind::File,
                    size: 0,
                    mode: 0,
                    owner: None,
                    nlink: 0,
                    mtime: (0, 0),
                    lasting: inside,
                };
                reply.entry(if inside { &LASTING } else { &NEVER }, &self.attr(&nothing), self.generation);
            }
        }
    }
}

/// How full a file system is, in blocks and files.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Space {
    blocks: u64,
    free: u64,
    available: u64,
    files: u64,
    files_free: u64,
    block_size: u32,
    fragment_size: u32,
}

impl From<Statvfs> for Space {
    fn from(stat: Statvfs) -> Self {
        Space {
            blocks: stat.blocks(),
            free: stat.blocks_free(),
            available: stat.blocks_available(),
            files: stat.files(),
            files_free: stat.files_free(),
            block_size: stat.block_size() as u32,
            fragment_size: stat.fragment_size() as u32,
        }
    }
}

impl Space {
    pub(super) fn tell(&self, reply: ReplyStatfs) {
        let Space { blocks, free, available, files, files_free, block_size, fragment_size } = *self;
        reply.statfs(blocks, free, available, files, files_free, block_size, NAME_MAX as u32, fragment_size);
    }
}

/// A part of a listing, from `offset` on.
#[derive(Debug)]
pub(super) struct Part<R> {
    pub(super) dir: INodeNo,
    pub(super) offset: u64,
    pub(super) reply: R,
}

impl Part<ReplyDirectory> {
    pub(super) fn fill(&mut self, tree: &Tree) -> Result<()> {
        let listing = tree.list(ino(self.dir))?;
        for at in listing.behind(self.offset)..listing.len() {
            let Some(entry) = listing.get(at) else { break };
            let name = OsStr::from_bytes(entry.name);
            if self.reply.add(INodeNo(entry.ino.get()), entry.offset, file_type(entry.kind), name) {
                break;
            }
        }
        Ok(())
    }
}

impl Part<ReplyDirectoryPlus> {
    /// Where the store would have to be waited for, it ends in between and can be called again to go on.
    pub(super) fn fill(&mut self, tree: &Tree, shown: &Shown) -> Result<()> {
        let listing = tree.list(ino(self.dir))?;
        let mut answers = true;
        for at in listing.behind(self.offset)..listing.len() {
            let Some(entry) = listing.get(at) else { break };
            // The kernel takes no attributes of these two.
            let dots = entry.name == b"." || entry.name == b"..";
            let ask = || tree.entry_attr(&listing, at);
            let known = match dots {
                true => None,
                // A store that does not answer is waited for once and not for each entry.
                false if answers => match ask() {
                    Err(error) if error.kind() == Kind::WouldWait => return Err(error),
                    Err(error) => {
                        answers = error.kind() != Kind::TimedOut;
                        tree.tell(&error);
                        None
                    }
                    Ok(attr) => Some(attr),
                },
                false => patience::at_once(ask).ok(),
            };
            let unknown = Attr {
                ino: entry.ino,
                kind: entry.kind,
                size: 0,
                // Until it is known, which is before anybody is let in.
                mode: 0,
                owner: None,
                nlink: 2,
                mtime: (0, 0),
                lasting: false,
            };
            // What cannot be told now is asked for when somebody needs it, and fails there.
            let valid = known.as_ref().map_or(NEVER, |attr| ttl(attr.lasting));
            let attr = shown.attr(&known.unwrap_or(unknown));
            let name = OsStr::from_bytes(entry.name);
            if self.reply.add(attr.ino, entry.offset, name, &valid, &attr, shown.generation) {
                break;
            }
            self.offset = entry.offset;
        }
        Ok(())
    }
}

/// The errno that a caller gets. A handle of the store that is stale says nothing about ours: programs take ESTALE for
/// the loss of the file that they asked for, and the kernel walks the whole path again.
pub(super) fn errno_of(error: &Error) -> i32 {
    match error.errno() {
        libc::ESTALE => libc::EIO,
        errno => errno,
    }
}

pub(super) fn reply_xattr(value: &[u8], size: u32, reply: ReplyXattr) {
    match (u32::try_from(value.len()), size) {
        (Ok(len), 0) => reply.size(len),
        (Ok(len), size) if len <= size => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_handle_of_the_store_is_an_input_output_error_of_ours() {
        let errno = |kind| errno_of(&Error::new(kind, "x"));
        assert_eq!(errno(Kind::Os(libc::ESTALE)), libc::EIO);
        assert_eq!(errno(Kind::Os(libc::EACCES)), libc::EACCES);
        assert_eq!(errno(Kind::NotFound), libc::ENOENT);
    }
}
