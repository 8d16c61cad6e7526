//! How a file gets its name: written whole beside the store, fsynced, linked.
//!
//! `link()` and not `rename()`, because it never replaces: a name, once given, keeps its bytes. A file system without
//! hard links is asked for a rename that never replaces; where there is neither, nothing is published.
//!
//! After any error the target is opened and compared, because NFS reports EEXIST for a LINK that it executed and whose
//! reply was lost, and sshfs reports EPERM for a name that is taken. The same inode is ours. Another inode says nothing:
//! sshfs numbers files by path. So documents, which carry a nonce or are what their name says, are compared byte by byte,
//! and objects are judged by whoever published them ([`Temporary::link_or_repair`]).

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::Store;
use super::chunks::{CHUNK_SIZE, ChunkHasher, Chunks};
use super::disk::{self, Writing};
use crate::environment::Digest;
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
    file: Writing,
}

impl Temporary {
    /// A new, empty file with a name that no other process uses.
    pub(super) fn create(root: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let dir = root.join("tmp");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{}-{count}", nonce()?));
        let file = match Writing::create(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Nothing above it: where the store is away, nothing must be written in its place.
                disk::make_dir(&dir).at("creating", &dir)?;
                Writing::create(&path)
            }
            other => other,
        }
        .at("creating", &path)?;
        Ok(Temporary { path, file })
    }

    pub(super) fn file(&mut self) -> &mut Writing {
        &mut self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the bytes durable and the file read-only, then links it to `target`. False when `target` exists already
    /// with other bytes.
    pub(super) fn link(&mut self, target: &Path) -> Result<bool> {
        match self.claim(target, &NAMING)? {
            None => Ok(true),
            Some(there) => self.is_same_as(there, target),
        }
    }

    /// Gives it the name `target` in one of the ways of `naming`; what has that name already, if it may be another file.
    fn claim(&self, target: &Path, naming: &[Name]) -> Result<Option<File>> {
        self.file.seal().at("setting the mode of", &self.path)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let mut made_parent = !parent.exists();
        if made_parent {
            // The disk is waited for once, not for one after the other.
            std::thread::scope(|scope| {
                let made = scope.spawn(|| make_dirs(parent));
                self.file.sync().at("syncing", &self.path)?;
                made.join().unwrap_or_else(|_| make_dirs(parent))
            })?;
        } else {
            self.file.sync().at("syncing", &self.path)?;
        }
        for name in naming {
            let mut named = name(&self.path, target);
            if named.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) && !made_parent {
                make_dirs(parent)?;
                made_parent = true;
                named = name(&self.path, target);
            }
            let Err(error) = named else {
                sync_dir(parent)?;
                return Ok(None);
            };
            // Through open handles only, which are asked of the server.
            if let Ok(there) = File::open(target) {
                let (ours, theirs) = (self.file.metadata(), there.metadata());
                let same = ours.ok().zip(theirs.ok()).is_some_and(|(a, b)| (a.dev(), a.ino()) == (b.dev(), b.ino()));
                return Ok((!same).then_some(there));
            }
            if !is_missing(&error) {
                return Err(Error::io("publishing", target, error));
            }
        }
        let what = "its file system has neither hard links nor renames that never replace";
        Err(Error::new(Kind::Unsupported, format!("{} cannot be published: {what}", target.display()))
            .hint("put the store on another file system, or share this one in another way: NFS has hard links"))
    }

    /// True when `there`, the file at `target`, has the same bytes.
    fn is_same_as(&mut self, mut there: File, target: &Path) -> Result<bool> {
        let theirs = there.metadata().at("reading", target)?.len();
        if self.file.metadata().at("reading", &self.path)?.len() != theirs {
            return Ok(false);
        }
        let mut bytes = (Vec::new(), Vec::new());
        let ours = self.file.file();
        ours.rewind().and_then(|()| ours.read_to_end(&mut bytes.0)).at("reading", &self.path)?;
        there.read_to_end(&mut bytes.1).at("reading", target)?;
        Ok(bytes.0 == bytes.1)
    }

    /// Links it to `target`, the name of something content-addressed. When the name is taken by what is not `sound`,
    /// that is replaced: the right bytes are known, so nothing can be lost, and who has it open keeps what was there.
    pub(super) fn link_or_repair(&self, target: &Path, sound: impl FnOnce() -> bool) -> Result<()> {
        if self.claim(target, &NAMING)?.is_none() || sound() {
            return Ok(());
        }
        tracing::warn!(object = %target.display(), "a damaged object is replaced by a sound one");
        disk::rename(&self.path, target).at("replacing", target)?;
        sync_dir(target.parent().unwrap_or(Path::new("/")))
    }
}

