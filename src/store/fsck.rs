//! Checks every object of a store against its name, and every reference against what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;

use super::environments::which;
use super::layer_writer::PACK_MAGIC;
use super::object::{Object, ObjectFile, Room};
use super::trash::Below;
use super::{Node, Place, Store, StoredInterpreter, documents, list_names, read_json};
use crate::environment::{Digest, EnvName, Summary};
use crate::error::{Kind, Result};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing is wrong; worth knowing.
    Note,
    /// An environment is damaged, or would be.
    Error,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// The object: a path below the store, or `workflow/node@3`.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// Versions (`workflow/node@3`) that need it, at most 20.
    pub affects: Vec<String>,
}

/// What a check of a store found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    /// Layers checked.
    pub layers: usize,
    /// Blobs, packs and catalogs read and hashed.
    pub objects: usize,
    /// Bytes read and hashed.
    pub bytes: u64,
    /// Version documents checked.
    pub versions: usize,
    /// Everything found, worst first.
    pub findings: Vec<Finding>,
    /// The same for a repair.
    #[serde(skip)]
    pub(super) lost: Lost,
}

/// What is to be repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// Objects that are there and not what their name says.
    pub(super) objects: Vec<Below>,
    /// Layers that are missing or lack something, and that a version or an interpreter needs, or that are there.
    pub(super) layers: BTreeSet<Digest>,
    /// Damaged keys and interpreters.
    pub(super) documents: Vec<Below>,
    /// Damaged versions.
    pub(super) versions: Vec<(EnvName, u64)>,
    /// Versions whose summaries lack something.
    pub(super) versions_with_summaries: Vec<(EnvName, u64)>,
}

impl FsckReport {
    /// True when no environment is damaged.
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|f| f.severity == Severity::Note)
    }

    /// Layers that can only be had back by building them again.
    pub fn damaged_layers(&self) -> &BTreeSet<Digest> {
        &self.lost.layers
    }
}

/// What is wrong with a layer: objects and problems.
type LayerState = Vec<(String, String)>;

impl Store {
    /// Checks the whole store. `progress` is told `(done, total)` objects, from several threads.
    pub fn fsck(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FsckReport> {
        self.fsck_at(None, progress)
    }

    /// The same, reading at most `rate` bytes a second, if there is one.
    pub fn fsck_at(&self, rate: Option<u64>, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<FsckReport> {
        let mut report = FsckReport::default();
        let objects = self.check_objects(&mut report, &Pace::new(rate), progress)?;
        let layers = self.check_layers(&mut report, &objects)?;
        self.check_keys_and_interpreters(&mut report, &layers)?;
        self.check_environments(&mut report, &layers, &objects)?;
        self.check_owners(&mut report)?;
        self.check_signatures(&mut report)?;
        let left = list_names(&self.tmp())?.len();
        if left > 0 {
            let problem = format!("{left} unfinished files (of running or killed commands)");
            report.findings.push(note("tmp".into(), problem));
        }
        let trashed = self.trashed()?;
        if !trashed.is_empty() {
            let problem = format!("{} files that were collected and can still be had back", trashed.len());
            report.findings.push(note("trash".into(), problem));
        }
        report.findings.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.cmp(b)));
        Ok(report)
    }

    /// Hashes every blob, pack and catalog; returns those that are sound, by digest, with their length.
    fn check_objects(
        &self,
        report: &mut FsckReport,
        pace: &Pace,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<BTreeMap<(&'static str, Digest), u64>> {
        let mut files: Vec<(Room, PathBuf)> = Vec::new();
        for room in Room::ALL {
            let dir = self.root.join(room.name());
            files.extend(list_names(&dir)?.into_iter().map(|name| (room, dir.join(name))));
        }
        // What lies in the trash alone is still found by who needs it.
        for (room, path) in self.trashed_places()? {
            if let Some(room) = Room::ALL.into_iter().find(|r| r.name() == room).filter(|_| !path.exists()) {
                files.push((room, path));
            }
        }
        let total = files.len();
        let done = std::sync::atomic::AtomicUsize::new(0);
        let checked: Vec<_> = files
            .par_iter()
            .map(|(room, path)| {
                let result = self.check_object(*room, path, pace);
                progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, total);
                (*room, path, result)
            })
            .collect();
        let mut sound = BTreeMap::new();
        for (room, path, result) in checked {
            match result {
                Ok((digest, size)) => {
                    report.objects += 1;
                    report.bytes += size;
                    sound.insert((room.name(), digest), size);
                }
                Err(problem) => {
                    report.lost.objects.push(self.below(path));
                    report.findings.push(error(self.relative(path), problem));
                }
            }
        }
        Ok(sound)
    }

