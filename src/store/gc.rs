//! Collecting: what no version needs goes, while creators, mounts and other collectors go on.
//!
//! ```text
//!            mark              sweep                    look again              end
//! versions, leases,   ---->  old and not needed:  ---->  needed by now:  ---->  in the trash for the grace time,
//! young documents            renamed to trash/           renamed back           needed neither before nor now: unlinked
//! ```
//!
//! There are no locks, so a version that needs an object may be published at any moment between marking and sweeping.
//! That loses nothing, because of an order that everybody keeps:
//!
//! - A **creator** makes what it reuses young ([`Store::reuse`]), publishes its version, then looks whether all that the
//!   version names is in its place, and brings it back from the trash where it is not; only then it moves the pointer. So
//!   whatever a collector took before the version was visible is found by the creator.
//! - A **collector** takes documents before what they name, and when it has taken everything it reads all versions again
//!   and brings back what they need. So whatever it took after a version was visible, it finds itself. It unlinks only what
//!   lay in the trash for the grace time before it began, and only from the generation in which it saw it; and no object
//!   that a document names which is in its place then, or has not lain in the trash for that long itself.
//! - Whoever puts a layer's document in its place has looked for what it names just before, and does so afterwards. So a
//!   document in its place means that what it names is in its place or in the trash, and stays there for the grace time
//!   after the document was taken, however long ago and by whomever: a creator need look for documents only.
//! - A **reader** that does not find something in its place looks in the trash.
//!
//! What remains is a creator that sleeps for longer than the grace time between reusing something and publishing it: it
//! then finds it gone when it looks, and builds it again. `tests/protocol.rs` has all of this as a model. A collector that
//! is killed leaves files in the trash, which readers find and the next collector brings back or ends.
//!
//! Versions are retired likewise: renamed into the trash, needed as long as they are there, brought back by `rollback`,
//! by `remove --undo`, or by a collector that finds them leased or current. Their numbers stay used: a pointer says
//! what the newest was, and one pointer always stays.
//!
//! Ages are differences of times that the store's server gave.

mod marks;
mod retention;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::trash::{Below, Generation, Trashed, modified};
use super::{LayerDoc, Object, Pointer, Store, in_parallel, leases, list_names, publish};
use crate::environment::{Digest, EnvName, Version};
use crate::error::{Error, IoContext, Kind, Result};
pub(super) use marks::Read;
use marks::{Environment, Marks, version_of};
pub use retention::Keep;
use retention::{Known, Now, PointerFacts};

/// Grace time, unless another is named: long enough for every build, and for an undo on the next morning.
pub const GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// What to collect.
#[derive(Debug, Clone, Copy)]
pub struct GcOptions {
    /// What is younger stays; what was taken can be had back for so long.
    pub grace: Duration,
    /// Which versions stay.
    pub keep: Keep,
    /// Change nothing, only tell.
    pub dry_run: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        GcOptions { grace: GRACE, keep: Keep::All, dry_run: false }
    }
}

/// How much of something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Files.
    pub files: u64,
    /// Their bytes, as they lie in the store.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
    }
}

/// What was collected, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Versions that stay.
    pub versions: usize,
    /// Versions that are leased.
    pub leased: usize,
    /// Versions taken out of use, `workflow/node@3`.
    pub retired: Vec<String>,
    /// What was moved to the trash, by room.
    pub trashed: BTreeMap<String, Amount>,
    /// What was brought back from the trash, because something needs it after all.
    pub restored: u64,
    /// What was ended: it lay in the trash for the grace time.
    pub removed: Amount,
    /// What lies in the trash now.
    pub in_trash: Amount,
    /// Files of dead creators, pointers and profiles that nobody needs, stale leases.
    pub cleared: Amount,
}

/// How far it is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcStep {
    /// Reading versions and layers.
    Marking,
    /// Taking what is not needed, out of so many files so far.
    Sweeping(u64),
    /// Reading again what may have been published meanwhile.
    LookingAgain,
    /// Ending what lay long enough in the trash.
    Removing(u64),
}

/// What was looked for is looked for again when so much time has passed before it is relied on: a collector needs the
/// grace time to end something, so whoever sleeps for a part of it must look again.
pub(crate) const FRESH: Duration = Duration::from_secs(30);
/// How often.
const TRIES: usize = 10;

/// Rooms in the order in which they are swept: documents before what they name. Blobs have summaries, which name
/// catalogs.
const SWEPT: [&str; 6] = ["interpreters", "keys", "layers", "blobs", "catalogs", "packs"];

