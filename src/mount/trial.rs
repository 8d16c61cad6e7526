//! Trials: one unpublished version, mounted for as long as a function runs.
//!
//! A trial says in its source that it is one, so that nobody takes it for a mount to use. It ends in one of four ways:
//! the function returns; it panics ([`Mounted`] is dropped); a signal handler calls [`end_trials`]; or the process is
//! killed, and the dead mount stays until the next trial clears it ([`clear_dead_trials`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Alive, Mounted, Options, alive, attach, serve, table};
use crate::environment::Version;
use crate::error::{IoContext, Result};
use crate::store::{Index, Profile, Store};
use crate::view::Tree;

/// How the temporary directories are called.
const PREFIX: &str = "envfabric-trial-";
/// How long a trial of another process is waited for before it counts as alive: it may have been stopped.
const ANSWERS: Duration = Duration::from_secs(1);

/// Where trials of this process are mounted.
static RUNNING: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// An entry of [`RUNNING`].
struct Running(PathBuf);

impl Running {
    fn at(dir: PathBuf) -> Self {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).insert(dir.clone());
        Running(dir)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Mounts nothing but `draft` in a temporary directory, gives `f` the path of the version's directory
/// (`<dir>/<workflow>/<node>/.versions/<n>`), and unmounts, whatever `f` does.
pub fn trial<T>(store: &Store, index: Arc<Index>, draft: &Version, f: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let tree = Tree::of_draft(store.clone(), index, draft.clone());
    show(tree, draft, |options| options, |_, dir| f(dir))
}

/// Mounts nothing but `version`, gives `f` the path of its directory, and unmounts; tells what of the version was read
/// meanwhile. What any other mount has in memory plays no part.
pub fn profile<T>(
    store: &Store,
    index: Arc<Index>,
    version: &Version,
    f: impl FnOnce(&Path) -> Result<T>,
) -> Result<(T, Option<Profile>)> {
    let tree = Tree::of_draft(store.clone(), index, version.clone()).recording();
    // What the kernel reads in place is not seen.
    let options = |options| Options { passthrough: false, ..options };
    show(tree, version, options, |tree, dir| f(dir).map(|done| (done, tree.take_profile())))
}

fn show<T>(
    tree: Tree,
    draft: &Version,
    options: impl FnOnce(Options) -> Options,
    f: impl FnOnce(&Tree, &Path) -> Result<T>,
) -> Result<T> {
    clear_dead_trials();
    let dir = tempfile::Builder::new().prefix(PREFIX).tempdir().at("creating", std::env::temp_dir())?;
    let name = &draft.environment;
    let _running = Running::at(dir.path().canonicalize().at("finding", dir.path())?);
    let mounted: Mounted = serve(tree, &options(Options::at(dir.path())), table::TRIAL_SOURCE, false)?;
    let path = mounted.mount_point().join(name.workflow()).join(name.node()).join(".versions");
    let result = f(&mounted.tree, &path.join(draft.number.to_string()));
    // Something that `f` started may still be there: then it is taken away lazily, by the drop.
    if let Err(error) = mounted.unmount() {
        tracing::debug!(error = error.chain(), "a trial mount was still in use");
    }
    result
}

/// Takes away all trial mounts of this process, lazily and at once: for whoever ends it on a signal. Trials that run
/// fail.
pub fn end_trials() {
    let running = std::mem::take(&mut *RUNNING.lock().unwrap_or_else(PoisonError::into_inner));
    running.iter().for_each(|dir| take_away(dir));
}

/// Takes away what killed processes left: trial mounts whose server is dead, and their directories. What cannot be
/// taken away (another user's) stays.
pub fn clear_dead_trials() {
    let lines = table::lines().unwrap_or_default();
    for trial in lines.iter().filter_map(table::trial).filter(|trial| trial.root == Path::new("/")) {
        if alive(&trial.mount_point, ANSWERS) == Alive::Dead {
            tracing::debug!(mount_point = %trial.mount_point.display(), "a dead trial is cleared");
            take_away(&trial.mount_point);
        }
    }
}

fn take_away(dir: &Path) {
    match table::on_top(dir) {
        Ok(Some(line)) if table::trial(&line).is_some() => {
            if let Err(errno) = attach::detach(dir, true) {
                tracing::debug!(mount_point = %dir.display(), %errno, "a trial mount could not be taken away");
                return;
            }
        }
        Ok(None) => {}
        _ => return,
    }
    if dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)) {
        // Only when it is empty; what is in it is not ours.
        let _ = fs::remove_dir(dir);
    }
}
