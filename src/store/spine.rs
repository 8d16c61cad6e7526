//! The spine of a layer: its directories that other layers are likely to have too, with what is in them.
//!
//! To show `site-packages`, the rows of every layer in it are needed. They are in the layer's document, which comes
//! with the documents of a hundred others ([`super::summary`]), so that a node need not fetch a hundred catalogs first.
//! So are the entry points of its distribution, because those of all distributions are read together
//! (`importlib.metadata.entry_points`).

use serde::{Deserialize, Serialize};

use super::catalog::ScannedKind;
use super::row::{Node, RowId};

/// A layer with more names in such a directory is looked at in its catalog.
const NAMES_MAX: usize = 1000;

/// One directory of a layer, as it is in its catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpineDir {
    /// Its row.
    pub row: RowId,
    /// What is in it: name, row, kind (`d`irectory, `f`ile, e`x`ecutable, sym`l`ink), and size (bytes; of a directory
    /// the number of directories in it).
    pub entries: Vec<(String, RowId, char, u64)>,
}

impl SpineDir {
    /// Name, row and kind of each entry, as a catalog shows them; offsets in the pack are left out.
    pub fn scanned(&self) -> impl Iterator<Item = (&str, RowId, ScannedKind)> {
        self.entries.iter().map(|(name, row, kind, size)| {
            let kind = match kind {
                'd' => ScannedKind::Dir { subdirs: u32::try_from(*size).unwrap_or(u32::MAX) },
                'l' => ScannedKind::Symlink { size: *size },
                kind => ScannedKind::File { size: *size, offset: None, executable: *kind == 'x' },
            };
            (name.as_str(), *row, kind)
        })
    }
}

/// A longer text is read from the pack, in bytes.
pub(super) const TEXT_MAX: u64 = 16 << 10;

/// A small file of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpineText {
    /// Its row.
    pub row: RowId,
    /// Its bytes.
    pub text: String,
}

/// True for files whose text belongs to the spine.
pub(super) fn is_text(path: &[u8]) -> bool {
    path.ends_with(b".dist-info/entry_points.txt")
}

/// True for directories that most wheels have: the root, `bin`, those on the way to `site-packages`, and what describes
/// the distribution.
fn belongs(path: &[u8]) -> bool {
    let parts: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
    match parts[..] {
        [name] => matches!(name, b"" | b"bin" | b"lib"),
        [b"lib", python] | [b"lib", python, b"site-packages"] => python.starts_with(b"python"),
        [b"lib", _, b"site-packages", info] => info.ends_with(b".dist-info"),
        _ => false,
    }
}

/// The spine of a layer with these rows: path, node, and number of the parent's row, in order.
pub(super) fn spine<'r>(rows: impl Iterator<Item = (&'r [u8], &'r Node, usize)>) -> Vec<SpineDir> {
    let mut dirs: Vec<(SpineDir, bool)> = Vec::new();
    for (row, (path, node, parent)) in rows.enumerate() {
        if row > 0
            && let Some((dir, whole)) = dirs.iter_mut().find(|(dir, _)| dir.row as usize == parent)
        {
            let name = std::str::from_utf8(path.rsplit(|b| *b == b'/').next().unwrap_or_default());
            let (kind, size) = match node {
                Node::Dir { subdirs } => ('d', u64::from(*subdirs)),
                Node::File { size, executable, .. } => (if *executable { 'x' } else { 'f' }, *size),
                Node::Symlink { target } => ('l', target.len() as u64),
            };
            match name {
                Ok(name) if dir.entries.len() < NAMES_MAX => {
                    dir.entries.push((name.to_string(), row as RowId, kind, size));
                }
                _ => *whole = false,
            }
        }
        if node.is_dir() && belongs(path) {
            dirs.push((SpineDir { row: row as RowId, entries: Vec::new() }, true));
        }
    }
    dirs.into_iter().filter(|(_, whole)| *whole).map(|(dir, _)| dir).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spine_has_what_wheels_share_and_leaves_out_what_it_cannot_tell() {
        let dir = Node::Dir { subdirs: 1 };
        let file = Node::Symlink { target: b"x".to_vec() };
        let rows: Vec<(&[u8], &Node, usize)> = vec![
            (b"", &dir, 0),
            (b"bin", &dir, 0),
            (b"bin/\xff", &file, 1),
            (b"lib", &dir, 0),
            (b"lib/python3.11", &dir, 3),
            (b"lib/python3.11/site-packages", &dir, 4),
            (b"lib/python3.11/site-packages/six.py", &file, 5),
            (b"lib/python3.11/site-packages/pandas", &dir, 5),
            (b"lib/python3.11/site-packages/pandas/x", &file, 7),
        ];
        let found = spine(rows.into_iter());
        assert_eq!(found.iter().map(|dir| dir.row).collect::<Vec<_>>(), [0, 3, 4, 5], "not bin: a name is no text");
        assert_eq!(found[3].entries, [("six.py".to_string(), 6, 'l', 1), ("pandas".to_string(), 7, 'd', 1)]);
    }
}
