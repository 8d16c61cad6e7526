//! What was taken out of use and is kept for a while.
//!
//! ```text
//! <store>/trash/<generation>/since            its time: nothing came into this generation later
//! <store>/trash/<generation>/blobs/<sha256>   the same path as in the store
//! ```
//!
//! A generation is called `<seconds>-<random>`, after the server's time when its collector began. One collector fills one
//! generation, so a name in the trash stands for one taking: a collector that unlinks what it saw
//! there an hour ago cannot hit what another has taken meanwhile. Since when a file is there is told by its own time,
//! which is set just before it is taken (by the server's clock), or by that of `since`, where a file belongs to another
//! user whose time may not be set: the later one counts.
//!
//! **Whoever does not find a file in its place looks here** before it counts as missing ([`Store::open_anywhere`]), and
//! whoever wants to use it brings it back ([`Store::bring_back`]), by a second name, so that there is no moment without
//! one.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::disk;
use super::publish::{self, make_dirs, name_again};
use super::{Store, list_dirs};
use crate::error::{Error, IoContext, Kind, Result};

/// How often a file is looked for that moves between its place and the trash.
pub(super) const LOOKS: usize = 4;

/// The marker of a generation.
const SINCE: &str = "since";

/// A path below the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Below(PathBuf);

impl Below {
    pub(super) fn new(path: impl Into<PathBuf>) -> Below {
        Below(path.into())
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The first component: `blobs`, `envs`.
    pub(super) fn room(&self) -> &str {
        self.0.iter().next().and_then(|room| room.to_str()).unwrap_or_default()
    }
}

impl std::fmt::Display for Below {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.display().fmt(f)
    }
}

/// Something in the trash.
#[derive(Debug, Clone)]
pub(super) struct Trashed {
    pub(super) generation: String,
    pub(super) below: Below,
    /// Bytes on disk.
    pub(super) size: u64,
    /// When it came there, by the server's clock.
    pub(super) since: SystemTime,
}

impl Store {
    fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// `path` as it is below the store.
    pub(super) fn below(&self, path: &Path) -> Below {
        Below::new(path.strip_prefix(&self.root).unwrap_or(path))
    }

    pub(super) fn place(&self, below: &Below) -> PathBuf {
        self.root.join(below.path())
    }

    fn generations(&self) -> io::Result<Vec<String>> {
        list_dirs(&self.trash()).map_err(io::Error::other)
    }

    /// Opens the file at `path`, a place in the store, there or in the trash; gives also where it was.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it is in neither.
    pub(super) fn open_anywhere(&self, path: &Path) -> io::Result<(File, PathBuf)> {
        for _ in 0..LOOKS {
            match File::open(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => return other.map(|file| (file, path.to_path_buf())),
            }
            let Ok(below) = path.strip_prefix(&self.root) else { break };
            let generations = self.generations()?;
            if generations.is_empty() {
                break;
            }
            for generation in generations {
                let there = self.trash().join(generation).join(below);
                match File::open(&there) {
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    other => return other.map(|file| (file, there)),
                }
            }
        }
        Err(ErrorKind::NotFound.into())
    }

