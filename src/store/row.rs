//! Rows: what a layer consists of.

use crate::environment::Digest;

/// Number of a row in its layer; 0 is the root.
pub type RowId = u32;

/// One row: a directory, file or symlink of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its number.
    pub id: RowId,
    /// The directory that it is in; the root is its own parent.
    pub parent: RowId,
    /// Its name, one path component; empty for the root.
    pub name: Vec<u8>,
    /// What it is.
    pub node: Node,
}

/// What a row is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir {
        /// How many directories are directly in it.
        subdirs: u32,
    },
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Mode 0755 instead of 0644.
        executable: bool,
        /// sha256 of its bytes.
        digest: Digest,
        /// Where its bytes lie.
        place: Place,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to.
        target: Vec<u8>,
    },
}

/// Where the bytes of a file lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the layer's pack, from this byte on.
    Pack {
        /// Bytes from the beginning of the pack.
        offset: u64,
    },
    /// In the blob named by the file's digest.
    Blob,
}

impl Node {
    /// Permission bits: 0755, 0644, or 0777 for a symlink.
    pub fn mode(&self) -> u16 {
        match self {
            Node::Dir { .. } => 0o755,
            Node::File { executable: true, .. } => 0o755,
            Node::File { executable: false, .. } => 0o644,
            Node::Symlink { .. } => 0o777,
        }
    }

    /// True for a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self, Node::Dir { .. })
    }

    pub(super) fn kind_number(&self) -> i64 {
        match self {
            Node::Dir { .. } => 0,
            Node::File { .. } => 1,
            Node::Symlink { .. } => 2,
        }
    }
}

/// True for what may stand as one path component in a layer.
pub(super) fn is_component(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}
