//! Building again what a store has lost: layers from the locks of the versions that have them, interpreters from where
//! they were taken.
//!
//! A layer's digest covers every byte of its files, and building is deterministic, so what comes out is what was lost, or
//! has another digest and is told as such. What is in the store is only ever replaced by the bytes of its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::plan::Plan;
use super::scratch::Scratch;
use super::{Context, IndexOptions, Input, Request, Work, python, source};
use crate::environment::lock::Target;
use crate::environment::{Digest, Source, Version};
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::{LayerKind, StoredInterpreter};

/// What became of a damaged layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Repaired {
    /// It is as it was.
    Rebuilt,
    /// It was built again and has other files: a source distribution that depends on time or machine, or an origin that
    /// has changed. What is left of the old one was left as it is.
    Differs {
        /// What came out.
        layer: Digest,
    },
    /// It could not be built.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Builds the layers `damaged` again, for whatever reason they are.
///
/// # Errors
/// Only what concerns all of them, such as a store that cannot be read; the rest is told layer by layer.
pub fn repair(
    context: &Context<'_>,
    damaged: &BTreeSet<Digest>,
    index: &IndexOptions,
) -> Result<BTreeMap<Digest, Repaired>> {
    context.store.require_writable()?;
    let mut told: BTreeMap<Digest, Repaired> = BTreeMap::new();
    let mut interpreters = context.store.interpreters()?;
    // First, as wheels are compiled by them.
    for interpreter in interpreters.clone() {
        if damaged.contains(&interpreter.layer) || damaged.contains(&interpreter.scaffold) {
            let outcome = ingest_again(context, &interpreter);
            for layer in [interpreter.layer, interpreter.scaffold].into_iter().filter(|layer| damaged.contains(layer)) {
                let outcome = match &outcome {
                    Ok(made) if made.contains(&layer) => Repaired::Rebuilt,
                    Ok(made) => Repaired::Differs { layer: made[usize::from(layer == interpreter.scaffold)] },
                    Err(error) => Repaired::Failed { reason: error.chain() },
                };
                told.insert(layer, outcome);
            }
        }
    }
    interpreters = context.store.interpreters()?;
    for version in versions(context)? {
        let wanted: BTreeSet<Digest> = version
            .layers
            .iter()
            .filter(|layer| damaged.contains(layer) && !matches!(told.get(layer), Some(Repaired::Rebuilt)))
            .copied()
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let interpreter = interpreters.iter().find(|interpreter| interpreter.layer == version.interpreter.layer);
        let built = interpreter
            .ok_or_else(|| Error::new(Kind::NotFound, "its interpreter is not in the store any more"))
            .and_then(|interpreter| from_lock(context, &version, interpreter, &wanted, index));
        match built {
            Ok(built) => told.extend(built),
            Err(error) => {
                let reason = error.context(format!("{}@{}", version.environment, version.number)).chain();
                for layer in wanted {
                    told.entry(layer).or_insert_with(|| Repaired::Failed { reason: reason.clone() });
                }
            }
        }
    }
    for layer in damaged {
        let reason = "no version with a readable lock has it".to_string();
        told.entry(*layer).or_insert(Repaired::Failed { reason });
    }
    Ok(told)
}

/// All versions that can be read, newest first: what they were made from is the likeliest to be still there.
fn versions(context: &Context<'_>) -> Result<Vec<Version>> {
    let store = context.store;
    let mut found = Vec::new();
    for workflow in store.workflows()? {
        for node in store.nodes(&workflow)? {
            let name = crate::environment::EnvName::new(&workflow, &node)?;
            let numbers = store.version_numbers(&name)?;
            found.extend(numbers.into_iter().filter_map(|number| store.version(&name, number).ok()));
        }
    }
    found.sort_by_key(|version: &Version| std::cmp::Reverse(version.created));
    Ok(found)
}

/// The layers of `interpreter` and its scaffold, taken from its origin once more.
fn ingest_again(context: &Context<'_>, interpreter: &StoredInterpreter) -> Result<[Digest; 2]> {
    let origin = Path::new(&interpreter.origin);
    if !origin.is_file() {
        let what = format!("{} is not on this machine", origin.display());
        return Err(Error::new(Kind::NotFound, what).hint("repair on the machine that it was taken from"));
    }
    python::ingest_again(context, origin).map(|made| [made.layer, made.scaffold])
}

