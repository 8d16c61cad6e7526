//! Copying trees of an installation, and putting a layer back on disk.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use crate::environment::Digest;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::{FILE_MTIME, Node, ObjectFile, Place, Staged, StagedKind, Store};

/// Copies one file, following links; the copy is writable.
pub(super) fn copy_file(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).at("creating", parent)?;
    }
    let executable = fs::metadata(from).at("reading", from)?.permissions().mode() & 0o111 != 0;
    let _ = fs::remove_file(to);
    fs::copy(from, to).at("copying", from)?;
    let mode = if executable { 0o755 } else { 0o644 };
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).at("setting the mode of", to)
}

/// Copies the tree at `from`, without what `skip` names by its path below `from`.
///
/// Links that stay inside are kept; of those that leave, a file is copied and anything else is left out, as are
/// sockets and the like.
pub(super) fn copy_tree(from: &Path, to: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<()> {
    let real = from.canonicalize().at("finding", from)?;
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let here = real.join(&dir);
        fs::create_dir_all(to.join(&dir)).at("creating", to.join(&dir))?;
        for entry in fs::read_dir(&here).at("reading", &here)? {
            let entry = entry.at("reading", &here)?;
            let below = dir.join(entry.file_name());
            if skip(&below) {
                continue;
            }
            let (path, copy) = (entry.path(), to.join(&below));
            let kind = entry.file_type().at("reading", &path)?;
            if kind.is_dir() {
                todo.push(below);
            } else if kind.is_file() {
                copy_file(&path, &copy)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).at("reading", &path)?;
                let Ok(end) = path.canonicalize() else { continue };
                if end.starts_with(&real) && target.is_relative() {
                    std::os::unix::fs::symlink(&target, &copy).at("creating", &copy)?;
                } else if end.is_file() {
                    copy_file(&end, &copy)?;
                }
            }
        }
    }
    Ok(())
}

/// All regular files below `root`.
pub(super) fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let files = staged(root)?.into_iter().filter_map(|s| match s.kind {
        StagedKind::File { source, .. } => Some(source),
        _ => None,
    });
    Ok(files.collect())
}

/// Everything below `root`, ready for a layer; empty directories too.
pub(super) fn staged(root: &Path) -> Result<Vec<Staged>> {
    let mut staged = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let here = root.join(&dir);
        for entry in fs::read_dir(&here).at("reading", &here)? {
            let entry = entry.at("reading", &here)?;
            let below = dir.join(entry.file_name());
            let meta = entry.metadata().at("reading", entry.path())?;
            let path = below.as_os_str().as_bytes().to_vec();
            let kind = if meta.is_dir() {
                todo.push(below);
                StagedKind::Dir
            } else if meta.is_symlink() {
                let target = fs::read_link(entry.path()).at("reading", entry.path())?;
                StagedKind::Symlink { target: target.as_os_str().as_bytes().to_vec() }
            } else {
                StagedKind::File { source: entry.path(), executable: meta.permissions().mode() & 0o111 != 0 }
            };
            staged.push(Staged { path, kind });
        }
    }
    Ok(staged)
}

/// Writes the files of `layer` below `root`, which must not exist.
pub(super) fn materialise(store: &Store, layer: &Digest, root: &Path) -> Result<()> {
    let catalog = store.catalog(layer)?;
    let pack = catalog.pack().map(|pack| ObjectFile::open(store, &pack)?.read()).transpose()?;
    fs::create_dir_all(root).at("creating", root)?;
    for row in catalog.verify()? {
        let path = root.join(std::ffi::OsStr::from_bytes(&catalog.path_of(row.id)?));
        match row.node {
            Node::Dir { .. } => fs::create_dir_all(&path).at("creating", &path)?,
            Node::Symlink { target } => {
                std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(&target), &path).at("creating", &path)?;
            }
            Node::File { size, executable, digest, place } => {
                let bytes = match (place, &pack) {
                    (Place::Pack { offset }, Some(pack)) => {
                        let end = offset.saturating_add(size);
                        pack.get(offset as usize..end as usize).unwrap_or_default().to_vec()
                    }
                    _ => store.read_blob(&digest)?,
                };
                if Digest::of(&bytes) != digest {
                    return Err(Error::new(Kind::Corrupt, format!("layer {} has damaged bytes", layer.short()))
                        .hint("run `envfabric fsck`"));
                }
                fs::write(&path, bytes).at("writing", &path)?;
                let mode = if executable { 0o755 } else { 0o644 };
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).at("setting the mode of", &path)?;
                // Bytecode is valid only for sources of this time.
                let time = UNIX_EPOCH + Duration::from_secs(FILE_MTIME as u64);
                File::open(&path).and_then(|f| f.set_modified(time)).at("setting the time of", &path)?;
            }
        }
    }
    Ok(())
}
