//! The one place where a store is written: every call that changes something of it passes here.
//!
//! So a test can see, in order, what a command does to a store, make any of it fail, or end the process before or after
//! it ([`watch`]). Without a watcher this costs one look at a flag.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// One change of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A new, empty file.
    Create(PathBuf),
    /// Bytes of a file that is not finished, so many.
    Write(PathBuf, usize),
    /// A file's bytes are made durable.
    Sync(PathBuf),
    /// A file is made read-only.
    Seal(PathBuf),
    /// A second name for a file; never replaces.
    Link(PathBuf, PathBuf),
    /// Another name for a file; never replaces.
    RenameNew(PathBuf, PathBuf),
    /// Another name for a file, instead of what has it.
    Rename(PathBuf, PathBuf),
    /// A name goes.
    Remove(PathBuf),
    /// A directory is made.
    MakeDir(PathBuf),
    /// An empty directory goes.
    RemoveDir(PathBuf),
    /// The names in a directory are made durable.
    SyncDir(PathBuf),
    /// A file's time becomes the server's present.
    Touch(PathBuf),
}

impl Op {
    /// The path that tells to which store it belongs.
    pub fn path(&self) -> &Path {
        match self {
            Op::Create(path) | Op::Write(path, _) | Op::Sync(path) | Op::Seal(path) | Op::Remove(path) => path,
            Op::Link(path, _) | Op::RenameNew(path, _) | Op::Rename(path, _) => path,
            Op::MakeDir(path) | Op::RemoveDir(path) | Op::SyncDir(path) | Op::Touch(path) => path,
        }
    }
}

/// What a watcher lets happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// What was asked for.
    Do,
    /// Nothing, and this errno.
    Fail(i32),
    /// What was asked for, and this errno all the same: the reply of a server got lost.
    DoAndFail(i32),
    /// Nothing, but it is reported as done: a disk that lies about `fsync`.
    Pretend,
    /// Half of a write.
    Short,
}

/// Sees every change of a store.
pub trait Watch: Send + Sync {
    /// Asked before.
    fn before(&self, op: &Op) -> Verdict;

    /// Told after what was done without an error.
    fn done(&self, op: &Op);
}

static WATCHED: AtomicBool = AtomicBool::new(false);
static WATCHES: RwLock<Vec<(PathBuf, Arc<dyn Watch>)>> = RwLock::new(Vec::new());

/// Lets `watch` see all changes below `root` by this process, until what this returns is dropped.
pub fn watch(root: &Path, watch: Arc<dyn Watch>) -> Watching {
    let mut watches = WATCHES.write().unwrap_or_else(PoisonError::into_inner);
    watches.push((root.to_path_buf(), watch));
    WATCHED.store(true, Ordering::SeqCst);
    Watching(root.to_path_buf())
}

/// See [`watch`].
#[derive(Debug)]
pub struct Watching(PathBuf);

impl Drop for Watching {
    fn drop(&mut self) {
        let mut watches = WATCHES.write().unwrap_or_else(PoisonError::into_inner);
        watches.retain(|(root, _)| *root != self.0);
        WATCHED.store(!watches.is_empty(), Ordering::SeqCst);
    }
}

fn run<T: Default>(op: impl FnOnce() -> Op, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    run_in_part(op, |_| act())
}

/// `act` is told whether to do only a part.
fn run_in_part<T: Default>(op: impl FnOnce() -> Op, act: impl FnOnce(bool) -> io::Result<T>) -> io::Result<T> {
    if !WATCHED.load(Ordering::Relaxed) {
        return act(false);
    }
    let op = op();
    let watcher = {
        let watches = WATCHES.read().unwrap_or_else(PoisonError::into_inner);
        watches.iter().find(|(root, _)| op.path().starts_with(root)).map(|(_, watch)| watch.clone())
    };
    let Some(watcher) = watcher else { return act(false) };
    match watcher.before(&op) {
        Verdict::Fail(errno) | Verdict::DoAndFail(errno) if matches!(op, Op::Create(_)) => {
            Err(io::Error::from_raw_os_error(errno))
        }
        Verdict::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
        Verdict::Pretend => Ok(T::default()),
        Verdict::DoAndFail(errno) => {
            act(false)?;
            watcher.done(&op);
            Err(io::Error::from_raw_os_error(errno))
        }
        verdict @ (Verdict::Do | Verdict::Short) => {
            let done = act(verdict == Verdict::Short)?;
            watcher.done(&op);
            Ok(done)
        }
    }
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Writing {
    file: File,
    path: PathBuf,
}

impl Writing {
    /// A new, empty file.
    pub(super) fn create(path: &Path) -> io::Result<Writing> {
        let open = || OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(path).map(Some);
        // What cannot be pretended: there has to be a file to write to.
        let file = run(|| Op::Create(path.to_path_buf()), open)?.ok_or(io::ErrorKind::Other)?;
        Ok(Writing { file, path: path.to_path_buf() })
    }

    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// The same file, for another owner.
    pub(super) fn try_clone(&self) -> io::Result<Writing> {
        Ok(Writing { file: self.file.try_clone()?, path: self.path.clone() })
    }

    pub(super) fn metadata(&self) -> io::Result<fs::Metadata> {
        self.file.metadata()
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        run(|| Op::Sync(self.path.clone()), || self.file.sync_all())
    }

    /// Makes it read-only.
    pub(super) fn seal(&self) -> io::Result<()> {
        run(|| Op::Seal(self.path.clone()), || self.file.set_permissions(fs::Permissions::from_mode(0o444)))
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (file, path) = (&mut self.file, &self.path);
        let part = |short| if short { &bytes[..bytes.len().div_ceil(2)] } else { bytes };
        run_in_part(|| Op::Write(path.clone(), bytes.len()), |short| file.write(part(short)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Writing {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Gives a file a second name.
pub(super) fn link(from: &Path, to: &Path) -> io::Result<()> {
    run(|| Op::Link(from.into(), to.into()), || fs::hard_link(from, to))
}

/// Renames; never replaces.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    run(
        || Op::RenameNew(from.into(), to.into()),
        || Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?),
    )
}

/// Renames over what is there.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    run(|| Op::Rename(from.into(), to.into()), || fs::rename(from, to))
}

/// Takes a name away.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    run(|| Op::Remove(path.into()), || fs::remove_file(path))
}

/// Takes an empty directory away.
pub(super) fn remove_dir(path: &Path) -> io::Result<()> {
    run(|| Op::RemoveDir(path.into()), || fs::remove_dir(path))
}

/// Makes one directory; that it is there already is no failure.
pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    let make = || match fs::DirBuilder::new().mode(0o777).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other,
    };
    run(|| Op::MakeDir(path.into()), make)
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    run(|| Op::SyncDir(path.into()), || File::open(path)?.sync_all())
}

/// Makes a file as young as if it had just been written, by the clock of whoever keeps it.
pub(super) fn touch(file: &File, path: &Path) -> io::Result<()> {
    use nix::sys::stat::futimens;
    use nix::sys::time::TimeSpec;
    run(|| Op::Touch(path.into()), || Ok(futimens(file.as_fd(), &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?))
}
