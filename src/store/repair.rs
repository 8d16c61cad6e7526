//! Repairing what can be repaired without building: damaged documents that nothing can be read from are put aside, and
//! summaries are made again of what they repeat.
//!
//! Nothing that can still be read in part is taken away: of a damaged object that a layer needs, only a second name is put
//! into `quarantine/`, and it is replaced when its bytes are known again. What nobody needs is moved there.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;

use super::gc::Read;
use super::object::{Object, ObjectFile, Room};
use super::publish::{self, Trust, make_dirs};
use super::trash::Below;
use super::{FsckReport, LayerDoc, Store, StoredInterpreter, disk, documents, read_json, summary};
use crate::environment::{Digest, EnvName, Summary, Version};
use crate::error::{IoContext, Kind, Result};

/// What [`Store::repair_documents`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PutAside {
    /// Files that were moved to the quarantine.
    pub moved: Vec<String>,
    /// Damaged files that stay, as somebody may still need what can be read of them, and have a name there too.
    pub copied: Vec<String>,
    /// Summaries, and objects that they name, that were made again.
    pub made_again: usize,
}

impl Store {
    /// Puts aside what `report` found damaged and nothing can be read from, and makes summaries again. Layers are for
    /// [`crate::build::repair`], which should go before.
    pub fn repair_documents(&self, report: &FsckReport) -> Result<PutAside> {
        self.require_writable()?;
        let mut done = PutAside::default();
        let aside = self.root.join("quarantine").join(publish::nonce()?);
        done.made_again = self.make_summaries_again(&report.lost.versions_with_summaries)?;
        for document in &report.lost.documents {
            let path = self.place(document);
            let is_damaged = |read: Result<()>| read.is_err_and(|error| error.kind() == Kind::Corrupt);
            let still = match document.room() {
                "interpreters" => is_damaged(read_json::<StoredInterpreter>(&path).map(drop)),
                _ => is_damaged(read_json::<super::KeyDoc>(&path).map(drop)),
            };
            if still {
                self.put_aside(document, &aside, &mut done)?;
            }
        }
        for (name, number) in &report.lost.versions {
            if self.version(name, *number).is_err_and(|error| error.kind() == Kind::Corrupt) {
                // Its number stays used. Where it is the first, and current without a pointer, there is one from now on.
                self.ensure_pointer_beyond(name, *number)?;
                self.put_aside(&self.below(&self.version_path(name, *number)), &aside, &mut done)?;
            }
        }
        // Everything that any layer names counts as needed.
        let environments = self.all_environments(&[])?;
        let marks = self.marks(&environments, SystemTime::UNIX_EPOCH, &mut Read::default())?;
        for object in &report.lost.objects {
            if !self.is_damaged_object(object) {
                continue;
            }
            match marks.unknown.is_empty() && !marks.needed.contains(object) {
                true => self.put_aside(object, &aside, &mut done)?,
                false => self.name_aside(object, &aside, &mut done)?,
            }
        }
        Ok(done)
    }

    /// Gives damaged objects of a report a second name in the quarantine, before they are replaced.
    pub fn keep_damaged(&self, report: &FsckReport) -> Result<PutAside> {
        let mut done = PutAside::default();
        let aside = self.root.join("quarantine").join(publish::nonce()?);
        for object in report.lost.objects.iter().filter(|object| self.is_damaged_object(object)) {
            self.name_aside(object, &aside, &mut done)?;
        }
        Ok(done)
    }

    fn is_damaged_object(&self, below: &Below) -> bool {
        let room = Room::ALL.into_iter().find(|room| room.name() == below.room());
        let digest = below.path().file_name().and_then(|name| name.to_str()?.parse::<Digest>().ok());
        let Some((room, digest)) = room.zip(digest) else { return false };
        match ObjectFile::open_named(self, room, digest).and_then(|object| object.hash()) {
            Ok(found) => found != digest,
            // A disk that does not answer just now says nothing about the bytes.
            Err(error) => error.kind() == Kind::Corrupt,
        }
    }