struct Collector<'s> {
    store: &'s Store,
    options: GcOptions,
    /// What is younger than this stays.
    young_since: SystemTime,
    now: SystemTime,
    read: Read,
    /// What may be relied on by whoever has seen a document lately.
    held: HashSet<Below>,
    report: GcReport,
    progress: &'s (dyn Fn(GcStep) + Sync),
}

impl Store {
    /// Collects what nobody needs. Several may do so at once, and each may be killed at any moment.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when it cannot be told what is needed, because a version or a layer's document cannot be read:
    /// then nothing was removed.
    pub fn gc(&self, options: &GcOptions, progress: &(dyn Fn(GcStep) + Sync)) -> Result<GcReport> {
        let now = match options.dry_run {
            // A store that this machine may only read can be looked at, too.
            true => self.server_time().unwrap_or_else(|_| SystemTime::now()),
            false => {
                self.require_writable()?;
                self.server_time()?
            }
        };
        self.require_present()?;
        let young_since = now.checked_sub(options.grace).unwrap_or(SystemTime::UNIX_EPOCH);
        let (store, read, held) = (self, Read::default(), HashSet::new());
        let report = GcReport { dry_run: options.dry_run, ..GcReport::default() };
        Collector { store, options: *options, young_since, now, read, held, report, progress }.run()
    }
}

