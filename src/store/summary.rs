//! Summaries: the documents of many layers in one blob.
//!
//! A node that sees an environment for the first time needs the documents of all of its layers. A version names the
//! summaries that have them: whoever publishes a version writes one for those of its layers that are in no summary that
//! it knows, so most versions name one to three, and a version of known layers writes none.

use std::io::Read;
use std::sync::Arc;

use super::object::{Object, Room};
use super::publish::Trust;
use super::{Index, LayerDoc, Store};
use crate::environment::{Digest, Summary};
use crate::error::{Error, Kind, Result};

/// Bytes that a summary may unpack to.
const UNPACKED_MAX: u64 = 256 << 20;

impl Store {
    /// Makes sure that the documents of all `layers` are in summaries, and returns these, sorted.
    pub fn ensure_summaries(&self, index: &Index, layers: &[Digest]) -> Result<Vec<Summary>> {
        let mut known = index.summaries(layers)?;
        for summary in known.iter().map(|(_, summary)| *summary).collect::<std::collections::BTreeSet<_>>() {
            let object = Object { room: Room::Blobs, digest: summary.blob, size: summary.size };
            if !self.has_object(&object, Trust::Length) {
                known.retain(|(_, other)| *other != summary);
            }
        }
        let have: std::collections::HashSet<Digest> = known.iter().map(|(layer, _)| *layer).collect();
        let missing: Vec<Digest> = layers.iter().filter(|layer| !have.contains(layer)).copied().collect();
        if !missing.is_empty() {
            let docs = index.layers(self, &missing)?;
            let bytes = pack(&docs)?;
            let summary = Summary { blob: self.ensure_blob(&bytes)?, size: bytes.len() as u64 };
            index.set_summary(&missing, &summary)?;
            known.extend(missing.into_iter().map(|layer| (layer, summary)));
        }
        let mut summaries: Vec<Summary> = known.into_iter().map(|(_, summary)| summary).collect();
        summaries.sort();
        summaries.dedup();
        Ok(summaries)
    }
}

fn pack(docs: &[Arc<LayerDoc>]) -> Result<Vec<u8>> {
    let failed = |what: String| Error::new(Kind::Failed, format!("a summary cannot be written: {what}"));
    let text = serde_json::to_vec(docs).map_err(|error| failed(error.to_string()))?;
    zstd::bulk::compress(&text, 9).map_err(|error| failed(error.to_string()))
}

/// The documents in the verified bytes of a summary.
///
/// # Errors
/// [`Kind::Corrupt`] when they are none.
pub fn documents(bytes: &[u8]) -> Result<Vec<LayerDoc>> {
    let corrupt = |what: String| {
        Error::new(Kind::Corrupt, format!("a summary of layers cannot be read: {what}")).hint("run `envfabric fsck`")
    };
    let mut text = Vec::new();
    let unpacked = zstd::Decoder::new(bytes).map_err(|error| corrupt(error.to_string()))?;
    let unpacked = unpacked.take(UNPACKED_MAX).read_to_end(&mut text);
    unpacked.map_err(|error| corrupt(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))
}