/// How files get their names on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// By hard links.
    ByLinks,
    /// By renames that never replace.
    ByRenames,
}

/// What came of publishing something for a try.
#[derive(Debug, Clone, Copy)]
pub struct Tried {
    /// How it got its name.
    pub named: Named,
    /// When it was made, by the clock of the store's server.
    pub server: SystemTime,
    /// The time here, just before.
    pub before: SystemTime,
    /// The time here, just after.
    pub after: SystemTime,
}

impl Store {
    /// Gives a file a name in `tmp/` as if it were published, and takes it away again.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] when a name that is taken can be given again: nothing may be published there.
    pub fn try_publishing(&self) -> Result<Tried> {
        self.require_writable()?;
        let before = SystemTime::now();
        let mut file = Temporary::create(&self.root)?;
        let after = SystemTime::now();
        let server = file.file.metadata().and_then(|meta| meta.modified()).at("reading", &file.path)?;
        file.file.write_all(b"made by envfabric for a try").at("writing", &file.path)?;
        let target = self.tmp().join(format!("{}-try", nonce()?));
        let named = match file.claim(&target, &NAMING[..1]) {
            Err(error) if error.kind() == Kind::Unsupported => {
                file.claim(&target, &NAMING[1..]).map(|_| Named::ByRenames)
            }
            other => other.map(|_| Named::ByLinks),
        };
        let again = named.and_then(|named| Ok((named, written(&self.root, b"another")?.link(&target)?)));
        let _ = disk::remove(&target);
        match again? {
            (named, false) => Ok(Tried { named, server, before, after }),
            (_, true) => {
                let what = format!("the file system of {} gives a name that is taken again", self.root.display());
                Err(Error::new(Kind::Corrupt, what).hint("do not build into it: versions could replace one another"))
            }
        }
    }
}

/// A way to give a file another name that fails when the name is taken.
type Name = fn(&Path, &Path) -> io::Result<()>;

/// The ways there are, the better one first.
const NAMING: [Name; 2] = [disk::link, disk::rename_new];

/// Gives `from` the name `to` too, or, where there are no second names, instead; never replaces.
pub(super) fn name_again(from: &Path, to: &Path) -> io::Result<()> {
    match disk::link(from, to) {
        Err(error) if is_missing(&error) => disk::rename_new(from, to),
        other => other,
    }
}

/// True for how file systems say that they cannot do what was asked: vfat and sshfs EPERM, FUSE ENOSYS, SMB EOPNOTSUPP;
/// EINVAL is for the flag of a rename.
fn is_missing(error: &io::Error) -> bool {
    let missing = [libc::EPERM, libc::ENOSYS, libc::EOPNOTSUPP, libc::EINVAL];
    error.raw_os_error().is_some_and(|errno| missing.contains(&errno))
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // A linked name keeps the bytes, a renamed file is not here; an error leaves a stray file in tmp/.
        let _ = disk::remove(&self.path);
    }
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    match disk::sync_dir(dir) {
        // Some network file systems do not fsync directories; they make names durable with the reply.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EBADF)) => Ok(()),
        other => other.at("syncing", dir),
    }
}

/// Makes `dir` and what is missing above it, durably.
pub(super) fn make_dirs(dir: &Path) -> Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|d| !d.exists()).collect();
    missing.iter().rev().try_for_each(|dir| disk::make_dir(dir).at("creating", dir))?;
    missing.iter().filter_map(|made| made.parent()).try_for_each(sync_dir)
}

