//! What `/proc/<pid>/mountinfo` says, and where in it a directory of ours is to be reached.
//!
//! Pure functions of the text; see proc_pid_mountinfo(5).

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of a mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLine {
    /// Mount id.
    pub id: u32,
    /// Mount id of the mount that this one is on.
    pub parent: u32,
    /// Device, major and minor.
    pub dev: (u32, u32),
    /// What of the file system is mounted: a path inside it.
    pub root: Vec<u8>,
    /// Where it is mounted, as the process sees it.
    pub mount_point: Vec<u8>,
    /// File system type, `fuse.envfabric`.
    pub fs_type: String,
    /// Source, whatever the file system put there.
    pub source: Vec<u8>,
}

impl MountLine {
    /// [`MountLine::mount_point`] as a path.
    pub fn mount_point_path(&self) -> PathBuf {
        std::ffi::OsString::from_vec(self.mount_point.clone()).into()
    }
}

/// Reads the text of a mountinfo, in its order; lines that cannot be understood are left out.
pub fn parse(text: &[u8]) -> Vec<MountLine> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|b| *b == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u32>().ok();
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let dev = (major.parse().ok()?, minor.parse().ok()?);
    let root = fields.next()?;
    // A directory whose entry was dropped while it was mounted elsewhere; it is still that directory.
    let root = unescape(root.strip_suffix(b"//deleted").unwrap_or(root));
    let mount_point = unescape(fields.next()?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next().unwrap_or_default());
    Some(MountLine { id, parent, dev, root, mount_point, fs_type, source })
}

/// `\040` is a space; so are tab, newline, backslash and `#` written.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|d| *first == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match octal.map(|d| d.iter().fold(0u32, |n, c| n * 8 + u32::from(c - b'0'))) {
            Some(byte) if byte < 256 => {
                out.push(byte as u8);
                rest = &after[3..];
            }
            _ => {
                out.push(*first);
                rest = after;
            }
        }
    }
    out
}

/// `path` relative to `base`, both absolute, by whole components.
fn below<'p>(path: &'p [u8], base: &[u8]) -> Option<&'p [u8]> {
    if base == b"/" {
        return path.strip_prefix(b"/");
    }
    match path.strip_prefix(base)? {
        b"" => Some(b""),
        rest => rest.strip_prefix(b"/"),
    }
}

fn join(base: &[u8], rest: &[u8]) -> Vec<u8> {
    match (base, rest) {
        (_, b"") => base.to_vec(),
        (b"/", _) => [b"/", rest].concat(),
        _ => [base, b"/", rest].concat(),
    }
}

/// Where the process that sees `mounts` reaches directory `inside` (a path inside the file system on device `dev`).
///
/// Mounts that another mount hides are only taken when there is no other; among the rest the one at `preferred` is
/// taken where it is there, else the first. None when no mount of the device reaches the directory.
pub fn reach(mounts: &[MountLine], dev: (u32, u32), inside: &[u8], preferred: &Path) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let preferred = preferred.as_os_str().as_bytes();
    let candidates = mounts.iter().enumerate().filter(|(_, mount)| mount.dev == dev).filter_map(|(at, mount)| {
        let path = join(&mount.mount_point, below(inside, &mount.root)?);
        let rank = (is_hidden(mounts, at, &path), mount.mount_point != preferred, at);
        Some((rank, path))
    });
    candidates.min_by_key(|(rank, _)| *rank).map(|(_, path)| path)
}

