//! One version as the view needs it: its layers in order, where each one's directory indices begin, its made-up files.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::Serialize;

use super::inode::{ROWS_MAX, Special};
use super::names::Time;
use crate::environment::{Digest, Document, Summary, Version};
use crate::error::{Error, Kind, Result};
use crate::store::{LayerDoc, RowId, SpineDir};

/// Length of a rendered `pyvenv.cfg` in bytes: constant, whatever is in it, because `st_size` is told before it is known
/// who reads.
pub const CONFIG_SIZE: usize = 8192;

/// Place of a layer in its version: 0 is the interpreter, 1 the scaffold, 2 and on the distributions.
pub(super) type Ord = u32;

/// A row of one of a version's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) ord: Ord,
    pub(super) row: RowId,
}

/// The layers of a version.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) docs: Vec<Arc<LayerDoc>>,
    /// Layer slots, in the same order.
    pub(super) slots: Vec<u32>,
    /// How many rows come before each layer.
    bases: Vec<u32>,
    rows: u32,
}

impl Layers {
    /// # Errors
    /// [`Kind::Unsupported`] when the layers have more rows than directory indices can tell apart.
    pub(super) fn new(docs: Vec<Arc<LayerDoc>>, slots: Vec<u32>) -> Result<Self> {
        let mut bases = Vec::with_capacity(docs.len());
        let mut rows = 0u32;
        for doc in &docs {
            bases.push(rows);
            rows = rows.checked_add(doc.rows).filter(|rows| *rows <= ROWS_MAX).ok_or_else(|| {
                Error::new(Kind::Unsupported, format!("a version has more than {ROWS_MAX} files and directories"))
            })?;
        }
        Ok(Layers { docs, slots, bases, rows })
    }

    pub(super) fn digest(&self, ord: Ord) -> Result<&Digest> {
        self.docs.get(ord as usize).map(|doc| &doc.digest).ok_or_else(gone)
    }

    /// What the layer's document says of a directory, if it does.
    pub(super) fn spine(&self, part: Part) -> Result<Option<&SpineDir>> {
        let doc = self.docs.get(part.ord as usize).ok_or_else(gone)?;
        Ok(doc.spine.iter().find(|dir| dir.row == part.row))
    }

    pub(super) fn slot(&self, ord: Ord) -> Result<u32> {
        self.slots.get(ord as usize).copied().ok_or_else(gone)
    }

    /// The index of a directory whose lowest part is `part`.
    pub(super) fn index(&self, part: Part) -> Result<u32> {
        let (base, doc) = self.bases.get(part.ord as usize).zip(self.docs.get(part.ord as usize)).ok_or_else(gone)?;
        // A row beyond what the document counts would get the number of another layer's directory.
        if part.row >= doc.rows {
            return Err(more_rows(doc));
        }
        base.checked_add(part.row).ok_or_else(gone)
    }

    /// The part that `index` stands for.
    pub(super) fn part(&self, index: u32) -> Result<Part> {
        if index >= self.rows {
            return Err(gone());
        }
        let ord = self.bases.partition_point(|base| *base <= index) - 1;
        Ok(Part { ord: ord as Ord, row: index - self.bases[ord] })
    }
}

/// What an inode number gets that names nothing (a layer's document that changed under its digest, a forged number).
pub(super) fn gone() -> Error {
    Error::new(Kind::NotFound, "no such inode in this view")
}

/// A catalog that has not as many rows as the layer's document counts.
pub(super) fn more_rows(doc: &LayerDoc) -> Error {
    let what = format!("layer {} does not have the {} rows that its document counts", doc.digest.short(), doc.rows);
    Error::new(Kind::Corrupt, what).hint("run `envfabric fsck`")
}

/// See the module.
#[derive(Debug)]
pub(super) struct VersionView {
    pub(super) version: Version,
    pub(super) slot: u32,
    layers: Mutex<Option<Arc<Layers>>>,
    metadata_size: OnceLock<u64>,
}

impl VersionView {
    pub(super) fn new(version: Version, slot: u32) -> Self {
        VersionView { version, slot, layers: Mutex::default(), metadata_size: OnceLock::new() }
    }