    fn check_layers(
        &self,
        report: &mut FsckReport,
        objects: &BTreeMap<(&'static str, Digest), u64>,
    ) -> Result<BTreeMap<Digest, LayerState>> {
        let mut digests = BTreeSet::new();
        for name in list_names(&self.root.join("layers"))? {
            match name.strip_suffix(".json").and_then(|s| s.parse::<Digest>().ok()) {
                Some(digest) => {
                    digests.insert(digest);
                }
                None => report.findings.push(note(format!("layers/{name}"), "is not ours".into())),
            }
        }
        let trashed = self.trashed_places()?.into_iter().filter(|(room, _)| room == "layers");
        digests.extend(trashed.filter_map(|(_, path)| path.file_stem()?.to_str()?.parse::<Digest>().ok()));
        // A layer without a document was never finished, or has lost it: whoever names it will be told so.
        let states: BTreeMap<Digest, LayerState> =
            digests.into_par_iter().filter_map(|digest| Some((digest, self.check_layer(&digest, objects)?))).collect();
        report.layers = states.len();
        report.lost.layers.extend(states.iter().filter(|(_, state)| !state.is_empty()).map(|(layer, _)| *layer));
        Ok(states)
    }

    /// None when there is no document.
    fn check_layer(&self, digest: &Digest, objects: &BTreeMap<(&'static str, Digest), u64>) -> Option<LayerState> {
        let mut problems = Vec::new();
        let doc_path = self.relative(&self.layer_path(digest));
        let doc = match self.layer(digest) {
            Ok(doc) => doc,
            Err(error) if error.is_not_found() => return None,
            Err(error) => return Some(vec![(doc_path, error.chain())]),
        };
        let catalog_path = self.relative(&self.catalog_path(&doc.catalog));
        if objects.get(&("catalogs", doc.catalog)) != Some(&doc.catalog_size) {
            problems.push((catalog_path.clone(), "is missing or damaged".into()));
        }
        match self.catalog_of(&doc).and_then(|c| c.verify().map(|rows| (c.pack().map(|pack| pack.digest), rows))) {
            Err(error) => problems.push((catalog_path, error.chain())),
            Ok((pack, rows)) => {
                let pack_size = pack.map(|p| (p, objects.get(&("packs", p)).copied()));
                if let Some((pack, None)) = pack_size {
                    problems.push((self.relative(&self.pack_path(&pack)), "is missing or damaged".into()));
                }
                let mut missing = BTreeSet::new();
                for row in rows {
                    let Node::File { size, digest, place, .. } = row.node else { continue };
                    match place {
                        Place::Blob if objects.get(&("blobs", digest)) != Some(&size) => {
                            missing.insert(digest);
                        }
                        Place::Pack { offset } => {
                            if let Some((_, Some(length))) = pack_size
                                && offset.checked_add(size).is_none_or(|end| end > length)
                            {
                                problems.push((catalog_path.clone(), format!("row {} lies beyond its pack", row.id)));
                            }
                        }
                        Place::Blob => {}
                    }
                }
                for blob in missing {
                    problems.push((self.relative(&self.blob_path(&blob)), "is missing or damaged".into()));
                }
                if pack != doc.pack || pack_size.is_some_and(|(_, size)| size != Some(doc.pack_size)) {
                    problems.push((doc_path, "names another pack than the catalog".into()));
                }
            }
        }
        Some(problems)
    }

    fn check_keys_and_interpreters(
        &self,
        report: &mut FsckReport,
        layers: &BTreeMap<Digest, LayerState>,
    ) -> Result<()> {
        for name in list_names(&self.root.join("keys"))? {
            let object = format!("keys/{name}");
            let Some(key) = name.strip_suffix(".json").and_then(|s| s.parse::<Digest>().ok()) else {
                report.findings.push(note(object, "is not ours".into()));
                continue;
            };
            match self.layer_of_key(&key) {
                Ok(Some(layer)) if layers.contains_key(&layer) => {}
                // Nothing needs it: the next build of that package makes the layer anew.
                Ok(_) => report.findings.push(note(object, "stands for a layer that is not there".into())),
                Err(e) => {
                    report.lost.documents.push(Below::new(&object));
                    report.findings.push(error(object, e.chain()));
                }
            }
        }
        let interpreters = self.root.join("interpreters");
        for name in list_names(&interpreters)? {
            let object = format!("interpreters/{name}");
            match read_json::<StoredInterpreter>(&interpreters.join(&name)) {
                Ok(interpreter) => {
                    for layer in [interpreter.layer, interpreter.scaffold] {
                        if !layers.contains_key(&layer) {
                            report.lost.layers.insert(layer);
                            report.findings.push(error(object.clone(), format!("layer {layer} is not there")));
                        }
                    }
                }
                Err(e) => {
                    report.lost.documents.push(Below::new(&object));
                    report.findings.push(error(object, e.chain()));
                }
            }
        }
        Ok(())
    }

    fn check_environments(
        &self,
        report: &mut FsckReport,
        layers: &BTreeMap<Digest, LayerState>,
        objects: &BTreeMap<(&'static str, Digest), u64>,
    ) -> Result<()> {
        // Problem -> versions that have it; a damaged blob is told once, with everything that needs it.
        let mut problems: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
        for workflow in self.workflows()? {
            for node in self.nodes(&workflow)? {
                let name = EnvName::new(&workflow, &node)?;
                let numbers = self.version_numbers(&name)?;
                match self.pointer(&name) {
                    Ok(Some(pointer)) => {
                        let is_missing = |number: &u64| {
                            !numbers.contains(number) && self.version(&name, *number).is_err_and(|e| e.is_not_found())
                        };
                        if let Some(number) = pointer.version.filter(is_missing) {
                            report.findings.push(error(
                                name.to_string(),
                                format!(
                                    "current version {number} is missing: create it again, or name another: \
                                         `envfabric rollback {name} N`"
                                ),
                            ));
                        }
                    }
                    Ok(None) => report.findings.push(note(name.to_string(), "was never finished".into())),
                    Err(e) if e.kind() == Kind::Corrupt => {
                        let all: Vec<String> = numbers.iter().map(u64::to_string).collect();
                        let what = format!("{}: {} (there are {})", e.chain(), which(&name), all.join(", "));
                        report.findings.push(error(name.to_string(), what));
                    }
                    Err(e) => report.findings.push(error(name.to_string(), e.chain())),
                }
                for number in numbers {
                    report.versions += 1;
                    let object = format!("{name}@{number}");
                    let version = match self.version(&name, number) {
                        Ok(version) => version,
                        Err(e) if e.kind() == Kind::Unsupported => {
                            report.findings.push(note(object, e.chain()));
                            continue;
                        }
                        Err(e) => {
                            report.lost.versions.push((name.clone(), number));
                            report.findings.push(error(object, e.chain()));
                            continue;
                        }
                    };
                    for layer in version.layers.iter().chain([&version.interpreter.layer, &version.scaffold]) {
                        match layers.get(layer) {
                            None => {
                                report.lost.layers.insert(*layer);
                                let missing = (format!("layer {layer}"), "is not in the store".to_string());
                                problems.entry(missing).or_default().push(object.clone());
                            }
                            Some(state) => {
                                for problem in state {
                                    problems.entry(problem.clone()).or_default().push(object.clone());
                                }
                            }
                        }
                    }
                    for summary in &version.summaries {
                        if let Some(problem) = self.check_summary(summary, objects) {
                            report.lost.versions_with_summaries.push((name.clone(), number));
                            problems.entry(problem).or_default().push(object.clone());
                        }
                    }
                    for document in version.lock.iter().chain(&version.pyproject) {
                        if !objects.contains_key(&("blobs", document.blob)) {
                            let path = self.relative(&self.blob_path(&document.blob));
                            let problem = (path, format!("({}) is missing or damaged", document.name));
                            problems.entry(problem).or_default().push(object.clone());
                        }
                    }
                }
            }
        }
        // Layers that no version needs are checked too.
        for problem in layers.values().flatten() {
            problems.entry(problem.clone()).or_default();
        }
        for ((object, problem), mut affects) in problems {
            affects.truncate(20);
            report.findings.push(Finding { severity: Severity::Error, object, problem, affects });
        }
        Ok(())
    }

    fn check_object(&self, room: Room, path: &Path, pace: &Pace) -> Result<(Digest, u64), String> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let expected: Digest = name.parse().map_err(|_| "is not ours".to_string())?;
        let told = |e: crate::error::Error| e.chain();
        let object = ObjectFile::open_named(self, room, expected).map_err(told)?;
        if object.hash_paced(&|bytes| pace.wait(bytes)).map_err(told)? != expected {
            return Err("does not have the bytes of its name".into());
        }
        if room == Room::Packs && !object.read_chunks(0, 1).map_err(told)?.starts_with(PACK_MAGIC) {
            return Err("is not a pack".into());
        }
        Ok((expected, object.size()))
    }

    /// What is wrong with a summary or with the catalogs that it names: the object and the problem.
    fn check_summary(
        &self,
        summary: &Summary,
        objects: &BTreeMap<(&'static str, Digest), u64>,
    ) -> Option<(String, String)> {
        let path = self.relative(&self.blob_path(&summary.blob));
        if objects.get(&("blobs", summary.blob)) != Some(&summary.size) {
            return Some((path, "(a summary of layers) is missing or damaged".into()));
        }
        let docs = match self.read_blob(&summary.blob).and_then(|bytes| documents(&bytes)) {
            Ok(docs) => docs,
            Err(error) => return Some((path, error.chain())),
        };
        let mut bundles: BTreeSet<Object> = BTreeSet::new();
        bundles.extend(docs.iter().filter_map(|doc| doc.bundle.map(|bundle| bundle.object())));
        let missing = |bundle: &&Object| objects.get(&("catalogs", bundle.digest)) != Some(&bundle.size);
        let bundle = bundles.iter().find(missing)?;
        let path = self.relative(&self.object_path(bundle));
        Some((path, "(the catalogs of many layers) is missing or damaged".into()))
    }

    /// Rooms and places of what lies in the trash.
    fn trashed_places(&self) -> Result<Vec<(String, PathBuf)>> {
        let trashed = self.trashed()?.into_iter();
        Ok(trashed.map(|trashed| (trashed.below.room().to_string(), self.place(&trashed.below))).collect())
    }

    pub(super) fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}

/// Lets so many bytes a second be read, by all threads together.
struct Pace {
    rate: Option<u64>,
    /// When what was let through so far is paid for.
    paid: Mutex<Instant>,
}

impl Pace {
    fn new(rate: Option<u64>) -> Pace {
        Pace { rate: rate.filter(|rate| *rate > 0), paid: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` may be read.
    fn wait(&self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let begin = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            // What was not used is lost: no burst after a pause.
            let begin = (*paid).max(Instant::now());
            *paid = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
            begin
        };
        std::thread::sleep(begin.saturating_duration_since(Instant::now()));
    }
}

fn error(object: String, problem: String) -> Finding {
    Finding { severity: Severity::Error, object, problem, affects: Vec::new() }
}

fn note(object: String, problem: String) -> Finding {
    Finding { severity: Severity::Note, object, problem, affects: Vec::new() }
}
