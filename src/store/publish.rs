//! How a file gets its name: written whole beside the store, fsynced, linked.
//!
//! `link()` and not `rename()`, because it never replaces: a name, once given, keeps its bytes. After any error of
//! `link()` the target is opened and compared, because NFS reports EEXIST for a LINK that it executed and whose reply
//! was lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::chunks::{CHUNK_SIZE, ChunkHasher, Chunks};
use crate::environment::{Digest, Hasher};
use crate::error::{Error, IoContext, Kind, Result};

/// 32 random hex digits.
pub(super) fn nonce() -> Result<String> {
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).at("reading", "/dev/urandom")?;
    Ok(hex::encode(bytes))
}

/// Reads a whole file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    again_if_stale(|| fs::read(path).at("reading", path))
}

/// What `read` says; ESTALE is tried again, as a file of the same name may have come since.
pub(super) fn again_if_stale<T>(read: impl Fn() -> Result<T>) -> Result<T> {
    let mut tries = 0;
    loop {
        match read() {
            Err(error) if error.kind() == Kind::Os(libc::ESTALE) && tries < 3 => tries += 1,
            other => return other,
        }
    }
}

/// A file under `tmp/` that is removed unless it was given a name.
pub(super) struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    /// A new, empty file with a name that no other process uses.
    pub(super) fn create(root: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let dir = root.join("tmp");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{count}", nonce()?));
        let open = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&dir).at("creating", &dir)?;
                open()
            }
            other => other,
        }
        .at("creating", &path)?;
        Ok(Temporary { path, file })
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the bytes durable and the file read-only, then links it to `target`.
    /// False when `target` exists already as another file.
    pub(super) fn link(&self, target: &Path) -> Result<bool> {
        self.file.set_permissions(fs::Permissions::from_mode(0o444)).at("setting the mode of", &self.path)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let mut made_parent = !parent.exists();
        if made_parent {
            // The disk is waited for once, not for one after the other.
            std::thread::scope(|scope| {
                let made = scope.spawn(|| make_dirs(parent));
                self.file.sync_all().at("syncing", &self.path)?;
                made.join().unwrap_or_else(|_| make_dirs(parent))
            })?;
        } else {
            self.file.sync_all().at("syncing", &self.path)?;
        }
        let error = loop {
            match fs::hard_link(&self.path, target) {
                Ok(()) => {
                    sync_dir(parent)?;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !made_parent => {
                    make_dirs(parent)?;
                    made_parent = true;
                }
                Err(error) => break error,
            }
        };
        // Was it ours after all? The inode tells, and is compared through open handles only.
        if let Ok(there) = File::open(target) {
            let (ours, theirs) = (self.file.metadata(), there.metadata());
            if let (Ok(ours), Ok(theirs)) = (ours, theirs) {
                return Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()));
            }
        }
        Err(Error::io("publishing", target, error))
    }

    /// Links it to `target`, the name of something content-addressed. When the name is taken by what is not `sound`,
    /// that is replaced: the right bytes are known, so nothing can be lost, and who has it open keeps what was there.
    pub(super) fn link_or_repair(&self, target: &Path, sound: impl FnOnce() -> bool) -> Result<()> {
        if self.link(target)? || sound() {
            return Ok(());
        }
        tracing::warn!(object = %target.display(), "a damaged object is replaced by a sound one");
        fs::rename(&self.path, target).at("replacing", target)?;
        sync_dir(target.parent().unwrap_or(Path::new("/")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The linked name keeps the bytes; an error leaves a stray file in tmp/, which gc removes.
        let _ = fs::remove_file(&self.path);
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    match File::open(dir).and_then(|d| d.sync_all()) {
        // Some network file systems do not fsync directories; they make names durable with the reply.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EBADF)) => Ok(()),
        other => other.at("syncing", dir),
    }
}

/// Makes `dir` and what is missing above it, durably.
fn make_dirs(dir: &Path) -> Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|d| !d.exists()).collect();
    fs::create_dir_all(dir).at("creating", dir)?;
    missing.iter().filter_map(|made| made.parent()).try_for_each(sync_dir)
}

/// Publishes `bytes` as `target`; false when something else has that name already.
pub(super) fn bytes(root: &Path, target: &Path, bytes: &[u8]) -> Result<bool> {
    written(root, bytes)?.link(target)
}

/// Publishes `bytes` as `target`, also over something there that is not `sound`.
pub(super) fn bytes_or_repair(root: &Path, target: &Path, bytes: &[u8], sound: impl FnOnce() -> bool) -> Result<()> {
    written(root, bytes)?.link_or_repair(target, sound)
}

fn written(root: &Path, bytes: &[u8]) -> Result<Temporary> {
    let mut temporary = Temporary::create(root)?;
    let path = temporary.path.clone();
    temporary.file().write_all(bytes).at("writing", &path)?;
    Ok(temporary)
}

/// How much to believe of an object that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// That it is what its name says, if it has the right length.
    Length,
    /// Nothing: it is read and hashed.
    Nothing,
}

/// Length of a file, its sha256 and those of its chunks.
pub(super) fn hash_chunks(path: &Path) -> Result<(u64, (Digest, Chunks))> {
    let mut file = File::open(path).at("opening", path)?;
    if file.metadata().at("reading", path)?.len() <= CHUNK_SIZE {
        let (size, digest) = copy_hashing(&mut file, path, |_| Ok(()))?;
        return Ok((size, (digest, Chunks::single(digest))));
    }
    let mut hasher = ChunkHasher::default();
    let size = read_through(&mut file, path, |bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    Ok((size, hasher.finish()))
}

/// Hands everything in `input` (the file at `path`) to `take`, piece by piece; returns its length and sha256.
pub(super) fn copy_hashing(
    input: &mut File,
    path: &Path,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<(u64, Digest)> {
    let mut hasher = Hasher::default();
    let size = read_through(input, path, |bytes| {
        hasher.update(bytes);
        take(bytes)
    })?;
    Ok((size, hasher.finish()))
}

/// Hands everything in `input` (the file at `path`) to `take`, piece by piece; returns its length.
fn read_through(input: &mut File, path: &Path, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<u64> {
    let mut buffer = vec![0u8; 1 << 20];
    let mut size = 0;
    loop {
        let n = input.read(&mut buffer).at("reading", path)?;
        if n == 0 {
            return Ok(size);
        }
        take(&buffer[..n])?;
        size += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_once_given_keeps_its_bytes_and_nothing_stays_in_tmp() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("envs/a/b/1.json");
        assert!(bytes(root.path(), &target, b"first").unwrap());
        assert!(!bytes(root.path(), &target, b"second").unwrap());
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
    }
}