    /// The layers, opened when first asked for; a failure is tried again next time.
    pub(super) fn layers(
        &self,
        docs_of: impl FnOnce(&[Digest], &[Summary]) -> Result<Vec<Arc<LayerDoc>>>,
        slot_of: impl Fn(&Digest) -> Result<u32>,
    ) -> Result<Arc<Layers>> {
        // Not locked while the store is asked.
        let known = || self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layers) = &*known() {
            return Ok(layers.clone());
        }
        let version = &self.version;
        let digests: Vec<Digest> =
            [version.interpreter.layer, version.scaffold].iter().chain(&version.layers).copied().collect();
        let docs = docs_of(&digests, &version.summaries).map_err(|error| match error.kind() {
            Kind::WouldWait => error,
            _ => error.context(format!("version {} of {} cannot be shown", version.number, version.environment)),
        })?;
        let slots = digests.iter().map(slot_of).collect::<Result<_>>()?;
        let layers = Arc::new(Layers::new(docs, slots)?);
        Ok(known().get_or_insert(layers).clone())
    }

    /// `workflow/node@3`.
    pub(super) fn label(&self) -> String {
        format!("{}@{}", self.version.environment, self.version.number)
    }

    /// When it was published; the modification time of every directory in it. Two versions of one environment differ,
    /// even if they were published in the same second: a running interpreter that meets the other one under a moving
    /// name must not take its own listing for that one's. CPython compares floats, so a microsecond is the least step.
    pub(super) fn created(&self) -> Time {
        let steps = (self.version.number % 1_000_000) as u32 * 1_000;
        (self.version.created.as_second(), steps)
    }

    /// `metadata.json`: the version's document and what its layers are called.
    pub(super) fn metadata(&self, layers: &Layers) -> Result<Vec<u8>> {
        #[derive(Serialize)]
        struct Package<'a> {
            name: &'a str,
            version: &'a str,
            layer: &'a Digest,
        }
        #[derive(Serialize)]
        struct Metadata<'a> {
            #[serde(flatten)]
            version: &'a Version,
            packages: Vec<Package<'a>>,
        }
        let packages = layers.docs.iter().skip(2);
        let packages = packages
            .map(|doc| Package { name: &doc.meta.name, version: &doc.meta.version, layer: &doc.digest })
            .collect();
        let mut bytes = serde_json::to_vec_pretty(&Metadata { version: &self.version, packages })
            .map_err(|source| Error::new(Kind::Failed, "metadata.json cannot be written").with_source(source))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Length of [`VersionView::metadata`], which is asked for far more often than its bytes.
    pub(super) fn metadata_size(&self, layers: &Layers) -> Result<u64> {
        match self.metadata_size.get() {
            Some(size) => Ok(*size),
            None => {
                let size = self.metadata(layers)?.len() as u64;
                Ok(*self.metadata_size.get_or_init(|| size))
            }
        }
    }

    /// The lock or project file, where there is one with a name that can be shown.
    pub(super) fn document(&self, special: Special) -> Option<&Document> {
        let (document, taken) = match special {
            Special::Lock | Special::LinkLock => (self.version.lock.as_ref()?, self.version.pyproject.as_ref()),
            Special::Project | Special::LinkProject => (self.version.pyproject.as_ref()?, None),
            _ => return None,
        };
        let name = &document.name;
        // A document comes from the store, which is not to be trusted with names.
        let ok = !name.is_empty()
            && name.len() <= 255
            && !name.starts_with('.')
            && !name.contains(['/', '\0'])
            && name != "metadata.json"
            && taken.is_none_or(|other| other.name != *name);
        ok.then_some(document)
    }

    /// The directory of the interpreter's executable below the version's directory: `.python/bin`.
    pub(super) fn home(&self) -> String {
        match self.version.interpreter.executable.rsplit_once('/') {
            Some((dir, _)) => format!(".python/{dir}"),
            None => ".python".into(),
        }
    }

    /// Path of the version's directory inside the file system.
    pub(super) fn path(&self) -> String {
        let name = &self.version.environment;
        format!("/{}/{}/.versions/{}", name.workflow(), name.node(), self.version.number)
    }

    /// `python3.11`.
    pub(super) fn python_minor(&self) -> String {
        let version = &self.version.interpreter.version;
        let minor = version.match_indices('.').nth(1).map_or(version.as_str(), |(at, _)| &version[..at]);
        format!("python{minor}")
    }

    /// What the made-up symlink `special` points to.
    pub(super) fn link_target(&self, special: Special) -> Option<String> {
        let number = self.version.number;
        Some(match special {
            Special::Python => format!("../../.python/{}", self.version.interpreter.executable),
            Special::Python3 | Special::PythonMinor => "python".into(),
            Special::LinkVenv => format!(".versions/{number}/.venv"),
            Special::LinkPython => format!(".versions/{number}/.python"),
            Special::LinkMetadata => format!(".versions/{number}/metadata.json"),
            Special::LinkLock | Special::LinkProject => format!(".versions/{number}/{}", self.document(special)?.name),
            _ => return None,
        })
    }

    /// `pyvenv.cfg` for a caller that reaches the version's directory at `dir`.
    pub(super) fn config(&self, dir: &[u8]) -> Vec<u8> {
        let mut text = Vec::with_capacity(CONFIG_SIZE);
        text.extend_from_slice(b"home = ");
        text.extend_from_slice(if dir == b"/" { b"" } else { dir });
        let rest = format!(
            "/{}\nimplementation = CPython\nenvfabric = {}\nversion_info = {}\n\
             include-system-site-packages = false\nrelocatable = true\nprompt = {}\n",
            self.home(),
            env!("CARGO_PKG_VERSION"),
            self.version.interpreter.version,
            self.version.environment.node(),
        );
        text.extend_from_slice(rest.as_bytes());
        text.resize(CONFIG_SIZE, b'\n');
        text
    }
}

/// What a document names must be there: where it is missing, the store is damaged.
pub(super) fn damaged(error: Error) -> Error {
    if !error.is_not_found() {
        return error;
    }
    Error::new(Kind::Corrupt, "the store is damaged").with_source(error).hint("run `envfabric fsck`")
}
