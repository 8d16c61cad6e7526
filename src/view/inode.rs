//! Inode numbers: computed, never handed out from a table of what was looked at.
//!
//! ```text
//! bits 52-51  50 ................ 27  26 ............... 0
//!     0       name slot (2 .. 50)              what (0-1)     the root, workflows, nodes, `.versions`
//!     1       layer slot              row                     a file or symlink, the same in every environment
//!     1       layer slot              2^27-1, 2^27-2          what imports read of a layer: its pack, its index
//!     2       version slot            directory index         a directory inside a version
//!     3       version slot            special                 what is made up for a version: links, pyvenv.cfg, ...
//! ```
//!
//! All are below 2^53, so that they survive a double (JavaScript, Lua, some JSON) unchanged. Number 1 is the root,
//! because FUSE says so.

use std::fmt;

use crate::error::{Error, Kind, Result};

const LOW_BITS: u32 = 27;
const SLOT_BITS: u32 = 24;
const LOW_MASK: u64 = (1 << LOW_BITS) - 1;
const KIND_SHIFT: u32 = LOW_BITS + SLOT_BITS;

/// The most rows a layer, or the layers of one version together, may have (2^27 - 2).
///
/// The last index is kept for a directory that no layer has.
pub const ROWS_MAX: u32 = LOW_MASK as u32 - 1;

/// The most slots of one kind that a live mount can give out.
pub const SLOTS_MAX: u32 = 1 << SLOT_BITS;

/// The index of `.venv/bin` where no layer has it.
pub(super) const MADE_UP_BIN: u32 = LOW_MASK as u32;

/// The rows behind which a layer's own files are.
const PACK_ROW: u32 = LOW_MASK as u32;
const IMPORTS_ROW: u32 = LOW_MASK as u32 - 1;

/// An inode number of a view.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(u64);

/// What an inode number says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Object {
    /// The root of the mount.
    Root,
    /// A workflow or node directory, by name slot.
    Name {
        /// Name slot.
        slot: u32,
    },
    /// The `.versions` directory of a node, by the node's name slot.
    Versions {
        /// Name slot.
        slot: u32,
    },
    /// A file or symlink of a layer.
    Row {
        /// Layer slot.
        layer: u32,
        /// Row.
        row: u32,
    },
    /// A file about a layer, which is no row of it.
    Layer {
        /// Layer slot.
        layer: u32,
        /// Which.
        file: LayerFile,
    },
    /// A directory of a version.
    Dir {
        /// Version slot.
        version: u32,
        /// Rows of the layers before its lowest layer, plus its row there.
        index: u32,
    },
    /// Something that a version has and no layer does.
    Special {
        /// Version slot.
        version: u32,
        /// Which.
        special: Special,
    },
}

/// A file about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerFile {
    /// Its pack, whole.
    Pack,
    /// Where in the pack the bytecode of each module is.
    Imports,
}

/// What a version has and no layer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Special {
    /// `.versions/<n>`.
    Root = 0,
    /// `.venv/pyvenv.cfg`.
    Config = 1,
    /// `metadata.json`.
    Metadata = 2,
    /// `pylock.toml` or `uv.lock`.
    Lock = 3,
    /// `pyproject.toml`.
    Project = 4,
    /// `.venv/bin/python`.
    Python = 5,
    /// `.venv/bin/python3`.
    Python3 = 6,
    /// `.venv/bin/python3.11`.
    PythonMinor = 7,
    /// The node's link `.venv` while this version is current.
    LinkVenv = 8,
    /// The node's link `metadata.json`.
    LinkMetadata = 9,
    /// The node's link to the lock.
    LinkLock = 10,
    /// The node's link `pyproject.toml`.
    LinkProject = 11,
    /// The node's link `.python`: CPython before 3.11 takes `.venv/bin/../../.python` apart as text.
    LinkPython = 12,
    /// `.versions/<n>/.imports`.
    Imports = 13,
    /// `.versions/<n>/.imports/index`.
    ImportsIndex = 14,
}

impl Special {
    const ALL: [Special; 15] = [
        Special::Root,
        Special::Config,
        Special::Metadata,
        Special::Lock,
        Special::Project,
        Special::Python,
        Special::Python3,
        Special::PythonMinor,
        Special::LinkVenv,
        Special::LinkMetadata,
        Special::LinkLock,
        Special::LinkProject,
        Special::LinkPython,
        Special::Imports,
        Special::ImportsIndex,
    ];

    /// True for the links in a node directory.
    pub fn is_node_link(self) -> bool {
        (Special::LinkVenv as u32..=Special::LinkPython as u32).contains(&(self as u32))
    }
}

impl Ino {
    /// The root of the mount.
    pub const ROOT: Ino = Ino(1);