    fn put_aside(&self, below: &Below, aside: &std::path::Path, done: &mut PutAside) -> Result<()> {
        let (place, there) = self.aside(below, aside)?;
        match disk::rename(&place, &there) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => {
                other.at("putting aside", &place)?;
                done.moved.push(below.to_string());
                Ok(())
            }
        }
    }

    fn name_aside(&self, below: &Below, aside: &std::path::Path, done: &mut PutAside) -> Result<()> {
        let (place, there) = self.aside(below, aside)?;
        // Without second names nothing is kept of it, which loses nothing that anybody reads.
        if disk::link(&place, &there).is_ok() {
            done.copied.push(below.to_string());
        }
        Ok(())
    }

    fn aside(&self, below: &Below, aside: &std::path::Path) -> Result<(PathBuf, PathBuf)> {
        let there = aside.join(below.path());
        if let Some(parent) = there.parent() {
            make_dirs(parent)?;
        }
        Ok((self.place(below), there))
    }

    fn ensure_pointer_beyond(&self, name: &EnvName, number: u64) -> Result<()> {
        if self.pointer_sequences(name)?.is_empty() {
            self.point_again(name)?;
        }
        self.ensure_newest(name, number)
    }

    /// Makes summaries of `versions` again, and what they name, as far as that comes out as it was; returns how many.
    fn make_summaries_again(&self, versions: &[(EnvName, u64)]) -> Result<usize> {
        let mut made = 0;
        for (name, number) in versions {
            let Ok(version) = self.version(name, *number) else { continue };
            // One that cannot be made again is told by the next check.
            made += self.make_summaries_of(&version).unwrap_or(0);
        }
        Ok(made)
    }

    fn make_summaries_of(&self, version: &Version) -> Result<usize> {
        let mut made = 0;
        let mut covered: Vec<Digest> = Vec::new();
        let mut lost: Vec<&Summary> = Vec::new();
        for told in &version.summaries {
            match self.read_blob(&told.blob).and_then(|bytes| documents(&bytes)) {
                Err(_) => lost.push(told),
                Ok(docs) => {
                    covered.extend(docs.iter().map(|doc| doc.digest));
                    made += self.make_bundles_again(&docs)?;
                }
            }
        }
        // It has those layers of the version that made it which no other had.
        let [lost] = lost[..] else { return Ok(made) };
        let all = [version.interpreter.layer, version.scaffold].into_iter().chain(version.layers.iter().copied());
        let mut rest: Vec<Digest> = Vec::new();
        for layer in all.filter(|layer| !covered.contains(layer)) {
            if !rest.contains(&layer) {
                rest.push(layer);
            }
        }
        let docs = rest.iter().map(|layer| self.layer(layer)).collect::<Result<Vec<LayerDoc>>>()?;
        let (docs, bundles) = self.bundled(&docs)?;
        let bytes = summary::pack(&docs)?;
        if Digest::of(&bytes) != lost.blob {
            return Ok(made);
        }
        for (digest, bundle) in bundles {
            self.ensure_bytes(Room::Catalogs, &bundle, &digest, Trust::Nothing)?;
        }
        self.ensure_bytes(Room::Blobs, &bytes, &lost.blob, Trust::Nothing)?;
        Ok(made + 1)
    }

    /// The bundles that the documents of a summary name, of the catalogs that they repeat; returns how many were missing.
    fn make_bundles_again(&self, docs: &[LayerDoc]) -> Result<usize> {
        let named: HashSet<Object> = docs.iter().filter_map(|doc| Some(doc.bundle?.object())).collect();
        let lost = |bundle: &Object| !self.has_object(bundle, Trust::Nothing);
        let lost: Vec<Object> = named.into_iter().filter(lost).collect();
        if lost.is_empty() {
            return Ok(0);
        }
        let (_, mut bundles) = self.bundled(docs)?;
        let mut made = 0;
        for bundle in lost {
            if let Some(bytes) = bundles.remove(&bundle.digest) {
                self.ensure_bytes(Room::Catalogs, &bytes, &bundle.digest, Trust::Nothing)?;
                made += 1;
            }
        }
        Ok(made)
    }
}
