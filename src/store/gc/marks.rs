//! What is needed: everything that follows from the versions, and from what is too young to be judged.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::SystemTime;

use super::super::trash::{Below, Trashed, modified};
use super::super::{
    LayerDoc, Pointer, Store, StoredInterpreter, documents, in_parallel, leases::Leased, list_names, read_json,
};
use crate::environment::{Digest, EnvName, Summary, Version};
use crate::error::{Error, Kind, Result};

/// What a version document names.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Named {
    pub(super) layers: Vec<Digest>,
    summaries: Vec<Digest>,
    blobs: Vec<Digest>,
}

impl Named {
    fn by(version: &Version) -> Named {
        Named {
            layers: [version.interpreter.layer, version.scaffold].iter().chain(&version.layers).copied().collect(),
            summaries: version.summaries.iter().map(|summary| summary.blob).collect(),
            blobs: version.lock.iter().chain(&version.pyproject).map(|document| document.blob).collect(),
        }
    }
}

/// What was read of immutable documents, which need not be read again.
#[derive(Debug, Default)]
pub(in super::super) struct Read {
    versions: HashMap<(EnvName, u64), Named>,
    layers: HashMap<Digest, Vec<Below>>,
    summaries: HashMap<Digest, Vec<Below>>,
    interpreters: HashMap<String, [Digest; 2]>,
}

/// An environment as the store has it.
#[derive(Debug)]
pub(in super::super) struct Environment {
    pub(super) name: EnvName,
    pub(super) pointer: Result<Option<Pointer>>,
    /// Versions in their place.
    pub(super) there: BTreeSet<u64>,
    /// Versions in the trash, and not in their place.
    pub(super) trashed: BTreeSet<u64>,
}

/// What is needed, as paths below the store.
#[derive(Debug, Default)]
pub(in super::super) struct Marks {
    pub(in super::super) needed: HashSet<Below>,
    /// Layers that are needed.
    pub(super) layers: HashSet<Digest>,
    /// Why it is not known what is needed. Then nothing may be taken.
    pub(in super::super) unknown: Vec<String>,
}

impl Store {
    /// All environments, those of which only something in the trash is left too.
    pub(in super::super) fn all_environments(&self, trash: &[Trashed]) -> Result<Vec<Environment>> {
        let mut trashed: BTreeMap<EnvName, BTreeSet<u64>> = BTreeMap::new();
        for (name, number) in trash.iter().filter_map(|trashed| version_of(&trashed.below)) {
            trashed.entry(name).or_default().insert(number);
        }
        let mut names: BTreeSet<EnvName> = trashed.keys().cloned().collect();
        for workflow in self.workflows()? {
            for node in self.nodes(&workflow)? {
                names.insert(EnvName::new(&workflow, &node)?);
            }
        }
        let names: Vec<EnvName> = names.into_iter().collect();
        let asked = in_parallel(&names, |name| Ok((self.version_numbers(name)?, self.pointer(name))));
        let found = names.into_iter().zip(asked).map(|(name, asked): (EnvName, Result<_>)| {
            let (there, pointer) = asked?;
            let there: BTreeSet<u64> = there.into_iter().collect();
            let trashed = trashed.remove(&name).unwrap_or_default().difference(&there).copied().collect();
            Ok(Environment { name, pointer, there, trashed })
        });
        found.collect()
    }

