//! Version documents: one immutable state of an environment.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Digest, EnvName};

/// The format number of a [`Version`] document that this program writes.
pub const VERSION_FORMAT: u32 = 1;

/// One immutable state of an environment: which layers, in which order, on which interpreter, and where it came from.
///
/// Later layers win where two have the same path. A few KB, whatever the size of the environment: a layer is named by
/// its digest alone, and what it is called is told by its own document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// [`VERSION_FORMAT`].
    pub format: u32,
    /// `<workflow>/<node>`.
    pub environment: EnvName,
    /// Counts from 1; never used twice for one name.
    pub number: u64,
    /// When it was published, to the second.
    pub created: Timestamp,
    /// The Python that it runs on.
    pub interpreter: InterpreterRef,
    /// The layer of what makes a venv of it: `bin/activate`, `lib64` and so on; below every wheel.
    pub scaffold: Digest,
    /// One layer per distribution, in the order of the lock.
    pub layers: Vec<Digest>,
    /// Blobs that have the documents of the layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub summaries: Vec<Summary>,
    /// The lock that decided `layers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<Document>,
    /// The project's `pyproject.toml`, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pyproject: Option<Document>,
    /// What the user asked for.
    pub source: Source,
    /// Who built it.
    pub builder: Builder,
    /// Paths that more than one layer has (at most 100 are kept).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conflicts: Vec<Conflict>,
    /// Random; tells two builders apart that claim one number.
    pub nonce: String,
}

impl Version {
    /// True when both would show the same tree, lock and project.
    pub fn same_content(&self, other: &Version) -> bool {
        self.environment == other.environment
            && self.interpreter == other.interpreter
            && self.scaffold == other.scaffold
            && self.layers == other.layers
            && self.lock == other.lock
            && self.pyproject == other.pyproject
            && self.source == other.source
    }
}

/// A blob with the documents of many layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Summary {
    /// Its digest.
    pub blob: Digest,
    /// Length in bytes.
    pub size: u64,
}

/// The interpreter of a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterpreterRef {
    /// Its layer.
    pub layer: Digest,
    /// Full version, `3.11.7`.
    pub version: String,
    /// The executable below the layer's root, `bin/python3.11`.
    pub executable: String,
}

/// A text kept with a version and shown beside `.venv`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// File name: `pylock.toml`, `uv.lock`, `pyproject.toml`.
    pub name: String,
    /// The blob with its bytes.
    pub blob: Digest,
    /// Length in bytes.
    pub size: u64,
}

/// What the user asked for, as `show` tells it; credentials are stripped before they come here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Source {
    /// Requirement strings and requirements files.
    Requirements {
        /// As given.
        requirements: Vec<String>,
        /// Base names of the files.
        files: Vec<String>,
    },
    /// A project directory.
    Project {
        /// The project's name.
        project: String,
        /// Chosen extras.
        extras: Vec<String>,
        /// Chosen groups.
        groups: Vec<String>,
    },
    /// A lock file.
    Lock {
        /// Its base name.
        file: String,
        /// Chosen extras.
        extras: Vec<String>,
        /// Chosen groups.
        groups: Vec<String>,
    },
}

/// The programs and machine that built a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Builder {
    /// Version of this program.
    pub envfabric: String,
    /// Version of uv, where uv was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uv: Option<String>,
    /// Host name.
    pub host: String,
}

/// One path that two layers have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// Below `.venv`.
    pub path: String,
    /// The distribution whose file is shown.
    pub shown: String,
    /// The distribution whose file is hidden.
    pub hidden: String,
}
