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

use crate::environment::{Digest, Hasher};
use crate::error::{Error, IoContext, Kind, Result};

/// 32 random hex digits.
pub(super) fn nonce() -> Result<String> {
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).at("reading", "/dev/urandom")?;
    Ok(hex::encode(bytes))
}

/// Reads a whole file; ESTALE is tried again, as a file of the same name may have come since.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let mut tries = 0;
    loop {
        match fs::read(path) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) && tries < 3 => tries += 1,
            other => return other.at("reading", path),
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
    pub(super) fn link(self, target: &Path) -> Result<bool> {
        self.file.set_permissions(fs::Permissions::from_mode(0o444)).at("setting the mode of", &self.path)?;
        self.file.sync_all().at("syncing", &self.path)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let mut made_parent = false;
        let error = loop {
            match fs::hard_link(&self.path, target) {
                Ok(()) => {
                    sync_dir(parent)?;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !made_parent => {
                    fs::create_dir_all(parent).at("creating", parent)?;
                    if let Some(grandparent) = parent.parent() {
                        sync_dir(grandparent)?;
                    }
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

/// Publishes `bytes` as `target`; false when something else has that name already.
pub(super) fn bytes(root: &Path, target: &Path, bytes: &[u8]) -> Result<bool> {
    let mut temporary = Temporary::create(root)?;
    let path = temporary.path.clone();
    temporary.file().write_all(bytes).at("writing", &path)?;
    temporary.link(target)
}

/// Makes sure that content-addressed `bytes` are there as `target`.
pub(super) fn ensure_bytes(root: &Path, target: &Path, content: &[u8]) -> Result<()> {
    if has_size(target, content.len() as u64) {
        return Ok(());
    }
    bytes(root, target, content)?;
    check_size(target, content.len() as u64)
}

/// Makes sure that a content-addressed copy of `source` is there as `target`.
pub(super) fn ensure_file(root: &Path, target: &Path, source: &Path, digest: &Digest) -> Result<()> {
    let mut input = File::open(source).at("opening", source)?;
    let size = input.metadata().at("reading", source)?.len();
    if has_size(target, size) {
        return Ok(());
    }
    let mut temporary = Temporary::create(root)?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0u8; 1 << 20];
    let mut copied = 0;
    loop {
        let n = input.read(&mut buffer).at("reading", source)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
        let path = temporary.path.clone();
        temporary.file().write_all(&buffer[..n]).at("writing", &path)?;
        copied += n as u64;
    }
    if hasher.finish() != *digest {
        return Err(Error::new(Kind::Failed, format!("{} changed while it was read", source.display()))
            .hint("run the command again"));
    }
    temporary.link(target)?;
    check_size(target, copied)
}

/// The open is what revalidates on NFS; the size is asked of the handle.
fn has_size(path: &Path, size: u64) -> bool {
    File::open(path).and_then(|f| f.metadata()).is_ok_and(|m| m.len() == size)
}

fn check_size(path: &Path, size: u64) -> Result<()> {
    if has_size(path, size) {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, format!("{} is there with a wrong length", path.display()))
        .hint("run `envfabric fsck`; move the damaged object away and run the command again"))
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

    #[test]
    fn a_copy_that_is_not_what_its_name_says_is_never_published() {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("source");
        fs::write(&source, b"changed").unwrap();
        let digest = Digest::of(b"as it was");
        let target = root.path().join("blobs/x");
        assert!(ensure_file(root.path(), &target, &source, &digest).is_err());
        assert!(!target.exists());
    }
}