/// Publishes `bytes` as `target`; false when something else has that name already.
pub(super) fn bytes(root: &Path, target: &Path, bytes: &[u8]) -> Result<bool> {
    written(root, bytes)?.link(target)
}

/// Puts `bytes` in the place of what is called `target`. For what says the same and more: whoever reads at that moment
/// gets the one or the other.
pub(super) fn replace(root: &Path, target: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = written(root, bytes)?;
    temporary.file.seal().at("setting the mode of", &temporary.path)?;
    temporary.file.sync().at("syncing", &temporary.path)?;
    disk::rename(&temporary.path, target).at("replacing", target)?;
    sync_dir(target.parent().unwrap_or(Path::new("/")))
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
    let mut hasher = ChunkHasher::default();
    let mut size = 0;
    read_through(&mut file, path, CHUNK_SIZE, |bytes| {
        hasher.update(bytes);
        size += bytes.len() as u64;
        Ok(())
    })?;
    Ok((size, hasher.finish()))
}

/// Hands everything in `input` (the file at `path`) to `take`, in pieces of `piece` bytes; the last may be shorter.
pub(super) fn read_through(
    input: &mut File,
    path: &Path,
    piece: u64,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = Vec::with_capacity(piece as usize);
    loop {
        buffer.clear();
        Read::by_ref(input).take(piece).read_to_end(&mut buffer).at("reading", path)?;
        if buffer.is_empty() {
            return Ok(());
        }
        take(&buffer)?;
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
        assert!(!bytes(root.path(), &target, b"other").unwrap(), "as long");
        assert!(!bytes(root.path(), &target, b"second").unwrap());
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn whatever_link_reports_a_document_is_ours_when_its_bytes_are_there() {
        const DONE_BUT: [Name; 3] = [
            |from, to| fs::hard_link(from, to).and(Err(io::ErrorKind::AlreadyExists.into())),
            // A copy has another inode, as every name has where files are numbered by path.
            |from, to| fs::copy(from, to).and(Err(io::ErrorKind::AlreadyExists.into())),
            |from, to| fs::copy(from, to).and(Err(io::Error::from_raw_os_error(libc::EPERM))),
        ];
        for (i, link) in DONE_BUT.into_iter().enumerate() {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("1.json");
            let mut ours = written(root.path(), b"with a nonce").unwrap();
            let there = ours.claim(&target, &[link, disk::rename_new]).unwrap();
            assert_eq!(there.is_none(), i == 0, "only an inode tells at once");
            assert!(there.is_none_or(|there| ours.is_same_as(there, &target).unwrap()));
        }
    }

    #[test]
    fn without_hard_links_a_rename_that_never_replaces_gives_the_name() {
        let lacks: Name = |_, _| Err(io::Error::from_raw_os_error(libc::EPERM));
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("envs/1.json");
        assert!(written(root.path(), b"first").unwrap().claim(&target, &[lacks, disk::rename_new]).unwrap().is_none());
        let mut second = written(root.path(), b"other").unwrap();
        let there = second.claim(&target, &[lacks, disk::rename_new]).unwrap().expect("the name is taken");
        assert!(!second.is_same_as(there, &target).unwrap());
        // As when another builder takes the name in between.
        assert_eq!(disk::rename_new(&second.path, &target).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        drop(second);
        assert_eq!(fs::read(&target).unwrap(), b"first");
        assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);

        let no_flags: Name = |_, _| Err(io::Error::from_raw_os_error(libc::EINVAL));
        let other = root.path().join("envs/2.json");
        let error = written(root.path(), b"x").unwrap().claim(&other, &[lacks, no_flags]).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("neither hard links nor renames") && !other.exists(), "{error}");
    }

    #[test]
    fn a_try_tells_how_names_are_given_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path()).unwrap();
        let tried = store.try_publishing().unwrap();
        assert_eq!(tried.named, Named::ByLinks);
        let slack = std::time::Duration::from_secs(1);
        assert!(tried.before - slack < tried.server && tried.server < tried.after + slack);
        assert_eq!(fs::read_dir(store.tmp()).unwrap().count(), 0);
    }
}
