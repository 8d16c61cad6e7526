//! What goes into a layer, and whether it can.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::catalog::PATH_LENGTH_MAX;
use super::row::is_component;
use crate::error::{Error, Kind, Result};

/// One thing that goes into a layer.
#[derive(Debug, Clone)]
pub struct Staged {
    /// Where, relative to the layer's root, components joined by `/`.
    pub path: Vec<u8>,
    /// What.
    pub kind: StagedKind,
}

/// What goes into a layer.
#[derive(Debug, Clone)]
pub enum StagedKind {
    /// A directory; needed only where it would be empty, as parents come by themselves.
    Dir,
    /// A file with the bytes of the file `source`.
    File {
        /// Read while the layer is written; must not change meanwhile.
        source: PathBuf,
        /// Mode 0755 instead of 0644.
        executable: bool,
    },
    /// A file with these bytes.
    Bytes {
        /// The bytes.
        content: Vec<u8>,
        /// Mode 0755 instead of 0644.
        executable: bool,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to, as it is.
        target: Vec<u8>,
    },
}

pub(super) fn invalid(path: &[u8], what: &str) -> Error {
    Error::new(Kind::Invalid, format!("{:?} {what}", String::from_utf8_lossy(path)))
}

/// Checks every path and adds the root and missing parents.
pub(super) fn complete_tree(staged: Vec<Staged>) -> Result<BTreeMap<Vec<u8>, StagedKind>> {
    let mut tree: BTreeMap<Vec<u8>, StagedKind> = BTreeMap::new();
    tree.insert(Vec::new(), StagedKind::Dir);
    for Staged { path, kind } in staged {
        if !path.split(|b| *b == b'/').all(is_component) {
            return Err(invalid(&path, "is not an acceptable path in a layer"));
        }
        if path.len() > PATH_LENGTH_MAX {
            return Err(invalid(&path, &format!("is longer than {PATH_LENGTH_MAX} bytes")));
        }
        match tree.get(&path) {
            None => {}
            Some(StagedKind::Dir) if matches!(kind, StagedKind::Dir) => continue,
            Some(_) => return Err(invalid(&path, "is there twice")),
        }
        tree.insert(path, kind);
    }
    let paths: Vec<Vec<u8>> = tree.keys().cloned().collect();
    for path in paths {
        let mut rest = path.as_slice();
        while let Some(at) = rest.iter().rposition(|b| *b == b'/') {
            rest = &rest[..at];
            match tree.get(rest) {
                Some(StagedKind::Dir) => break,
                Some(_) => {
                    return Err(invalid(
                        &path,
                        &format!("is below {:?}, which is no directory", String::from_utf8_lossy(rest)),
                    ));
                }
                None => tree.insert(rest.to_vec(), StagedKind::Dir),
            };
        }
    }
    Ok(tree)
}
