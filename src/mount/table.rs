//! Our mounts as the kernel lists them, and who uses them.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};
use crate::view::mountinfo::{self, MountLine};

/// File system type of our mounts.
pub(super) const FS_TYPE: &str = "fuse.envfabric";
/// The source of a mount is this and the path of the store.
pub(super) const SOURCE: &str = "envfabric:";

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
}

/// Every mount of ours that this process sees, bind mounts included, in the order they were mounted.
pub fn mounts() -> Result<Vec<MountInfo>> {
    Ok(lines()?.iter().filter_map(ours).collect())
}

pub(super) fn lines() -> Result<Vec<MountLine>> {
    let path = Path::new("/proc/self/mountinfo");
    Ok(mountinfo::parse(&fs::read(path).at("reading", path)?))
}

pub(super) fn ours(line: &MountLine) -> Option<MountInfo> {
    let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    let store = line.source.strip_prefix(SOURCE.as_bytes()).filter(|_| line.fs_type == FS_TYPE)?;
    Some(MountInfo {
        mount_point: line.mount_point_path(),
        store: path(store),
        root: path(&line.root),
        dev: line.dev,
        id: line.id,
    })
}

/// The mount on top at `dir`, which must be absolute and without symbolic links.
pub(super) fn on_top(dir: &Path) -> Result<Option<MountLine>> {
    Ok(lines()?.into_iter().rfind(|line| line.mount_point_path() == dir))
}

/// `dir` as the kernel lists it, without asking the file system that is mounted there: it may be dead.
pub(super) fn absolute(dir: &Path) -> Result<PathBuf> {
    let dir = std::path::absolute(dir).at("finding", dir)?;
    match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) if name != ".." => match parent.canonicalize() {
            Ok(parent) => {
                let here = parent.join(name);
                // A symbolic link to the mount point; to read one never asks what it points to.
                match fs::read_link(&here) {
                    Ok(target) => absolute(&parent.join(target)),
                    Err(_) => Ok(here),
                }
            }
            Err(_) => Ok(dir),
        },
        _ => Ok(dir),
    }
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