    /// The bytes of the file at `path`, a place in the store, from there or from the trash.
    pub(super) fn read_anywhere(&self, path: &Path) -> Result<Vec<u8>> {
        publish::again_if_stale(|| {
            let (mut file, _) = self.open_anywhere(path).at("reading", path)?;
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut file, &mut bytes).at("reading", path)?;
            Ok(bytes)
        })
    }

    /// Opens the file at `path` to use it for something new: what is in the trash is brought back, and what is no longer
    /// young is made young, so that no collector takes it before it is named by a version.
    ///
    /// A file of another user stays as old as it is; that is safe too (see [`super::gc`]), and only costs bringing back.
    pub(super) fn reuse(&self, path: &Path) -> io::Result<File> {
        match self.open_young(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match self.bring_back(&self.below(path)).map_err(io::Error::other)? {
                    true => self.open_young(path),
                    false => Err(error),
                }
            }
            other => other,
        }
    }

    /// Opens the file at `path`, and makes it young where it is not.
    pub(super) fn open_young(&self, path: &Path) -> io::Result<File> {
        /// Younger ones are left alone: an environment of known layers would set a hundred times.
        const YOUNG: Duration = Duration::from_secs(15 * 60);
        let file = File::open(path)?;
        // By this machine's clock, which may be wrong: then it is set once more, or once less.
        let is_young = file.metadata()?.modified()?.elapsed().is_ok_and(|age| age < YOUNG);
        if !is_young && let Err(error) = disk::touch(&file, path) {
            tracing::debug!(path = %path.display(), %error, "a file of the store cannot be made young");
        }
        Ok(file)
    }

    /// Makes sure that what is called `below` is in its place, if it is there or in the trash; false when it is in
    /// neither.
    pub(super) fn bring_back(&self, below: &Below) -> Result<bool> {
        let place = self.place(below);
        for _ in 0..LOOKS {
            if File::open(&place).is_ok() {
                return Ok(true);
            }
            let generations = self.generations().at("reading", self.trash())?;
            if generations.is_empty() {
                return Ok(false);
            }
            for generation in generations {
                let there = self.trash().join(generation).join(below.path());
                if File::open(&there).is_err() {
                    continue;
                }
                if let Some(parent) = place.parent().filter(|parent| !parent.exists()) {
                    make_dirs(parent)?;
                }
                match name_again(&there, &place) {
                    Err(error) if matches!(error.kind(), ErrorKind::NotFound) => continue,
                    // Whatever is reported, what counts is whether it is there now.
                    Err(error) if File::open(&place).is_err() => {
                        return Err(Error::io("bringing back", &place, error));
                    }
                    _ => {}
                }
                publish::sync_dir(place.parent().unwrap_or(&self.root))?;
                tracing::info!(object = %below, "brought back from the trash");
                if let Ok(file) = File::open(&place) {
                    let _ = disk::touch(&file, &place);
                    // Another collector that saw it lie there would unlink this name only; it is gone the sooner.
                    let _ = disk::remove(&there);
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Everything that lies in the trash.
    pub(super) fn trashed(&self) -> Result<Vec<Trashed>> {
        let mut all = Vec::new();
        for generation in self.generations().at("reading", self.trash())? {
            let root = self.trash().join(&generation);
            let marked = modified(&root.join(SINCE))?;
            let mut dirs = vec![PathBuf::new()];
            while let Some(dir) = dirs.pop() {
                for (name, meta) in entries(&root.join(&dir))? {
                    let below = dir.join(name);
                    if meta.is_dir() {
                        dirs.push(below);
                    } else if below != Path::new(SINCE) {
                        let modified = meta.modified().at("reading", root.join(&below))?;
                        let since = marked.map_or(modified, |marked| marked.max(modified));
                        let (generation, below) = (generation.clone(), Below(below));
                        all.push(Trashed { generation, below, size: meta.len(), since });
                    }
                }
            }
        }
        Ok(all)
    }

    /// Ends what lies in the trash. That it is gone already is no failure.
    pub(super) fn unlink_trashed(&self, trashed: &Trashed) -> Result<()> {
        let path = self.trash().join(&trashed.generation).join(trashed.below.path());
        match disk::remove(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.at("removing", path),
        }
    }

    /// Takes generations away that have nothing in them and are older than `before`; younger ones may be being filled.
    pub(super) fn sweep_generations(&self, before: SystemTime) -> Result<()> {
        for generation in self.generations().at("reading", self.trash())? {
            let root = self.trash().join(&generation);
            let marker = root.join(SINCE);
            let begun = generation.split('-').next().and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
            let begun = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(begun));
            // Without a marker it was begun just now, or by a collector that was killed.
            if modified(&marker)?.or(begun).is_some_and(|since| since >= before) {
                continue;
            }
            let mut dirs = vec![root.clone()];
            let mut at = 0;
            while at < dirs.len() {
                let dir = dirs[at].clone();
                let found = entries(&dir)?;
                dirs.extend(found.iter().filter(|(_, meta)| meta.is_dir()).map(|(name, _)| dir.join(name)));
                at += 1;
            }
            // The deepest first. What is not empty stays.
            for dir in dirs.iter().skip(1).rev() {
                let _ = disk::remove_dir(dir);
            }
            let is_empty = entries(&root)?.iter().all(|(name, _)| name == SINCE);
            if is_empty {
                let _ = disk::remove(&marker);
                let _ = disk::remove_dir(&root);
            }
        }
        Ok(())
    }
}

/// Names and attributes in a directory that may go meanwhile.
fn entries(dir: &Path) -> Result<Vec<(String, std::fs::Metadata)>> {
    let read = match std::fs::read_dir(dir) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        other => other.at("reading", dir)?,
    };
    let mut found = Vec::new();
    for entry in read {
        let entry = entry.at("reading", dir)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // What an NFS client calls a removed file that somebody has open: it goes by itself, and cannot be removed.
        if name.starts_with('.') {
            continue;
        }
        match entry.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => found.push((name, other.at("reading", entry.path())?)),
        }
    }
    Ok(found)
}

