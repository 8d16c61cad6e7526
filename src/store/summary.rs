//! Summaries: the documents of many layers in one blob, and their catalogs in one object.
//!
//! A node that sees an environment for the first time needs the documents of all of its layers, and the catalogs of those
//! that are used. A version names the summaries that have them: whoever publishes a version writes one for those of its
//! layers that are in no summary that it knows, so most versions name one to three, and a version of known layers writes
//! none.

use std::collections::{BTreeSet, HashSet};
use std::io::Read;
use std::sync::Arc;

use super::chunks::CHUNK_SIZE;
use super::object::{DOCUMENT_MAX, Object, ObjectFile, Room};
use super::publish::Trust;
use super::{Bundle, Index, LayerDoc, Store};
use crate::environment::{Digest, Summary};
use crate::error::{Error, Kind, Result};

/// As often as it is long a summary may be at most when it is unpacked; the digests in it compress to a half.
const RATIO_MAX: u64 = 64;
/// The logarithm of what the unpacker keeps at most, in bytes: what the level that summaries are written with uses.
const WINDOW_LOG_MAX: u32 = 23;

impl Store {
    /// Makes sure that the documents of all `layers` are in summaries, and returns these, sorted. With `repair`, those
    /// that are there are read and compared, and written again where they are damaged.
    pub fn ensure_summaries(&self, index: &Index, layers: &[Digest], repair: bool) -> Result<Vec<Summary>> {
        let trust = if repair { Trust::Nothing } else { Trust::Length };
        let mut known = index.summaries(layers)?;
        let docs = index.layers(self, &known.iter().map(|(layer, _)| *layer).collect::<Vec<_>>())?;
        let bundles: HashSet<Object> = docs.iter().filter_map(|doc| doc.bundle.map(|bundle| bundle.object())).collect();
        let lost: HashSet<Object> = bundles.into_iter().filter(|bundle| !self.has_object(bundle, trust)).collect();
        let bundle_is_there = |doc: &Arc<LayerDoc>| doc.bundle.is_some_and(|bundle| !lost.contains(&bundle.object()));
        known = known.into_iter().zip(&docs).filter(|(_, doc)| bundle_is_there(doc)).map(|(known, _)| known).collect();
        for summary in known.iter().map(|(_, summary)| *summary).collect::<BTreeSet<_>>() {
            let object = Object { room: Room::Blobs, digest: summary.blob, size: summary.size };
            if !self.has_object(&object, trust) {
                known.retain(|(_, other)| *other != summary);
            }
        }
        let have: HashSet<Digest> = known.iter().map(|(layer, _)| *layer).collect();
        let missing: Vec<Digest> = layers.iter().filter(|layer| !have.contains(layer)).copied().collect();
        if !missing.is_empty() {
            let docs = self.bundle(&index.layers(self, &missing)?, trust)?;
            let bytes = pack(&docs)?;
            let summary = Summary { blob: Digest::of(&bytes), size: bytes.len() as u64 };
            self.ensure_bytes(Room::Blobs, &bytes, &summary.blob, trust)?;
            index.learn(&summary, docs)?;
            known.extend(missing.into_iter().map(|layer| (layer, summary)));
        }
        let summaries: BTreeSet<Summary> = known.into_iter().map(|(_, summary)| summary).collect();
        Ok(summaries.into_iter().collect())
    }

    /// Puts the catalogs of `docs` one after the other into one object; returns the documents, which say where.
    fn bundle(&self, docs: &[Arc<LayerDoc>], trust: Trust) -> Result<Vec<LayerDoc>> {
        let docs: Vec<LayerDoc> = docs.iter().map(|doc| LayerDoc::clone(doc)).collect();
        let (docs, all) = self.bundled(&docs)?;
        self.ensure_bytes(Room::Catalogs, &all, &Digest::of(&all), trust)?;
        Ok(docs)
    }

    /// The catalogs of `docs` one after the other, and the documents, which say where in that.
    pub(super) fn bundled(&self, docs: &[LayerDoc]) -> Result<(Vec<LayerDoc>, Vec<u8>)> {
        let mut all = Vec::new();
        let mut starts = Vec::with_capacity(docs.len());
        for doc in docs {
            starts.push(all.len() as u64);
            let bytes = ObjectFile::open(self, &doc.catalog_object())?.read_document()?;
            if Digest::of(&bytes) != doc.catalog {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("the catalog of layer {} is damaged", doc.digest.short()),
                )
                .hint("run `envfabric fsck`"));
            }
            all.extend(bytes);
        }
        let (digest, size) = (Digest::of(&all), all.len() as u64);
        let bundled = |(doc, at): (&LayerDoc, u64)| {
            let bundle = Some(Bundle { digest, size, at });
            LayerDoc { bundle, ..doc.clone() }
        };
        Ok((docs.iter().zip(starts).map(bundled).collect(), all))
    }
}

/// The bytes of a summary.
pub(super) fn pack(docs: &[LayerDoc]) -> Result<Vec<u8>> {
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
    let most = (bytes.len() as u64).saturating_mul(RATIO_MAX).saturating_add(CHUNK_SIZE).min(DOCUMENT_MAX);
    let mut decoder = zstd::Decoder::new(bytes).map_err(|error| corrupt(error.to_string()))?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(|error| corrupt(error.to_string()))?;
    decoder.take(most).read_to_end(&mut text).map_err(|error| corrupt(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| corrupt(error.to_string()))
}
