//! Summaries: the documents of many layers in one blob, and their catalogs in two objects.
//!
//! A node that sees an environment for the first time needs the documents of all of its layers, and the catalogs of those
//! that are used. A version names the summaries that have them: whoever publishes a version writes one for those of its
//! layers that are in no summary that it knows, so most versions name one to three, and a version of known layers writes
//! none. What is written anyway repeats little that is needed of others: each summary costs a node three requests, before
//! anything can be shown.
//!
//! **Bundles.** The catalogs of the interpreter and of what makes a venv of it are in one that most versions share, and
//! that is small: with it a start begins, while that of the packages is on its way.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::Read;
use std::sync::Arc;

use super::chunks::CHUNK_SIZE;
use super::object::{DOCUMENT_MAX, Object, ObjectFile, Room};
use super::publish::Trust;
use super::{Bundle, Index, LayerDoc, LayerKind, Store};
use crate::environment::{Digest, Summary};
use crate::error::{Error, Kind, Result};

/// As often as it is long a summary may be at most when it is unpacked; the digests in it compress to a half.
const RATIO_MAX: u64 = 64;
/// The logarithm of what the unpacker keeps at most, in bytes: what the level that summaries are written with uses.
const WINDOW_LOG_MAX: u32 = 23;

/// Catalogs one after the other, by their digest.
pub(super) type Bundles = HashMap<Digest, Vec<u8>>;

impl From<&Summary> for Object {
    fn from(summary: &Summary) -> Object {
        Object { room: Room::Blobs, digest: summary.blob, size: summary.size }
    }
}

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
            if !self.has_object(&Object::from(&summary), trust) {
                known.retain(|(_, other)| *other != summary);
            }
        }
        let have: HashSet<Digest> = known.iter().map(|(layer, _)| *layer).collect();
        let missing: Vec<Digest> = layers.iter().filter(|layer| !have.contains(layer)).copied().collect();
        if !missing.is_empty() {
            let repeated = repeated(&known, &index.layers(self, &missing)?, &docs);
            known.retain(|(_, summary)| !repeated.contains(summary));
            let have: HashSet<Digest> = known.iter().map(|(layer, _)| *layer).collect();
            // In the order of `layers`, as who makes the summary again has them.
            let told: Vec<Digest> = layers.iter().filter(|layer| !have.contains(layer)).copied().collect();
            let docs = self.bundle(&index.layers(self, &told)?, trust)?;
            let bytes = pack(&docs)?;
            let summary = Summary { blob: Digest::of(&bytes), size: bytes.len() as u64 };
            self.ensure_bytes(Room::Blobs, &bytes, &summary.blob, trust)?;
            missing.iter().try_for_each(|layer| index.forget_summary(layer))?;
            // What is repeated is still known from where it was.
            let new = docs.into_iter().filter(|doc| missing.contains(&doc.digest)).collect();
            index.learn(&summary, new)?;
            known.extend(told.into_iter().map(|layer| (layer, summary)));
        }
        let summaries: BTreeSet<Summary> = known.into_iter().map(|(_, summary)| summary).collect();
        Ok(summaries.into_iter().collect())
    }

    /// Puts the catalogs of `docs` into bundles; returns the documents, which say where.
    fn bundle(&self, docs: &[Arc<LayerDoc>], trust: Trust) -> Result<Vec<LayerDoc>> {
        let docs: Vec<LayerDoc> = docs.iter().map(|doc| LayerDoc::clone(doc)).collect();
        let (docs, bundles) = self.bundled(&docs)?;
        for (digest, all) in bundles {
            self.ensure_bytes(Room::Catalogs, &all, &digest, trust)?;
        }
        Ok(docs)
    }

    /// The documents, which say where in which bundle their catalogs are; and the bundles.
    pub(super) fn bundled(&self, docs: &[LayerDoc]) -> Result<(Vec<LayerDoc>, Bundles)> {
        let mut all = [Vec::new(), Vec::new()];
        let mut starts = Vec::with_capacity(docs.len());
        for doc in docs {
            let all = &mut all[usize::from(is_package(doc))];
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
        let digests = all.each_ref().map(|all| Digest::of(all));
        let bundled = |(doc, at): (&LayerDoc, u64)| {
            let which = usize::from(is_package(doc));
            let bundle = Some(Bundle { digest: digests[which], size: all[which].len() as u64, at });
            LayerDoc { bundle, ..doc.clone() }
        };
        let docs = docs.iter().zip(starts).map(bundled).collect();
        Ok((docs, digests.into_iter().zip(all).filter(|(_, all)| !all.is_empty()).collect()))
    }
}

fn is_package(doc: &LayerDoc) -> bool {
    doc.meta.kind == LayerKind::Wheel
}

/// Of the summaries in `known`, those of which so little is needed that it is told again beside `new` documents: together
/// their catalogs of packages are not more than the new ones. `docs` are the documents of what is known.
fn repeated(known: &[(Digest, Summary)], new: &[Arc<LayerDoc>], docs: &[Arc<LayerDoc>]) -> BTreeSet<Summary> {
    // The bundle of the others is there already.
    let size = |doc: &Arc<LayerDoc>| if is_package(doc) { doc.catalog_size } else { 0 };
    let sizes: HashMap<Digest, u64> = docs.iter().map(|doc| (doc.digest, size(doc))).collect();
    let mut needed: BTreeMap<Summary, u64> = BTreeMap::new();
    for (layer, summary) in known {
        *needed.entry(*summary).or_default() += sizes.get(layer).copied().unwrap_or_default();
    }
    let mut needed: Vec<(u64, Summary)> = needed.into_iter().map(|(summary, size)| (size, summary)).collect();
    needed.sort_unstable();
    let mut room: u64 = new.iter().map(size).sum();
    let fits = |(size, _): &(u64, Summary)| {
        let left = room.checked_sub(*size);
        room = left.unwrap_or(0);
        left.is_some()
    };
    needed.into_iter().take_while(fits).map(|(_, summary)| summary).collect()
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
