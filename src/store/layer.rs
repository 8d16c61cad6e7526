//! Layers: what installing one wheel for one Python puts under a prefix, ingested once.
//!
//! A layer is named by the digest of a canonical serialisation of its rows ([`Canon`]), never by the bytes of its
//! SQLite catalog (which differ between SQLite versions) or of its pack.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::chunks::Chunks;
use super::object::{Object, Room};
use super::row::Node;
use super::spine::{SpineDir, SpineText};
use crate::environment::{Digest, Hasher};

/// The modification time of every file in every layer, in seconds: 2000-01-01 00:00:00 UTC.
///
/// Bytecode is compiled against it. Late enough to be representable in a zip file in every time zone.
pub const FILE_MTIME: i64 = 946_684_800;

/// Files up to this many bytes travel together in the layer's pack, in a store with raw objects; larger ones are blobs.
pub const SMALL_FILE_MAX: u64 = 128 * 1024;

/// What sort of layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerKind {
    /// A distribution, as installed below a venv.
    Wheel,
    /// A Python installation.
    Interpreter,
    /// What makes a venv of an interpreter.
    Scaffold,
}

/// What a layer's document says beyond what is derived from its rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMeta {
    /// What sort of layer.
    pub kind: LayerKind,
    /// Normalised distribution name (`scikit-learn`), or the interpreter's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// ABI and bytecode magic that it was made for.
    pub abi: String,
    /// `Requires-Dist` lines of its metadata, as written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<Requirement>,
    /// `Requires-Python` of its metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requires_python: Option<String>,
    /// Files that run whenever an interpreter starts (`*.pth`, `sitecustomize.py`), below the prefix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub startup_files: Vec<String>,
    /// Python files that did not compile, with the reason; they are there without bytecode.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub uncompiled: BTreeMap<String, String>,
    /// False when it was built without bytecode.
    pub bytecode: bool,
}

/// A requirement as written in metadata, `numpy>=1.26; python_version < "3.12"`.
pub type Requirement = String;

/// `layers/<digest>.json`: everything about a layer but its rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDoc {
    /// Format of this document, 1.
    pub format: u32,
    /// The layer.
    pub digest: Digest,
    /// What it is.
    #[serde(flatten)]
    pub meta: LayerMeta,
    /// Number of rows, the root included; row numbers are below this.
    pub rows: u32,
    /// Number of files.
    pub files: u32,
    /// Sum of the sizes of all files, in bytes.
    pub bytes: u64,
    /// sha256 of its catalog's bytes.
    pub catalog: Digest,
    /// Length of the catalog, in bytes.
    pub catalog_size: u64,
    /// The pack of the small files, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack: Option<Digest>,
    /// Length of the pack, in bytes; 0 where there is none.
    #[serde(default)]
    pub pack_size: u64,
    /// How much of its beginning programs are likely to need, in bytes.
    #[serde(default)]
    pub pack_hot: u64,
    /// Where its catalog is together with others; told by summaries only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<Bundle>,
    /// The blobs of the large files, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blobs: Vec<Digest>,
    /// The shortest paths that only files of this layer are below, or that are files: where another layer has the
    /// same path or one below it, the two may conflict. Sorted, relative to the prefix.
    pub claims: Vec<String>,
    /// Directories that other layers may have too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spine: Vec<SpineDir>,
    /// Small files that are read together with those of other layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<SpineText>,
}

impl LayerDoc {
    /// Its catalog.
    pub fn catalog_object(&self) -> Object {
        Object { room: Room::Catalogs, digest: self.catalog, size: self.catalog_size }
    }

    /// Its pack.
    pub fn pack_object(&self) -> Option<Object> {
        self.pack.map(|digest| Object { room: Room::Packs, digest, size: self.pack_size })
    }
}

#[cfg(test)]
impl LayerDoc {
    /// The document of a layer without content.
    pub(crate) fn bare(digest: Digest, meta: LayerMeta) -> LayerDoc {
        LayerDoc {
            format: 1,
            digest,
            meta,
            rows: 0,
            files: 0,
            bytes: 0,
            catalog: digest,
            catalog_size: 0,
            pack: None,
            pack_size: 0,
            pack_hot: 0,
            bundle: None,
            blobs: vec![],
            claims: vec![],
            spine: vec![],
            texts: vec![],
        }
    }
}

/// A part of an object that has the catalogs of many layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// The object.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Where in it this layer's catalog begins.
    pub at: u64,
}

impl Bundle {
    /// All of it.
    pub fn object(&self) -> Object {
        Object { room: Room::Catalogs, digest: self.digest, size: self.size }
    }
}

/// Digests a layer's rows in their canonical form.
///
/// ```text
/// "envfabric layer 2\n"
/// per row, in order of path (component by component, bytes):
///   u32 length of path, path                 big-endian lengths
///   u8  kind: 'd', 'f' or 'l'
///   u16 mode                                 0755 or 0644; 0777 for a symlink
///   u64 size, 32 bytes sha256                files only
///   32 bytes root of the chunks              files of more than one chunk only ([`Chunks::root`])
///   u32 length of target, target             symlinks only
/// ```
pub struct Canon(Hasher);

impl Default for Canon {
    fn default() -> Self {
        let mut hasher = Hasher::default();
        hasher.update(b"envfabric layer 2\n");
        Canon(hasher)
    }
}

impl Canon {
    /// Takes in the next row; `chunks` are those of a file that has more than one.
    pub fn row(&mut self, path: &[u8], node: &Node, chunks: Option<&Chunks>) {
        let h = &mut self.0;
        h.update(&(path.len() as u32).to_be_bytes());
        h.update(path);
        match node {
            Node::Dir { .. } => h.update(b"d"),
            Node::File { .. } => h.update(b"f"),
            Node::Symlink { .. } => h.update(b"l"),
        }
        h.update(&node.mode().to_be_bytes());
        match node {
            Node::Dir { .. } => {}
            Node::File { size, digest, .. } => {
                h.update(&size.to_be_bytes());
                h.update(digest.as_bytes());
                if let Some(chunks) = chunks.filter(|chunks| chunks.len() > 1) {
                    h.update(chunks.root().as_bytes());
                }
            }
            Node::Symlink { target } => {
                h.update(&(target.len() as u32).to_be_bytes());
                h.update(target);
            }
        }
    }

    /// The layer's digest.
    pub fn finish(self) -> Digest {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Place;

    /// Pinned: a change of this digest is a change of the format and makes every layer in every store unreachable.
    #[test]
    fn the_canonical_form_is_pinned() {
        let mut canon = Canon::default();
        canon.row(b"", &Node::Dir { subdirs: 1 }, None);
        canon.row(b"bin", &Node::Dir { subdirs: 0 }, None);
        let digest = Digest::of(b"#!/bin/sh\n");
        canon.row(
            b"bin/tool",
            &Node::File { size: 10, executable: true, digest, place: Place::Pack { offset: 7 } },
            None,
        );
        let large = vec![7u8; crate::store::CHUNK_SIZE as usize + 1];
        let node =
            Node::File { size: large.len() as u64, executable: false, digest: Digest::of(&large), place: Place::Blob };
        canon.row(b"lib.so", &node, Some(&Chunks::of(&large)));
        canon.row(b"lib64", &Node::Symlink { target: b"lib".to_vec() }, None);
        let expected = "58b8b906487e89bc2549058852cb18044384044eb22dda1dad06be205a1cb754";
        assert_eq!(canon.finish().to_string(), expected);
    }
}
