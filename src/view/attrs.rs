//! Attributes of what a tree shows.

use super::names::{Time, Whose};
use super::{Attr, FileKind, Ino};
use crate::environment::Mode;
use crate::store::{FILE_MTIME, Node};

pub(super) fn row_attr(ino: Ino, node: &Node) -> Attr {
    let (kind, size) = match node {
        Node::File { size, .. } => (FileKind::File, *size),
        Node::Symlink { target } => (FileKind::Symlink, target.len() as u64),
        Node::Dir { .. } => (FileKind::Dir, 0),
    };
    Attr { ino, kind, size, mode: node.mode(), owner: None, nlink: 1, mtime: (FILE_MTIME, 0), lasting: true }
}

pub(super) fn lasting_file(ino: Ino, size: u64) -> Attr {
    Attr { ino, kind: FileKind::File, size, mode: 0o644, owner: None, nlink: 1, mtime: (FILE_MTIME, 0), lasting: true }
}

pub(super) fn lasting_dir(ino: Ino, subdirs: u32, mtime: Time) -> Attr {
    Attr { ino, kind: FileKind::Dir, size: 4096, mode: 0o755, owner: None, nlink: 2 + subdirs, mtime, lasting: true }
}

pub(super) fn moving_dir(ino: Ino, subdirs: usize, mtime: Time) -> Attr {
    let subdirs = u32::try_from(subdirs).unwrap_or(u32::MAX - 2);
    Attr { lasting: false, ..lasting_dir(ino, subdirs, mtime) }
}

/// `attr` of something that moves, in a workflow that is so `whose`.
pub(super) fn of_workflow(attr: Attr, whose: Whose) -> Attr {
    let (owner, mode) = match whose {
        Whose::Everybodys => (None, Mode::OPEN),
        Whose::Of(owner) => (Some((owner.uid, owner.gid)), owner.mode),
        Whose::Nobodys => (None, Mode::PRIVATE),
    };
    // What a link leads to has permissions of its own.
    let mode = if attr.kind == FileKind::Dir { mode.bits() } else { attr.mode };
    Attr { owner, mode, ..attr }
}