    /// The number of `object`.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] when a slot or row is too large for its bits.
    pub fn encode(object: Object) -> Result<Ino> {
        let (kind, slot, low) = match object {
            Object::Root => return Ok(Ino::ROOT),
            Object::Name { slot } => return name(slot, 2),
            Object::Versions { slot } => return name(slot, 3),
            Object::Row { layer, row } if row < IMPORTS_ROW => (1, layer, row),
            Object::Row { .. } => return Err(too_many()),
            Object::Layer { layer, file: LayerFile::Pack } => (1, layer, PACK_ROW),
            Object::Layer { layer, file: LayerFile::Imports } => (1, layer, IMPORTS_ROW),
            Object::Dir { version, index } => (2, version, index),
            Object::Special { version, special } => (3, version, special as u32),
        };
        if slot >= SLOTS_MAX || u64::from(low) > LOW_MASK {
            return Err(too_many());
        }
        Ok(Ino(kind << KIND_SHIFT | u64::from(slot) << LOW_BITS | u64::from(low)))
    }

    /// What the number says; none for a number that [`Ino::encode`] never gives.
    pub fn decode(self) -> Option<Object> {
        let slot = (self.0 >> LOW_BITS) as u32 & (SLOTS_MAX - 1);
        let low = (self.0 & LOW_MASK) as u32;
        match self.0 >> KIND_SHIFT {
            0 => {
                let name_slot = u32::try_from(self.0 >> 2).ok().filter(|s| *s < SLOTS_MAX)?;
                match self.0 & 3 {
                    1 if name_slot == 0 => Some(Object::Root),
                    2 => Some(Object::Name { slot: name_slot }),
                    3 => Some(Object::Versions { slot: name_slot }),
                    _ => None,
                }
            }
            1 => Some(match low {
                PACK_ROW => Object::Layer { layer: slot, file: LayerFile::Pack },
                IMPORTS_ROW => Object::Layer { layer: slot, file: LayerFile::Imports },
                row => Object::Row { layer: slot, row },
            }),
            2 => Some(Object::Dir { version: slot, index: low }),
            3 => {
                let special = *Special::ALL.get(low as usize)?;
                Some(Object::Special { version: slot, special })
            }
            _ => None,
        }
    }

    /// The number as the kernel sees it.
    pub fn get(self) -> u64 {
        self.0
    }

    /// A number that came from the kernel.
    pub fn from_raw(raw: u64) -> Ino {
        Ino(raw)
    }
}

fn name(slot: u32, what: u64) -> Result<Ino> {
    if slot >= SLOTS_MAX {
        return Err(too_many());
    }
    Ok(Ino(u64::from(slot) << 2 | what))
}

fn too_many() -> Error {
    Error::new(Kind::Unsupported, "this mount has shown more names, layers or versions than it can number")
        .hint("unmount and mount again")
}

impl fmt::Debug for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn object() -> impl Strategy<Value = Object> {
        let slot = || prop_oneof![0..SLOTS_MAX, Just(0), Just(SLOTS_MAX - 1)];
        let low = || prop_oneof![0..=LOW_MASK as u32, Just(0), Just(ROWS_MAX), Just(MADE_UP_BIN)];
        prop_oneof![
            Just(Object::Root),
            slot().prop_map(|slot| Object::Name { slot }),
            slot().prop_map(|slot| Object::Versions { slot }),
            (slot(), 0..ROWS_MAX).prop_map(|(layer, row)| Object::Row { layer, row }),
            (slot(), any::<bool>()).prop_map(|(layer, pack)| {
                Object::Layer { layer, file: if pack { LayerFile::Pack } else { LayerFile::Imports } }
            }),
            (slot(), low()).prop_map(|(version, index)| Object::Dir { version, index }),
            (slot(), 0..Special::ALL.len())
                .prop_map(|(version, s)| Object::Special { version, special: Special::ALL[s] }),
        ]
    }

    proptest! {
        #[test]
        fn every_object_has_one_number_below_2_to_the_53(a in object(), b in object()) {
            let (x, y) = (Ino::encode(a).unwrap(), Ino::encode(b).unwrap());
            prop_assert_eq!(x.decode(), Some(a));
            prop_assert_eq!(x == y, a == b);
            prop_assert!(x.get() > 0 && x.get() < 1 << 53);
        }

        #[test]
        fn a_number_is_decoded_only_when_it_encodes_back(raw in any::<u64>(), shift in 0u32..64) {
            let ino = Ino::from_raw(raw >> shift);
            if let Some(object) = ino.decode() {
                prop_assert_eq!(Ino::encode(object).unwrap(), ino);
            }
        }
    }

    #[test]
    fn specials_are_numbered_as_listed() {
        for (i, special) in Special::ALL.iter().enumerate() {
            assert_eq!(*special as usize, i);
        }
        assert!(Ino::encode(Object::Row { layer: SLOTS_MAX, row: 0 }).is_err());
        assert!(Ino::encode(Object::Row { layer: 0, row: ROWS_MAX }).is_err());
    }
}
