//! What slots are given to outside of versions, and where a tree keeps its slots beyond the process.

use std::sync::Arc;

use super::part;
use super::slots::{Log, Written};
use crate::environment::EnvName;

/// Which version was current when a pointer was the latest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct WasCurrent {
    pub(super) env: EnvName,
    pub(super) number: u64,
    /// Of the pointer.
    pub(super) sequence: u64,
}

impl Written for WasCurrent {
    fn write(&self) -> Vec<u8> {
        format!("{}@{}@{}", self.env, self.number, self.sequence).into_bytes()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (version, sequence) = std::str::from_utf8(bytes).ok()?.rsplit_once('@')?;
        let (env, number) = version.rsplit_once('@')?;
        Some(WasCurrent { env: env.parse().ok()?, number: number.parse().ok()?, sequence: sequence.parse().ok()? })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum NameKey {
    Workflow(String),
    Node(EnvName),
}

impl Written for NameKey {
    fn write(&self) -> Vec<u8> {
        match self {
            NameKey::Workflow(workflow) => workflow.clone().into_bytes(),
            NameKey::Node(env) => env.to_string().into_bytes(),
        }
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        match text.contains('/') {
            true => text.parse().ok().map(NameKey::Node),
            false => part(bytes).map(|workflow| NameKey::Workflow(workflow.into())),
        }
    }
}

/// Where a tree keeps what must outlive the process that serves it, so that the next one gives the same numbers the same
/// meaning.
#[derive(Debug, Clone)]
pub struct Logs {
    /// Slots of layers.
    pub layers: Arc<dyn Log>,
    /// Slots of versions.
    pub versions: Arc<dyn Log>,
    /// Slots of workflows and nodes.
    pub names: Arc<dyn Log>,
    /// Versions that were current, of environments of which one was shown.
    pub current: Arc<dyn Log>,
}