impl Collector<'_> {
    fn run(mut self) -> Result<GcReport> {
        let store = self.store;
        (self.progress)(GcStep::Marking);
        // Before the trash: what moves there in between is seen in one of the two.
        let mut seen = store.listed_layers()?;
        let old = store.trashed()?;
        seen.extend(old.iter().filter(|lies| !self.is_old(lies.since)).filter_map(|lies| layer_of(&lies.below)));
        let environments = store.all_environments(&old)?;
        let mut unknown = Vec::new();
        let leased = store.leased(self.leases_since(), &mut unknown)?;
        self.report.leased = leased.len();
        let before = store.marks(&environments, self.young_since, &mut self.read)?;
        unknown.extend(before.unknown.iter().cloned());
        if !unknown.is_empty() {
            return Err(marks::not_known(&unknown));
        }
        self.held = store.named_by(seen.into_iter().filter(|layer| !before.layers.contains(layer)), &mut self.read)?;
        let mut generation = Generation::new(store, self.now)?;
        for environment in &environments {
            self.retire(environment, &leased, &mut generation)?;
        }
        self.sweep(before, &mut generation).map(|before| self.finish(&old, &before, generation))?
    }

    fn leases_since(&self) -> SystemTime {
        let stale = self.options.grace.max(leases::STALE);
        self.now.checked_sub(stale).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn age(&self, time: SystemTime) -> Duration {
        self.now.duration_since(time).unwrap_or_default()
    }

    fn is_old(&self, time: SystemTime) -> bool {
        time < self.young_since || self.options.grace.is_zero()
    }

    /// Takes versions of `environment` out of use that nothing keeps.
    fn retire(
        &mut self,
        environment: &Environment,
        leased: &HashSet<(EnvName, u64)>,
        generation: &mut Generation<'_>,
    ) -> Result<()> {
        let store = self.store;
        let name = &environment.name;
        self.report.versions += environment.there.len();
        let is_removed = matches!(&environment.pointer, Ok(Some(pointer)) if pointer.version.is_none());
        if environment.there.is_empty() || self.options.keep == Keep::All && !is_removed {
            return Ok(());
        }
        let pointers = self.pointers(name)?;
        let now = match &environment.pointer {
            Ok(Some(Pointer { version: Some(current), .. })) => Now::Current(*current),
            Ok(Some(pointer)) => {
                // Pointer 1 points to version 1, so this one is a file.
                let age = pointers.iter().find(|facts| facts.sequence == pointer.sequence).map(|facts| facts.age);
                age.map_or(Now::Unknown, Now::Removed)
            }
            // Of a version that was published and never pointed to, there may be a creator about.
            Ok(None) | Err(_) => Now::Unknown,
        };
        let mut known = Vec::new();
        for number in &environment.there {
            let Some(published) = modified(&store.version_path(name, *number))? else { continue };
            let idle = pointers.iter().position(|facts| facts.version == Some(*number)).map(|_| {
                let last = pointers.iter().rposition(|facts| facts.version == Some(*number)).unwrap_or(0);
                // Until the one behind it was written.
                pointers.get(last + 1).map_or(Duration::ZERO, |next| next.age)
            });
            // Version 1 is current before there is any pointer.
            let idle = idle.or_else(|| pointers.first().filter(|_| *number == 1).map(|first| first.age));
            let leased = leased.contains(&(name.clone(), *number));
            known.push(Known { number: *number, age: self.age(published), idle, leased });
        }
        let retired = retention::retired(&known, now, self.options.keep, self.options.grace);
        let Some(newest) = retired.last().copied() else { return Ok(()) };
        if !self.options.dry_run {
            store.ensure_newest(name, newest)?;
        }
        for number in retired {
            let below = store.below(&store.version_path(name, number));
            if self.options.dry_run || generation.take(&below)? {
                self.report.retired.push(format!("{name}@{number}"));
                self.report.versions -= 1;
            }
        }
        generation.settle()
    }

    /// The pointers of an environment, in order.
    fn pointers(&self, name: &EnvName) -> Result<Vec<PointerFacts>> {
        let mut facts = Vec::new();
        for sequence in self.store.pointer_sequences(name)? {
            let Some(written) = modified(&self.store.pointer_path(name, sequence))? else { continue };
            let version = self.store.read_pointer(name, sequence).ok().and_then(|pointer| pointer.version);
            facts.push(PointerFacts { sequence, age: self.age(written), version });
        }
        Ok(facts)
    }

    /// Takes what is old and not needed; returns what was needed, which may have grown.
    fn sweep(&mut self, mut marks: Marks, generation: &mut Generation<'_>) -> Result<Marks> {
        let mut seen = 0;
        for room in SWEPT {
            let dir = self.store.root.join(room);
            let all: Vec<Below> = list_names(&dir)?.iter().map(|name| self.store.below(&dir.join(name))).collect();
            // So many at a time that what was looked at is not long ago when it is taken.
            for files in all.chunks(1024) {
                seen += files.len() as u64;
                (self.progress)(GcStep::Sweeping(seen));
                let looked = in_parallel(files, |below| match is_ours(below) && !self.store.is_needed(below, &marks) {
                    true => size_and_time(&self.store.place(below)),
                    false => Ok(None),
                });
                for (below, looked) in files.iter().zip(looked) {
                    let Some((size, time)) = looked? else { continue };
                    if !self.is_old(time) {
                        self.spare(below, &mut marks);
                    } else if self.options.dry_run || self.take(below, generation, &mut marks)? {
                        self.report.trashed.entry(room.to_string()).or_default().add(size);
                    }
                }
            }
            generation.settle()?;
        }
        Ok(marks)
    }

    /// Takes one file, unless it has become young since it was looked at.
    fn take(&mut self, below: &Below, generation: &mut Generation<'_>, marks: &mut Marks) -> Result<bool> {
        match modified(&self.store.place(below))? {
            None => Ok(false),
            Some(time) if !self.is_old(time) => {
                self.spare(below, marks);
                Ok(false)
            }
            Some(_) => generation.take(below),
        }
    }

    /// What a young document names is needed.
    fn spare(&mut self, below: &Below, marks: &mut Marks) {
        if let Some(layer) = layer_of(below) {
            marks.layers.insert(layer);
            self.store.mark_layers(marks, &mut self.read);
        }
    }

    /// Brings back what is needed by now, and ends what lay in the trash for long enough.
    fn finish(mut self, old: &[Trashed], before: &Marks, mut generation: Generation<'_>) -> Result<GcReport> {
        let store = self.store;
        generation.settle()?;
        (self.progress)(GcStep::LookingAgain);
        let lying = if self.options.dry_run { old.to_vec() } else { store.trashed()? };
        let environments = store.all_environments(&lying)?;
        let mut unknown = Vec::new();
        let leased = store.leased(self.leases_since(), &mut unknown)?;
        let after = store.marks(&environments, self.young_since, &mut self.read)?;
        unknown.extend(after.unknown.iter().cloned());
        let current: HashSet<(EnvName, u64)> = environments
            .iter()
            .filter_map(|env| Some((env.name.clone(), env.pointer.as_ref().ok()?.as_ref()?.version?)))
            .collect();
        let wanted = |below: &Below| match version_of(below) {
            Some(version) => leased.contains(&version) || current.contains(&version),
            None => store.is_needed(below, &after) || before.needed.contains(below),
        };
        // What documents name before the documents.
        let mut back: Vec<&Trashed> = lying.iter().filter(|trashed| wanted(&trashed.below)).collect();
        let rank = |trashed: &&Trashed| SWEPT.iter().rposition(|room| *room == trashed.below.room());
        back.sort_by_key(|trashed| std::cmp::Reverse(rank(trashed)));
        let mut kept: HashSet<&Below> = HashSet::new();
        for trashed in &back {
            // In its place again already: this name is left over, of somebody who was killed while bringing it back.
            if std::fs::File::open(store.place(&trashed.below)).is_ok() && !kept.contains(&trashed.below) {
                continue;
            }
            kept.insert(&trashed.below);
            if self.options.dry_run || store.bring_back_whole(&trashed.below)? {
                self.report.restored += 1;
            }
        }
        let seen: HashSet<(&String, &Below)> = old.iter().map(|old| (&old.generation, &old.below)).collect();
        // Documents before what they name here, too: who is killed in between leaves none that names nothing.
        let mut ending: Vec<&Trashed> = lying.iter().collect();
        ending.sort_by_key(rank);
        let mut removed = 0;
        for trashed in ending {
            let ends = seen.contains(&(&trashed.generation, &trashed.below))
                && self.is_old(trashed.since)
                && unknown.is_empty()
                && !self.held.contains(&trashed.below)
                && !kept.contains(&trashed.below);
            if !ends {
                if !kept.contains(&trashed.below) {
                    self.report.in_trash.add(trashed.size);
                }
                continue;
            }
            removed += 1;
            (self.progress)(GcStep::Removing(removed));
            if !self.options.dry_run {
                store.unlink_trashed(trashed)?;
            }
            self.report.removed.add(trashed.size);
        }
        self.clear(&environments)?;
        if !self.options.dry_run {
            store.sweep_generations(self.young_since)?;
        }
        match unknown.is_empty() {
            true => Ok(self.report),
            false => Err(marks::not_known(&unknown)),
        }
    }

    /// Unlinks what needs no trash: nobody finds anything through it.
    fn clear(&mut self, environments: &[Environment]) -> Result<()> {
        let store = self.store;
        let mut paths: Vec<PathBuf> = Vec::new();
        let tmp = store.tmp();
        let is_whose = |name: &String| !name.starts_with('.');
        paths.extend(list_names(&tmp)?.into_iter().filter(is_whose).map(|name| tmp.join(name)));
        let mut stale = Vec::new();
        stale.extend(store.leases()?.into_iter().filter(|lease| lease.renewed < self.leases_since()).map(|l| l.path));
        for env in environments {
            let versions: Vec<u64> = env.there.iter().chain(&env.trashed).copied().collect();
            let pointers = self.pointers(&env.name)?;
            let superseded = retention::superseded(&pointers, &versions, self.options.grace);
            stale.extend(superseded.into_iter().map(|sequence| store.pointer_path(&env.name, sequence)));
            paths.extend(store.idle_profiles(&env.name, &versions)?);
        }
        let old = paths.into_iter().chain(stale.iter().cloned()).filter_map(|path| {
            let looked = size_and_time(&path).ok()??;
            (self.is_old(looked.1) || stale.contains(&path)).then_some((path, looked.0))
        });
        for (path, size) in old.collect::<Vec<_>>() {
            if !self.options.dry_run {
                match super::disk::remove(&path) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    other => other.at("removing", &path)?,
                }
                if path.starts_with(store.root.join("envs")) && path.components().any(|c| c.as_os_str() == "profiles") {
                    let _ = path.parent().map(super::disk::remove_dir);
                }
            }
            self.report.cleared.add(size);
        }
        Ok(())
    }
}