    /// What is needed by the versions of `environments`, and by what is younger than `young_since`.
    pub(in super::super) fn marks(
        &self,
        environments: &[Environment],
        young_since: SystemTime,
        read: &mut Read,
    ) -> Result<Marks> {
        let mut marks = Marks::default();
        let versions: Vec<(EnvName, u64)> = environments
            .iter()
            .flat_map(|env| env.there.iter().chain(&env.trashed).map(|number| (env.name.clone(), *number)))
            .collect();
        let new: Vec<&(EnvName, u64)> = versions.iter().filter(|key| !read.versions.contains_key(key)).collect();
        let docs = in_parallel(&new, |(name, number)| self.version(name, *number).map(|v| Named::by(&v)));
        for (key, doc) in new.into_iter().cloned().zip(docs) {
            match doc {
                Ok(named) => drop(read.versions.insert(key, named)),
                // Ended by another collector since it was listed.
                Err(error) if error.is_not_found() => {}
                Err(error) => marks.unknown.push(error.chain()),
            }
        }
        let mut summaries = BTreeSet::new();
        for named in versions.iter().filter_map(|key| read.versions.get(key)) {
            marks.layers.extend(&named.layers);
            summaries.extend(named.summaries.iter().copied());
            marks.needed.extend(named.blobs.iter().map(|blob| self.below(&self.blob_path(blob))));
        }
        self.mark_interpreters(&mut marks, young_since, read)?;
        // A layer that nobody needs yet, of a build that is under way.
        let others: Vec<Digest> = self.listed_layers()?.into_iter().filter(|l| !marks.layers.contains(l)).collect();
        let times = in_parallel(&others, |layer| modified(&self.layer_path(layer)));
        for (layer, time) in others.into_iter().zip(times) {
            if time?.is_some_and(|time| time >= young_since) {
                marks.layers.insert(layer);
            }
        }
        self.mark_layers(&mut marks, read);
        self.mark_summaries(&mut marks, &summaries, read);
        Ok(marks)
    }

    /// Layers whose documents are in their place.
    pub(in super::super) fn listed_layers(&self) -> Result<Vec<Digest>> {
        self.listed("layers")
    }

    /// Keys that are in their place.
    pub(in super::super) fn listed_keys(&self) -> Result<Vec<Digest>> {
        self.listed("keys")
    }