/// True when something is mounted over `path`, which mount number `at` shows, or over a directory on the way to it.
fn is_hidden(mounts: &[MountLine], at: usize, path: &[u8]) -> bool {
    let covers = |mount: &MountLine, path: &[u8], other: &MountLine| {
        other.parent == mount.id && other.id != mount.id && below(path, &other.mount_point).is_some()
    };
    if mounts.iter().any(|other| covers(&mounts[at], path, other)) {
        return true;
    }
    // Up through the mounts that this one stands on: a sibling that came later may lie over the way to it. The count
    // ends it even where a damaged text makes a circle.
    let mut at = at;
    for _ in 0..mounts.len() {
        let mount = &mounts[at];
        let Some(on) = mounts.iter().position(|m| m.id == mount.parent && m.id != mount.id) else { return false };
        if mounts.iter().skip(at + 1).any(|other| covers(&mounts[on], &mount.mount_point, other)) {
            return true;
        }
        at = on;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n";

    #[test]
    fn home_follows_the_caller_to_whatever_mount_it_sees() {
        // (name, mountinfo behind the root line, where /wf/node/.versions/3 is)
        let table: &[(&str, &str, Option<&str>)] = &[
            ("whole", "30 21 0:57 / /mnt rw - fuse.envfabric x ro", Some("/mnt/wf/node/.versions/3")),
            ("workflow", "30 21 0:57 /wf /w rw - fuse.envfabric x ro", Some("/w/node/.versions/3")),
            ("environment", "30 21 0:57 /wf/node /env rw - fuse.envfabric x ro", Some("/env/.versions/3")),
            ("version", "30 21 0:57 /wf/node/.versions/3 /v rw - fuse.envfabric x ro", Some("/v")),
            ("chroot at version", "30 21 0:57 /wf/node/.versions/3 / rw - fuse.envfabric x ro", Some("/")),
            ("chroot at whole", "30 21 0:57 / / rw - fuse.envfabric x ro", Some("/wf/node/.versions/3")),
            (
                "optional fields",
                "30 21 0:57 / /mnt rw shared:7 master:2 - fuse.envfabric x ro",
                Some("/mnt/wf/node/.versions/3"),
            ),
            (
                "spaces",
                "30 21 0:57 / /my\\040mount\\134x rw - fuse.envfabric x ro",
                Some("/my mount\\x/wf/node/.versions/3"),
            ),
            ("deleted", "30 21 0:57 /wf/node//deleted /env rw - fuse.envfabric x ro", Some("/env/.versions/3")),
            ("another version", "30 21 0:57 /wf/node/.versions/2 /v rw - fuse.envfabric x ro", None),
            ("another with our prefix", "30 21 0:57 /wf/no /v rw - fuse.envfabric x ro", None),
            ("below .python", "30 21 0:57 /wf/node/.versions/3/.venv /v rw - fuse.envfabric x ro", None),
            ("another device", "30 21 0:58 / /mnt rw - fuse.envfabric x ro", None),
            ("none", "", None),
            ("nonsense", "x y z\n30 21 0:57\n\n30", None),
        ];
        for (name, text, expected) in table {
            let mounts = parse(format!("{BASE}{text}\n").as_bytes());
            let found = reach(&mounts, (0, 57), b"/wf/node/.versions/3", Path::new("/nowhere"));
            assert_eq!(found.as_deref(), expected.map(str::as_bytes), "{name}");
        }
    }

    #[test]
    fn hidden_mounts_are_taken_only_when_there_is_no_other() {
        let whole = "30 21 0:57 / /mnt rw - fuse.envfabric x ro\n";
        let bind = "31 21 0:57 /wf /bind rw - fuse.envfabric x ro\n";
        let table = [
            ("the preferred of two", format!("{bind}{whole}"), "/mnt/wf/node/.versions/3"),
            ("stacked over", format!("{whole}32 30 0:9 / /mnt rw - tmpfs t rw\n{bind}"), "/bind/node/.versions/3"),
            ("over the way to it", format!("{whole}32 30 0:9 / /mnt/wf rw - tmpfs t rw\n{bind}"), "/bind/node/.versions/3"),
            ("beside it", format!("{whole}32 30 0:9 / /mnt/other rw - tmpfs t rw\n{bind}"), "/mnt/wf/node/.versions/3"),
            ("a directory above", format!("{whole}32 21 0:9 / / rw - tmpfs t rw\n"), "/mnt/wf/node/.versions/3"),
            (
                "a mount later over a directory above",
                "30 21 0:57 / /a/mnt rw - fuse x x\n31 21 0:57 /wf /bind rw - fuse x x\n32 21 0:9 / /a rw - tmpfs t t\n".into(),
                "/bind/node/.versions/3",
            ),
            (
                "mounted over another of ours",
                "30 21 0:57 / /a rw - fuse x x\n31 30 0:57 /wf /a rw - fuse x x\n".into(),
                "/a/node/.versions/3",
            ),
        ];
        for (name, text, expected) in table {
            let mounts = parse(format!("{BASE}{text}").as_bytes());
            let found = reach(&mounts, (0, 57), b"/wf/node/.versions/3", Path::new("/mnt")).unwrap();
            assert_eq!(String::from_utf8(found).unwrap(), expected, "{name}");
        }
    }
}