/// Bytes and time of a file; none when it is gone. Looked at through an open handle: the time decides.
fn size_and_time(path: &std::path::Path) -> Result<Option<(u64, SystemTime)>> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    publish::again_if_stale(|| match std::fs::File::open(path).and_then(|file| file.metadata()) {
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Ok(None),
        Ok(meta) if !meta.is_file() => Ok(None),
        other => {
            let meta = other.at("reading", path)?;
            Ok(Some((meta.len(), meta.modified().at("reading", path)?)))
        }
    })
}

/// True for a name that this program gives. What others have put there is not ours to remove.
fn is_ours(below: &Below) -> bool {
    match below.room() {
        "interpreters" => below.path().extension().is_some_and(|end| end == "json"),
        _ => stem(below).is_some_and(|stem| stem.parse::<Digest>().is_ok()),
    }
}

fn stem(below: &Below) -> Option<&str> {
    let name = below.path().file_name()?.to_str()?;
    Some(name.strip_suffix(".json").unwrap_or(name))
}

fn layer_of(below: &Below) -> Option<Digest> {
    (below.room() == "layers").then(|| stem(below)?.parse().ok()).flatten()
}

impl Store {
    fn is_needed(&self, below: &Below, marks: &Marks) -> bool {
        if marks.needed.contains(below) {
            return true;
        }
        // A key is needed as long as its layer is. One that stands for nothing is not.
        let key = (below.room() == "keys").then(|| stem(below)?.parse::<Digest>().ok()).flatten();
        let stands_for = key.and_then(|key| self.layer_of_key_anywhere(&key).ok().flatten());
        stands_for.is_some_and(|layer| marks.layers.contains(&layer))
    }