/// When a file was written last; none when it is not there. Asked of an open file, as a `stat` may be answered from a
/// cache.
pub(super) fn modified(path: &Path) -> Result<Option<SystemTime>> {
    let read = || match File::open(path).and_then(|file| file.metadata()).and_then(|meta| meta.modified()) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        other => other.at("reading", path).map(Some),
    };
    publish::again_if_stale(read)
}

/// A generation that this process fills.
pub(super) struct Generation<'s> {
    store: &'s Store,
    name: String,
    begun: bool,
    /// Directories whose names changed since they were made durable.
    unsynced: std::collections::BTreeSet<PathBuf>,
}

impl<'s> Generation<'s> {
    /// One that has nothing yet; it is made when the first file comes.
    pub(super) fn new(store: &'s Store, now: SystemTime) -> Result<Self> {
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let name = format!("{seconds}-{}", publish::nonce()?);
        Ok(Generation { store, name, begun: false, unsynced: Default::default() })
    }

    fn root(&self) -> PathBuf {
        self.store.trash().join(&self.name)
    }

    /// Takes `below` out of its place. False when it is not there (any more).
    pub(super) fn take(&mut self, below: &Below) -> Result<bool> {
        if !self.begun {
            publish::bytes(&self.store.root, &self.root().join(SINCE), b"")?;
            self.begun = true;
        }
        let (place, there) = (self.store.place(below), self.root().join(below.path()));
        let Ok(file) = File::open(&place) else { return Ok(false) };
        // In the trash since now. One of another user keeps its time: the generation's counts.
        let _ = disk::touch(&file, &place);
        let parent = there.parent().unwrap_or(&place);
        if !parent.exists() {
            make_dirs(parent)?;
        }
        if let Err(error) = disk::rename(&place, &there) {
            match error.kind() {
                // Another took it, or a retransmitted request finds that it was done.
                ErrorKind::NotFound if File::open(&place).is_err() => return Ok(File::open(&there).is_ok()),
                // One that slept for the grace time finds its generation swept away.
                ErrorKind::NotFound => {
                    make_dirs(parent)?;
                    disk::rename(&place, &there).at("taking away", &place)?;
                }
                _ => return Err(Error::io("taking away", &place, error)),
            }
        }
        self.unsynced.extend([place.parent(), there.parent()].into_iter().flatten().map(Path::to_path_buf));
        Ok(true)
    }

    /// Makes what was taken so far durable, and its time no later than now.
    pub(super) fn settle(&mut self) -> Result<()> {
        for dir in std::mem::take(&mut self.unsynced) {
            publish::sync_dir(&dir)?;
        }
        if self.begun {
            let since = self.root().join(SINCE);
            let file = File::open(&since).at("opening", &since)?;
            // Owned by this process's user, who made it.
            disk::touch(&file, &since).at("setting the time of", &since)?;
        }
        Ok(())
    }
}

impl Store {
    /// The present by the clock of whoever keeps the store.
    pub(super) fn server_time(&self) -> Result<SystemTime> {
        let mut file = publish::Temporary::create(&self.root)?;
        let path = file.path().to_path_buf();
        // Some servers give an empty file the client's time.
        io::Write::write_all(file.file(), b".").at("writing", &path)?;
        file.file().sync().at("syncing", &path)?;
        file.file().metadata().and_then(|meta| meta.modified()).at("reading", &path)
    }

    /// What somebody who finds something missing is told.
    pub(super) fn missing(&self, what: &str) -> Error {
        Error::new(Kind::Corrupt, format!("{what} is missing from the store"))
            .hint("run `envfabric fsck` to see which environments need it")
    }
}