    fn listed(&self, room: &str) -> Result<Vec<Digest>> {
        let names = list_names(&self.root.join(room))?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".json")?.parse::<Digest>().ok()).collect())
    }

    /// The summaries that versions name; of those versions that can be read.
    pub(in super::super) fn named_summaries(&self) -> Result<BTreeSet<Summary>> {
        let environments = self.all_environments(&[])?;
        let versions: Vec<_> =
            environments.iter().flat_map(|env| env.there.iter().map(|number| (&env.name, *number))).collect();
        let read = in_parallel(&versions, |(name, number)| self.version(name, *number).ok());
        Ok(read.into_iter().flatten().flat_map(|version| version.summaries).collect())
    }

    /// Interpreters that are young, or whose layers a version needs, are offered on.
    fn mark_interpreters(&self, marks: &mut Marks, young_since: SystemTime, read: &mut Read) -> Result<()> {
        let dir = self.root.join("interpreters");
        for name in list_names(&dir)?.into_iter().filter(|name| name.ends_with(".json")) {
            let path = dir.join(&name);
            let layers = match read.interpreters.get(&name) {
                Some(layers) => *layers,
                None => match read_json::<StoredInterpreter>(&path) {
                    Ok(interpreter) => [interpreter.layer, interpreter.scaffold],
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => {
                        marks.unknown.push(error.chain());
                        continue;
                    }
                },
            };
            read.interpreters.insert(name, layers);
            let is_young = modified(&path)?.is_some_and(|time| time >= young_since);
            if is_young || marks.layers.contains(&layers[0]) {
                marks.needed.insert(self.below(&path));
                marks.layers.extend(layers);
            }
        }
        Ok(())
    }

    /// Adds the objects of `marks.layers`.
    pub(super) fn mark_layers(&self, marks: &mut Marks, read: &mut Read) {
        let new: Vec<Digest> = marks.layers.iter().filter(|layer| !read.layers.contains_key(layer)).copied().collect();
        let docs = in_parallel(&new, |layer| self.layer(layer).map(|doc| self.objects_of(&doc)));
        for (layer, objects) in new.into_iter().zip(docs) {
            match objects {
                Ok(objects) => drop(read.layers.insert(layer, objects)),
                Err(error) => marks.unknown.push(error.chain()),
            }
        }
        for layer in &marks.layers {
            marks.needed.insert(self.below(&self.layer_path(layer)));
            marks.needed.extend(read.layers.get(layer).into_iter().flatten().cloned());
        }
    }

    /// The objects that the documents of `layers` name. A document that is gone, or damaged, can be relied on by nobody.
    pub(super) fn named_by(&self, layers: impl Iterator<Item = Digest>, read: &mut Read) -> Result<HashSet<Below>> {
        let layers: BTreeSet<Digest> = layers.collect();
        let new: Vec<&Digest> = layers.iter().filter(|layer| !read.layers.contains_key(layer)).collect();
        for (layer, doc) in new.iter().zip(in_parallel(&new, |layer| self.layer(layer))) {
            match doc {
                Ok(doc) => drop(read.layers.insert(**layer, self.objects_of(&doc))),
                Err(error) if error.is_not_found() || error.kind() == Kind::Corrupt => {}
                Err(error) => return Err(error),
            }
        }
        Ok(layers.iter().filter_map(|layer| read.layers.get(layer)).flatten().cloned().collect())
    }

    fn mark_summaries(&self, marks: &mut Marks, summaries: &BTreeSet<Digest>, read: &mut Read) {
        for summary in summaries {
            marks.needed.insert(self.below(&self.blob_path(summary)));
            if !read.summaries.contains_key(summary) {
                match self.read_blob(summary).and_then(|bytes| documents(&bytes)) {
                    Ok(docs) => {
                        let bundles: BTreeSet<_> = docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
                        let bundles = bundles.iter().map(|bundle| self.below(&self.object_path(bundle))).collect();
                        read.summaries.insert(*summary, bundles);
                    }
                    Err(error) => {
                        let what = format!("the summary {} of some versions cannot be read", summary.short());
                        marks.unknown.push(error.context(what).chain());
                    }
                }
            }
            marks.needed.extend(read.summaries.get(summary).into_iter().flatten().cloned());
        }
    }

    /// The objects that a layer's document names, as paths.
    pub(in super::super) fn objects_of(&self, doc: &LayerDoc) -> Vec<Below> {
        let blobs = doc.blobs.iter().map(|blob| self.blob_path(blob));
        let others = [doc.pack.map(|pack| self.pack_path(&pack)), Some(self.catalog_path(&doc.catalog))];
        blobs.chain(others.into_iter().flatten()).map(|path| self.below(&path)).collect()
    }

    /// Versions that somebody has a lease on.
    pub(super) fn leased(&self, fresh_since: SystemTime, unknown: &mut Vec<String>) -> Result<HashSet<(EnvName, u64)>> {
        let mut leased = HashSet::new();
        for found in self.leases()?.into_iter().filter(|found| found.renewed >= fresh_since) {
            match found.doc {
                Ok(doc) => {
                    leased
                        .extend(doc.versions.into_iter().map(|Leased { environment, version }| (environment, version)));
                }
                Err(error) => unknown.push(error.chain()),
            }
        }
        Ok(leased)
    }
}

/// The version whose document is called `below`.
pub(super) fn version_of(below: &Below) -> Option<(EnvName, u64)> {
    let parts: Vec<&str> = below.path().iter().map(|part| part.to_str()).collect::<Option<_>>()?;
    let ["envs", workflow, node, "versions", file] = parts[..] else { return None };
    Some((EnvName::new(workflow, node).ok()?, file.strip_suffix(".json")?.parse().ok()?))
}

/// The error of a collector that must not go on.
pub(super) fn not_known(unknown: &[String]) -> Error {
    let mut told: Vec<&str> = unknown.iter().map(String::as_str).collect();
    told.sort_unstable();
    told.dedup();
    let more = told.len().saturating_sub(20);
    told.truncate(20);
    let mut detail = told.join("\n");
    if more > 0 {
        detail.push_str(&format!("\nand {more} more"));
    }
    Error::new(Kind::Corrupt, "it cannot be told what is needed, so nothing was removed")
        .detail(detail)
        .hint("run `envfabric fsck --repair`, then collect again")
}
