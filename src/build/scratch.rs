//! Scratch directories, and locks between processes of this machine.
//!
//! ```text
//! <scratch>/envfabric-build/             ours alone (mode 0700: working locks may hold credentials)
//! <scratch>/envfabric-build/<name>.lock  held by the process that uses <name>, `build-<process>-<number>`
//! <scratch>/envfabric-build/<name>/      staging venvs, working locks, bytecode; removed at the end
//! <state>/locks/<name>                   empty files to lock
//! ```
//! The kernel drops a lock when its holder dies, however it dies, so a scratch directory whose lock can be had belongs
//! to nobody and the next build removes it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, IoContext, Kind, Result};

/// A directory of one build, removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// A new, empty directory in `root` (made if missing); leftovers of dead processes there are removed.
    pub(super) fn new(root: &Path) -> Result<Scratch> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(root).at("creating", root)?;
        // uv writes paths relative to this, so it must have no symlinks.
        let root = own_directory(&root.canonicalize().at("finding", root)?)?;
        clean(&root);
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = root.join(format!("build-{}-{count}", std::process::id()));
            let lock_path = path.with_extension("lock");
            let Some(lock) = try_own(&lock_path)? else { continue };
            match fs::create_dir(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    fs::remove_dir_all(&path).at("removing", &path)?;
                    fs::create_dir(&path).at("creating", &path)?;
                }
                other => other.at("creating", &path)?,
            }
            return Ok(Scratch { path, lock_path, _lock: lock });
        }
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a scratch directory could not be removed");
            return;
        }
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// The directory in `root` that nobody else may look into; made if missing.
fn own_directory(root: &Path) -> Result<PathBuf> {
    let path = root.join("envfabric-build");
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let meta = fs::symlink_metadata(&path).at("reading", &path)?;
            if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
                return Err(Error::new(Kind::Invalid, format!("{} belongs to somebody else", path.display()))
                    .hint("name a directory of your own with ENVFABRIC_SCRATCH"));
            }
            if meta.mode() & 0o077 != 0 {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).at("setting the mode of", &path)?;
            }
        }
        other => other.at("creating", &path)?,
    }
    Ok(path)
}

/// True for `build-<digits>-<digits>.lock`.
fn is_lock_name(name: &std::ffi::OsStr) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let inner = name.to_str().and_then(|name| name.strip_prefix("build-")?.strip_suffix(".lock"));
    inner.and_then(|inner| inner.split_once('-')).is_some_and(|(process, count)| digits(process) && digits(count))
}

/// Removes scratch directories whose process is dead.
fn clean(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten().filter(|entry| is_lock_name(&entry.file_name())) {
        let lock_path = entry.path();
        if matches!(try_own(&lock_path), Ok(Some(_))) {
            let dir = lock_path.with_extension("");
            // What a dead process started may write there for a moment still.
            let removed = |tries: u32| {
                fs::remove_dir_all(&dir).is_ok() || {
                    std::thread::sleep(Duration::from_millis(u64::from(tries) * 20));
                    false
                }
            };
            if !dir.exists() || (0..5).any(removed) {
                let _ = fs::remove_file(&lock_path);
            }
        }
    }
}

/// Locks a file, made if missing; none when another process has it.
fn try_own(path: &Path) -> Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).at("opening", path)?;
    if file.try_lock().is_err() {
        return Ok(None);
    }
    // Whoever had it may have removed the name meanwhile: then this lock guards nothing.
    let same = match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(named)) => ours.ino() == named.ino() && ours.dev() == named.dev(),
        _ => false,
    };
    Ok(same.then_some(file))
}

/// Locks held until dropped.
#[derive(Debug, Default)]
pub(super) struct Locks {
    _held: Vec<File>,
}

/// Takes the locks `names` of directory `state`, in sorted order, so that two that want the same never wait for each
/// other. `waiting` is called once if one of them is held by another process.
pub(super) fn lock(state: &Path, names: impl IntoIterator<Item = String>, waiting: impl FnOnce()) -> Result<Locks> {
    let dir = state.join("locks");
    fs::create_dir_all(&dir).at("creating", &dir)?;
    let names: std::collections::BTreeSet<String> = names.into_iter().collect();
    let mut waiting = Some(waiting);
    let mut locks = Vec::new();
    for name in names {
        let path = dir.join(name);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).at("opening", &path)?;
        if file.try_lock().is_err() {
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            file.lock().at("locking", &path)?;
        }
        locks.push(file);
    }
    Ok(Locks { _held: locks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_is_removed_and_what_a_living_one_uses_stays() {
        let root = tempfile::tempdir().unwrap();
        let ours = own_directory(root.path()).unwrap();
        let left = ours.join("build-1-1");
        fs::create_dir_all(left.join("deep/er")).unwrap();
        fs::write(left.with_extension("lock"), "").unwrap();
        let first = Scratch::new(root.path()).unwrap();
        assert!(!left.exists() && !left.with_extension("lock").exists());
        let second = Scratch::new(root.path()).unwrap();
        assert!(first.path().is_dir() && second.path().is_dir() && first.path() != second.path());
        drop((first, second));
        assert_eq!(fs::read_dir(&ours).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_stays_and_ours_is_closed_to_others() {
        let root = tempfile::tempdir().unwrap();
        let ours = root.path().join("envfabric-build");
        fs::create_dir(&ours).unwrap();
        let foreign = ["build-1-1", "envfabric-build/X", "envfabric-build/build-1", "envfabric-build/build-1-x"];
        for name in foreign {
            fs::create_dir(root.path().join(name)).unwrap();
            fs::write(root.path().join(format!("{name}.lock")), "").unwrap();
        }
        drop(Scratch::new(root.path()).unwrap());
        for name in foreign {
            assert!(root.path().join(name).is_dir() && root.path().join(format!("{name}.lock")).is_file(), "{name}");
        }
        assert_eq!(fs::metadata(&ours).unwrap().mode() & 0o777, 0o700);
        fs::remove_dir_all(&ours).unwrap();
        std::os::unix::fs::symlink(root.path(), &ours).unwrap();
        assert!(Scratch::new(root.path()).is_err(), "a link may lead anywhere");
    }
}
