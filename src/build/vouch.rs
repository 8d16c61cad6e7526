//! What a builder that signs may put its name to.
//!
//! A store says which layer a package is (`keys/`), what is in it (`layers/`) and which interpreters there are, and whoever
//! can write to it can say something else. A signature on that would make it true. So a builder with a key takes a layer
//! only when it has made it itself, or when a version that a trusted key has signed has it; and it takes the layer's
//! document from there, too.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use uv_pep440::Version;

use super::Context;
use crate::environment::lock::Package;
use crate::environment::{Digest, Summary};
use crate::error::{Error, Kind, Result};
use crate::store::{LayerDoc, StoredInterpreter, documents};

/// Sees to it that the index knows those documents of `layers` that may be signed. Does nothing without a key.
///
/// # Errors
/// [`Kind::Rejected`] when there is a layer that nobody vouches for.
pub(super) fn layers(context: &Context<'_>, layers: &[Digest]) -> Result<()> {
    context.index.note_made(context.store)?;
    if context.store.signer().is_none() {
        return Ok(());
    }
    let mut vouched = context.index.made(layers)?;
    let missing: HashSet<Digest> = layers.iter().filter(|layer| !vouched.contains_key(layer)).copied().collect();
    if !missing.is_empty() {
        vouched.extend(signed(context, missing)?);
    }
    let strange: Vec<&Digest> = layers.iter().filter(|layer| !vouched.contains_key(layer)).collect();
    if !strange.is_empty() {
        return Err(refused(context, &strange));
    }
    context.index.correct(vouched.into_values().collect())
}

/// The interpreter, before anything of it is started.
pub(super) fn interpreter(context: &Context<'_>, interpreter: &StoredInterpreter) -> Result<()> {
    layers(context, &[interpreter.layer, interpreter.scaffold])?;
    let name = interpreter.python.executable.strip_prefix("bin/").unwrap_or_default();
    let is_plain =
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c)) && name != "..";
    if context.store.signer().is_some() && !is_plain {
        let what = format!("interpreter {} names {:?} as its program", interpreter.name, interpreter.python.executable);
        return Err(Error::new(Kind::Rejected, what).hint("add the Python itself here: `envfabric python add PATH`"));
    }
    Ok(())
}

/// The layers of `packages`, in the same order: each is of the package that it is said to be. Somebody might have let the
/// key of one stand for a layer of another, or for an older one, which was signed once.
pub(super) fn packages(context: &Context<'_>, packages: &[&Package], digests: &[Digest], abi: &str) -> Result<()> {
    if context.store.signer().is_none() {
        return Ok(());
    }
    layers(context, digests)?;
    for (package, doc) in packages.iter().zip(context.index.layers(context.store, digests)?) {
        let same = |version: &str| match (Version::from_str(version), Version::from_str(&doc.meta.version)) {
            (Ok(wanted), Ok(there)) => wanted == there,
            _ => version == doc.meta.version,
        };
        let is_it = doc.meta.name == package.name && package.version.as_deref().is_none_or(same);
        if !is_it || doc.meta.abi != abi {
            let what = format!(
                "the store says that {} is layer {}, which is {} {} for {}",
                package.name,
                doc.digest.short(),
                doc.meta.name,
                doc.meta.version,
                doc.meta.abi
            );
            return Err(Error::new(Kind::Rejected, what).hint("make it anew here with --rebuild"));
        }
    }
    Ok(())
}

/// The summaries of `all`, which are about to be signed and tell nothing of them but what may be.
pub(super) fn summaries(context: &Context<'_>, all: &[Digest], repair: bool) -> Result<Vec<Summary>> {
    layers(context, all)?;
    let found = context.store.ensure_summaries(context.index, all, repair)?;
    if context.store.signer().is_none() || are_right(context, all, &found)? {
        return Ok(found);
    }
    all.iter().try_for_each(|layer| context.index.forget_summary(layer))?;
    let found = context.store.ensure_summaries(context.index, all, repair)?;
    match are_right(context, all, &found)? {
        true => Ok(found),
        false => Err(Error::new(Kind::Corrupt, "what was just written into the store is not what is there")
            .hint("somebody else writes to it: run `envfabric fsck`, then the command again")),
    }
}

fn are_right(context: &Context<'_>, all: &[Digest], summaries: &[Summary]) -> Result<bool> {
    let docs = context.index.layers(context.store, all)?;
    let right: HashMap<Digest, LayerDoc> = docs.iter().map(|doc| (doc.digest, unbundled(doc))).collect();
    let mut told = HashSet::new();
    for summary in summaries {
        for doc in documents(&context.store.read_blob(&summary.blob)?)? {
            match right.get(&doc.digest) {
                Some(right) if *right != unbundled(&doc) => return Ok(false),
                _ => told.insert(doc.digest),
            };
        }
    }
    Ok(all.iter().all(|layer| told.contains(layer)))
}

/// A document but for where its catalog lies together with others, which whoever reads it compares.
fn unbundled(doc: &LayerDoc) -> LayerDoc {
    LayerDoc { bundle: None, ..doc.clone() }
}

/// The documents of those of `missing` that current versions have that a trusted key has signed.
fn signed(context: &Context<'_>, mut missing: HashSet<Digest>) -> Result<HashMap<Digest, LayerDoc>> {
    let mut found = HashMap::new();
    if context.store.trust().is_none() {
        return Ok(found);
    }
    let store = context.store;
    let versions =
        store.each_environment("", |name, pointer| store.version(name, pointer.version.unwrap_or_default()))?;
    for version in versions.into_iter().filter_map(|(_, version)| version.ok()) {
        let own: HashSet<Digest> =
            [version.interpreter.layer, version.scaffold].into_iter().chain(version.layers.iter().copied()).collect();
        if missing.is_disjoint(&own) {
            continue;
        }
        for summary in &version.summaries {
            // One that is damaged tells nothing; another version may have the layer, too.
            let docs = store.read_blob(&summary.blob).and_then(|bytes| documents(&bytes)).unwrap_or_default();
            for doc in docs.into_iter().filter(|doc| own.contains(&doc.digest)) {
                if missing.remove(&doc.digest) {
                    found.insert(doc.digest, doc);
                }
            }
        }
        if missing.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn refused(context: &Context<'_>, strange: &[&Digest]) -> Error {
    let name = |layer: &&Digest| match context.index.layer(context.store, layer) {
        Ok(doc) => format!("{} {}", doc.meta.name, doc.meta.version),
        Err(_) => layer.short(),
    };
    let names = strange.iter().take(5).map(name).collect::<Vec<_>>().join(", ");
    let more = if strange.len() > 5 { format!(" and {} more", strange.len() - 5) } else { String::new() };
    let what = format!("it is not known who made {names}{more}, so it is not signed");
    Error::new(Kind::Rejected, what).hint(
        "make packages anew here with --rebuild, and Pythons with `envfabric python add PATH`; or name the keys of those \
         who have made them with --trust-key",
    )
}