    /// Brings back `below`; a layer's document only with all that it names.
    pub(super) fn bring_back_whole(&self, below: &Below) -> Result<bool> {
        match layer_of(below) {
            Some(layer) => self.bring_back_layer(&layer),
            None => self.bring_back(below),
        }
    }

    /// Makes sure that a layer's document and all that it names are in their places, where they are there or in the trash.
    /// False when something is in neither.
    pub(super) fn bring_back_layer(&self, layer: &Digest) -> Result<bool> {
        let doc = match self.layer(layer) {
            Err(error) if error.is_not_found() => return Ok(false),
            other => other?,
        };
        // A document must not be put in its place long after what it names was looked for.
        for _ in 0..TRIES {
            let looked = BootTime::now();
            if !self.are_in_place(&doc)? {
                return Ok(false);
            }
            if looked.elapsed() < FRESH {
                break;
            }
        }
        Ok(self.bring_back(&self.below(&self.layer_path(layer)))? && self.are_in_place(&doc)?)
    }

    /// Makes sure that what a layer's document names is in its place, where it is there or in the trash.
    pub(super) fn are_in_place(&self, doc: &LayerDoc) -> Result<bool> {
        let back = in_parallel(&self.objects_of(doc), |object| self.bring_back(object));
        back.into_iter().try_fold(true, |all, there| Ok(all && there?))
    }
}

impl Store {
    /// Makes sure that all that `version` names, and `bundles`, which its summaries name, is in its place; what lies in
    /// the trash is brought back. For a creator, when its version can be seen.
    ///
    /// # Errors
    /// [`Kind::Collected`] when something is in neither.
    pub fn require_whole(&self, version: &Version, bundles: &BTreeSet<Object>) -> Result<()> {
        let layers: Vec<Digest> =
            [version.interpreter.layer, version.scaffold].iter().chain(&version.layers).copied().collect();
        let mut missing: Vec<String> = Vec::new();
        for (layer, there) in layers.iter().zip(in_parallel(&layers, |layer| self.has_layer(layer))) {
            if !there {
                missing.push(format!("layer {}", layer.short()));
            }
        }
        let blobs = version.summaries.iter().map(|summary| summary.blob);
        let blobs = blobs.chain(version.lock.iter().chain(&version.pyproject).map(|document| document.blob));
        let objects = bundles.iter().map(|bundle| self.object_path(bundle));
        for path in objects.chain(blobs.map(|blob| self.blob_path(&blob))) {
            if !self.bring_back(&self.below(&path))? {
                missing.push(self.below(&path).to_string());
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let name = &version.environment;
        let what = format!("what {name} was made of was collected meanwhile: {}", missing.join(", "));
        Err(Error::new(Kind::Collected, what).hint("run the same command again with --rebuild"))
    }
}

/// A moment, by a clock that goes on while the machine or the process sleeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    pub(crate) fn now() -> BootTime {
        use nix::time::{ClockId, clock_gettime};
        BootTime(clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default())
    }

    /// Before everything.
    #[cfg(test)]
    pub(super) fn first() -> BootTime {
        BootTime(Duration::ZERO)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        BootTime::now().0.saturating_sub(self.0)
    }
}

/// Why a layer could not be written.
pub(super) fn collected_layer(layer: &Digest) -> Error {
    let what = format!("what layer {} needs was collected while it was written", layer.short());
    Error::new(Kind::Collected, what).hint("run the command again, and collect with a longer --grace")
}

/// Why a version that is to be brought back is not there.
pub(super) fn collected(name: &EnvName, number: u64) -> Error {
    Error::new(Kind::NotFound, format!("version {number} of {name} was collected"))
        .hint(format!("see `envfabric versions {name}`, or create it again"))
}
