//! Our mounts as the kernel lists them, and who uses them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};
use crate::view::mountinfo::{self, MountLine};

/// File system type of our mounts.
pub(super) const FS_TYPE: &str = "fuse.envfabric";
/// The source of a mount is this and the path of the store.
pub(super) const SOURCE: &str = "envfabric:";
/// The same of a trial, which nobody but its build may use.
pub(super) const TRIAL_SOURCE: &str = "envfabric-trial:";

/// Symbolic links that are followed to a mount point, as many as the kernel follows.
const LINKS_MAX: usize = 40;

/// A mount of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// Where it is.
    pub mount_point: PathBuf,
    /// The store that it serves.
    pub store: PathBuf,
    /// What of it is mounted: `/`, or a directory in it (a bind mount).
    pub root: PathBuf,
    /// Device number, major and minor.
    pub dev: (u32, u32),
    /// The kernel's number of the mount.
    pub id: u32,
    /// User and group that mounted it.
    pub owner: Option<(u32, u32)>,
}

/// Every mount of ours that this process sees, bind mounts included and trials not, in the order they were mounted.
pub fn mounts() -> Result<Vec<MountInfo>> {
    Ok(lines()?.iter().filter_map(ours).collect())
}

pub(super) fn lines() -> Result<Vec<MountLine>> {
    let path = Path::new("/proc/self/mountinfo");
    Ok(mountinfo::parse(&fs::read(path).at("reading", path)?))
}

pub(super) fn ours(line: &MountLine) -> Option<MountInfo> {
    with_source(line, SOURCE)
}

/// As [`ours`], for a trial.
pub(super) fn trial(line: &MountLine) -> Option<MountInfo> {
    with_source(line, TRIAL_SOURCE)
}

/// As [`ours`], trials too.
pub(super) fn of_this_program(line: &MountLine) -> Option<MountInfo> {
    ours(line).or_else(|| trial(line))
}

fn with_source(line: &MountLine, source: &str) -> Option<MountInfo> {
    let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let store = line.source.strip_prefix(source.as_bytes()).filter(|_| line.fs_type == FS_TYPE)?;
    let number = |name: &str| line.options.split(',').find_map(|option| option.strip_prefix(name)?.parse().ok());
    Some(MountInfo {
        mount_point: line.mount_point_path(),
        store: path(store),
        root: path(&line.root),
        dev: line.dev,
        id: line.id,
        owner: number("user_id=").zip(number("group_id=")),
    })
}

/// The mount on top at `dir`, which must be absolute and without symbolic links.
pub(super) fn on_top(dir: &Path) -> Result<Option<MountLine>> {
    Ok(lines()?.into_iter().rfind(|line| line.mount_point_path() == dir))
}

/// The mount of ours at `dir`, where there is one: a whole one, and not a part of one that is bound there.
///
/// A dead mount is found, too: nothing that is mounted at `dir` is asked.
pub fn find(dir: &Path) -> Result<Option<MountInfo>> {
    let here = absolute(dir)?;
    let mount = on_top(&here)?.and_then(|line| ours(&line));
    Ok(mount.filter(|mount| mount.root == Path::new("/")))
}

/// `dir` as the kernel lists it, without asking the file system that is mounted there: it may be dead.
pub(super) fn absolute(dir: &Path) -> Result<PathBuf> {
    let mut at = std::path::absolute(dir).at("finding", dir)?;
    for _ in 0..LINKS_MAX {
        let (parent, name) = match (at.parent(), at.file_name()) {
            (Some(parent), Some(name)) => match parent.canonicalize() {
                Ok(parent) => (parent, name),
                Err(_) => return Ok(at),
            },
            _ => return Ok(at),
        };
        let here = parent.join(name);
        // A symbolic link to the mount point; to read one never asks what it points to.
        match fs::read_link(&here) {
            Ok(target) => at = parent.join(target),
            Err(_) => return Ok(here),
        }
    }
    Err(Error::io("finding", dir, std::io::Error::from_raw_os_error(libc::ELOOP)))
}

/// A process that uses a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) pid: u32,
    pub(super) command: String,
}

/// Up to `most` processes that use `mount`, as far as this process may look.
pub(super) fn users(mount: &MountInfo, most: usize) -> Vec<User> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.filter(|pid| uses(*pid, mount)).map(|pid| User { pid, command: command(pid) });
    found.take(most).collect()
}

/// Only what procfs itself knows is looked at: the file system may not answer.
fn uses(pid: u32, mount: &MountInfo) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let stands_in =
        |what: &str| fs::read_link(process.join(what)).is_ok_and(|path| path.starts_with(&mount.mount_point));
    if ["cwd", "root", "exe"].into_iter().any(stands_in) {
        return true;
    }
    let mnt_id = format!("mnt_id:\t{}", mount.id);
    let holds = |entry: fs::DirEntry| {
        fs::read_to_string(entry.path()).is_ok_and(|text| text.lines().any(|line| line == mnt_id))
    };
    if fs::read_dir(process.join("fdinfo")).is_ok_and(|entries| entries.flatten().any(holds)) {
        return true;
    }
    let dev = format!("{:02x}:{:02x}", mount.dev.0, mount.dev.1);
    fs::read(process.join("maps")).is_ok_and(|maps| {
        let mut lines = maps.split(|b| *b == b'\n');
        lines.any(|line| line.split(|b| *b == b' ').filter(|f| !f.is_empty()).nth(3) == Some(dev.as_bytes()))
    })
}

fn command(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&line).replace('\0', " ");
    match text.trim() {
        "" => fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_string(),
        text => text.chars().take(60).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_mount_point_is_found_through_links_and_a_circle_of_them_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("a/b")).unwrap();
        let links = [("l1", "a/b"), ("l2", "l1"), ("a/up", "../l2"), ("whole", "a"), ("c1", "c2"), ("c2", "c1")];
        links.iter().for_each(|(name, target)| symlink(target, root.join(name)).unwrap());
        symlink(root.join("a/b"), root.join("absolute")).unwrap();
        let table = [
            ("a/b", "a/b"),
            ("a/./b/", "a/b"),
            ("l2", "a/b"),
            ("a/up", "a/b"),
            ("absolute", "a/b"),
            ("whole/b", "a/b"),
            ("a/missing", "a/missing"),
            ("missing/x", "missing/x"),
        ];
        for (given, expected) in table {
            assert_eq!(absolute(&root.join(given)).unwrap(), root.join(expected), "{given}");
            assert_eq!(find(&root.join(given)).unwrap(), None);
        }
        assert_eq!(absolute(&root.join("c1")).unwrap_err().errno(), libc::ELOOP);
        assert_eq!(absolute(Path::new("/")).unwrap(), Path::new("/"));
    }
}
