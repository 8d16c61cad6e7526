//! What `/proc/<pid>/mountinfo` says, and where in it a directory of ours is to be reached.
//!
//! Pure functions of the text; see proc_pid_mountinfo(5). The text is another's to make: whoever may mount in a user
//! namespace writes as many lines as `/proc/sys/fs/mount-max` allows, and a session thread reads them. So the work is
//! bounded ([`TEXT_MAX`], `CANDIDATES_MAX`, `DEPTH_MAX`), and beyond that nothing is reached.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A longer text is not looked at, in bytes: some 10,000 mounts.
pub const TEXT_MAX: usize = 1 << 20;
/// With more mounts that show one directory, none is chosen.
const CANDIDATES_MAX: usize = 64;
/// Mounts that stand on one another.
const DEPTH_MAX: usize = 64;

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
    /// Options of the file system, `rw,user_id=0,group_id=0`.
    pub options: String,
}

impl MountLine {
    /// [`MountLine::mount_point`] as a path.
    pub fn mount_point_path(&self) -> PathBuf {
        std::ffi::OsString::from_vec(self.mount_point.clone()).into()
    }
}

/// Who can open the mountinfo of a thread that this process may not look at.
pub trait Elsewhere: std::fmt::Debug + Send + Sync {
    /// The mountinfo of thread `tid`.
    fn mountinfo(&self, tid: u32) -> Option<File>;
}

/// The text of the file at `path`; none when it is longer than [`TEXT_MAX`] or cannot be read.
pub fn read(path: &Path) -> Option<Vec<u8>> {
    read_all(File::open(path).ok()?)
}

/// The text of `file`; none when it is longer than [`TEXT_MAX`] or cannot be read.
pub fn read_all(file: File) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    file.take(TEXT_MAX as u64 + 1).read_to_end(&mut text).ok()?;
    (text.len() <= TEXT_MAX).then_some(text)
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
    let options = String::from_utf8_lossy(rest.next().unwrap_or_default()).into_owned();
    Some(MountLine { id, parent, dev, root, mount_point, fs_type, source, options })
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
/// taken where it is there, else the first. None when no mount of the device reaches the directory, or too many do.
pub fn reach(mounts: &[MountLine], dev: (u32, u32), inside: &[u8], preferred: &Path) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let preferred = preferred.as_os_str().as_bytes();
    let shows = |(at, mount): (usize, &MountLine)| {
        let inside = below(inside, &mount.root).filter(|_| mount.dev == dev)?;
        Some((at, join(&mount.mount_point, inside)))
    };
    let candidates: Vec<_> = mounts.iter().enumerate().filter_map(shows).take(CANDIDATES_MAX + 1).collect();
    if candidates.is_empty() || candidates.len() > CANDIDATES_MAX {
        return None;
    }
    let standing = Standing::of(mounts);
    let mut best = None;
    for (at, path) in candidates {
        let rank = (standing.is_hidden(at, &path)?, mounts[at].mount_point != preferred, at);
        if best.as_ref().is_none_or(|(least, _)| rank < *least) {
            best = Some((rank, path));
        }
    }
    best.map(|(_, path)| path)
}

/// Which mount stands on which.
struct Standing<'m> {
    mounts: &'m [MountLine],
    by_id: HashMap<u32, usize>,
    /// Ascending.
    children: HashMap<u32, Vec<usize>>,
}

impl<'m> Standing<'m> {
    fn of(mounts: &'m [MountLine]) -> Self {
        let mut by_id = HashMap::with_capacity(mounts.len());
        let mut children: HashMap<u32, Vec<usize>> = HashMap::new();
        for (at, mount) in mounts.iter().enumerate() {
            by_id.entry(mount.id).or_insert(at);
            if mount.parent != mount.id {
                children.entry(mount.parent).or_default().push(at);
            }
        }
        Standing { mounts, by_id, children }
    }

    /// True when something that comes after mount `after` and stands on mount `on` lies over `path`.
    fn is_covered(&self, on: u32, path: &[u8], after: Option<usize>) -> bool {
        let children = self.children.get(&on).map(Vec::as_slice).unwrap_or_default();
        let mut children = children.iter().filter(|at| after.is_none_or(|after| **at > after));
        children.any(|at| below(path, &self.mounts[*at].mount_point).is_some())
    }

    /// True when something is mounted over `path`, which mount number `at` shows, or over a directory on the way to it.
    /// None when too many mounts stand on one another to say.
    fn is_hidden(&self, mut at: usize, path: &[u8]) -> Option<bool> {
        if self.is_covered(self.mounts[at].id, path, None) {
            return Some(true);
        }
        // Up through the mounts that this one stands on: a sibling that came later may lie over the way to it. The
        // count ends it even where a damaged text makes a circle.
        for _ in 0..DEPTH_MAX {
            let mount = &self.mounts[at];
            let Some(on) = self.by_id.get(&mount.parent).filter(|_| mount.parent != mount.id) else {
                return Some(false);
            };
            if self.is_covered(mount.parent, &mount.mount_point, Some(at)) {
                return Some(true);
            }
            at = *on;
        }
        None
    }
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

    #[test]
    fn beyond_the_bounds_nothing_is_reached() {
        let ours = |i: u32, parent: u32| format!("{i} {parent} 0:57 / /m rw - f x x\n");
        let reached =
            |text: &str| reach(&parse(text.as_bytes()), (0, 57), b"/wf/node/.versions/3", Path::new("/m")).is_some();
        let lines = |line: &dyn Fn(u32) -> String| BASE.to_string() + &(30..20_030).map(line).collect::<String>();
        assert!(!reached(&lines(&|i| ours(i, 21))), "side by side");
        assert!(!reached(&lines(&|i| ours(i, i.max(31) - 1))), "one on the other");
        let others = |i| format!("{i} {} 0:9 / /m/{i} rw - t t t\n", if i == 30 { 21 } else { i - 1 });
        assert!(!reached(&(lines(&others) + &ours(20_030, 20_029))), "on top of others");
        assert!(
            reached(&(lines(&|i| format!("{i} 21 0:9 / /x/{i} rw - t t t\n")) + &ours(20_030, 21))),
            "beside others"
        );
        assert!(!reached("30 31 0:57 / /m rw - f x x\n31 30 0:9 / /a rw - t t t\n"), "in a circle");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), lines(&|i| format!("{i} 21 0:57 /wf/node /a/rather/long/name{i} rw - f x x\n")))
            .unwrap();
        assert_eq!(read(file.path()), None);
        std::fs::write(file.path(), BASE).unwrap();
        assert_eq!(read(file.path()).as_deref(), Some(BASE.as_bytes()));
    }
}