/// Those of `wanted` that the lock of `version` names, built again.
fn from_lock(
    context: &Context<'_>,
    version: &Version,
    interpreter: &StoredInterpreter,
    wanted: &BTreeSet<Digest>,
    index: &IndexOptions,
) -> Result<BTreeMap<Digest, Repaired>> {
    let document =
        version.lock.as_ref().ok_or_else(|| Error::new(Kind::NotFound, "it was made without a lock that was kept"))?;
    let place = Scratch::new(&context.scratch)?;
    for document in std::iter::once(document).chain(&version.pyproject) {
        // The name comes from the store, and may be anybody's.
        let name = if document.name == "uv.lock" || document.name == "pyproject.toml" {
            &document.name
        } else {
            "pylock.toml"
        };
        let path = place.path().join(name);
        fs::write(&path, context.store.read_blob(&document.blob)?).at("writing", &path)?;
    }
    let lock = if document.name == "uv.lock" { "uv.lock" } else { "pylock.toml" };
    let (extras, groups) = match &version.source {
        Source::Requirements { .. } => (vec![], vec![]),
        Source::Project { extras, groups, .. } | Source::Lock { extras, groups, .. } => {
            (extras.clone(), groups.clone())
        }
    };
    // With bytecode, unless what is left of the layers says otherwise; one version has either.
    let docs = wanted.iter().filter_map(|layer| context.store.layer(layer).ok());
    let bytecode = docs.into_iter().filter(|doc| doc.meta.kind == LayerKind::Wheel).all(|doc| doc.meta.bytecode);
    let request = Request {
        extras,
        groups,
        bytecode,
        rebuild: true,
        index: index.clone(),
        ..Request::new(version.environment.clone(), Input::Lock(place.path().join(lock)))
    };
    let opened = source::open(&request, |text| Plan::pylock(context, text))?;
    let executable = || python::runnable(context, interpreter);
    let scratch = || -> Result<PathBuf> { Ok(place.path().to_path_buf()) };
    let resolved = opened.resolve(context, &request, &executable, &scratch)?;
    let packages = resolved.lock.select(&interpreter.python, &resolved.choice)?;
    let libc = python::host_libc(&interpreter.python);
    let target = Target { platform: None, libc: &libc, bytecode };
    // A package is known by its key, or, where that is lost too, by what its layer's document says.
    let names: BTreeMap<(String, String), Digest> = wanted
        .iter()
        .filter_map(|layer| context.store.layer(layer).ok())
        .map(|doc| ((doc.meta.name, doc.meta.version), doc.digest))
        .collect();
    let lost = |package: &crate::environment::lock::Package| {
        let by_key = package.key(&interpreter.python, target);
        let by_key = by_key.and_then(|key| context.store.layer_of_key(&key).ok().flatten());
        by_key.filter(|layer| wanted.contains(layer)).or_else(|| {
            names
                .iter()
                .find(|((name, version), _)| package.name == *name && package.version.as_ref() == Some(version))
                .map(|(_, layer)| *layer)
        })
    };
    let chosen: Vec<_> = packages.iter().filter_map(|package| Some((*package, lost(package)?))).collect();
    if chosen.is_empty() {
        return Err(Error::new(Kind::NotFound, "its lock names none of them with files that can be fetched again"));
    }
    let work = Work { context, request: &request, interpreter, base: &resolved.base, index: &resolved.index };
    let only: Vec<_> = chosen.iter().map(|(package, _)| *package).collect();
    let made = work.install(&only, &executable()?, place.path())?;
    let outcome = |(layer, made): (Digest, Digest)| match layer == made {
        true => (layer, Repaired::Rebuilt),
        false => (layer, Repaired::Differs { layer: made }),
    };
    let lost = chosen.iter().map(|(_, layer)| *layer);
    Ok(lost.zip(made.iter().map(|doc| doc.digest)).map(outcome).collect())
}
