//! A mount against a copy of it in a tmpfs that is mounted read-only: the same answer to every system call but for a list.
//!
//! `tests/posix/probes.py` asks; `docs/posix.md` has the list, each difference with its reason, and is compared here.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::*;
use envfabric::mount::{Options, mount};
use envfabric::store::Codec;
use nix::mount::{MntFlags, MsFlags};

/// A file system in memory, for as long as this is kept.
struct Local(PathBuf);

impl Local {
    fn mount(dir: PathBuf) -> Local {
        let mounted = nix::mount::mount(Some("tmpfs"), &dir, Some("tmpfs"), Local::FLAGS, Some("mode=0755"));
        mounted.unwrap();
        Local(dir)
    }

    /// As the mount is: the file system itself, not only this way to it.
    fn becomes_read_only(&self) {
        let flags = Local::FLAGS | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
        nix::mount::mount(None::<&str>, &self.0, None::<&str>, flags, None::<&str>).unwrap();
    }

    const FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// What came of every probe of `tree`, by name, as root or as a user without rights.
fn probed(tree: &Path, scratch: &Path, root: bool) -> BTreeMap<String, String> {
    let probes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/posix/probes.py");
    let mut command = Command::new("setpriv");
    match root {
        true => command.arg("--no-new-privs"),
        false => command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]),
    };
    let output =
        command.args(["/usr/bin/python3", "-B"]).arg(probes).arg(tree).arg(scratch).current_dir("/").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let told: Vec<(&str, &str)> = text.lines().map(|line| line.split_once('\t').unwrap()).collect();
    let by_name: BTreeMap<String, String> =
        told.iter().map(|(what, came)| (what.to_string(), came.to_string())).collect();
    assert_eq!(by_name.len(), told.len(), "no two probes have one name");
    by_name
}

/// The rows of the list: what a probe's name begins or ends with, what the mount says, what a local disk says.
fn differences() -> Vec<[String; 3]> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/posix.md")).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let cells = |row: &str| -> Vec<String> {
        row.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_string()).collect()
    };
    rows.map(|row| <[String; 4]>::try_from(cells(row)).unwrap())
        .map(|[what, here, there, _]| [what, here, there])
        .collect()
}

/// `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => text.len() >= head.len() + tail.len() && text.starts_with(head) && text.ends_with(tail),
    }
}

fn publish(fixture: &Fixture) {
    let mut layers = fixture.packages();
    let mut staged = vec![
        link(format!("{SITE}/links/dangling"), "nowhere"),
        link(format!("{SITE}/links/loop"), "loop"),
        link(format!("{SITE}/links/dir"), "../alpha"),
    ];
    staged.extend((0..3000).map(|n| file(format!("{SITE}/many/a-name-among-many-{n:05}"), "")));
    layers.push(fixture.layer("links", staged));
    fixture.publish("demo/a", layers);
}

#[test]
fn every_call_says_what_it_says_of_a_local_tree_that_is_mounted_read_only() {
    needs_mounts!();
    let listed = differences();
    assert!(listed.len() > 1, "the list was not found");
    let mut needed = BTreeSet::new();
    let mut wrong = Vec::new();
    for (codec, passthrough) in [(Codec::Raw, true), (Codec::Raw, false), (Codec::Zstd, true)] {
        let fixture = Fixture::with(codec);
        fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        publish(&fixture);
        let cache = envfabric::cache::Options::at(fixture.place("cache"));
        let options = Options { passthrough, cache: Some(cache), ..Options::at(fixture.dir.path().join("m")) };
        let mounted = mount(fixture.store.clone(), fixture.index.clone(), &options).unwrap();
        let served = mounted.mount_point().join("demo/a/.versions/1/.venv");
        let local = Local::mount(fixture.place("local"));
        let copied = Command::new("cp").arg("-aT").arg(&served).arg(&local.0).status().unwrap();
        assert!(copied.success());
        local.becomes_read_only();
        for root in [true, false] {
            let scratch = fixture.place(if root { "scratch-root" } else { "scratch-user" });
            fs::set_permissions(&scratch, fs::Permissions::from_mode(0o777)).unwrap();
            let [here, there] = [&served, &local.0].map(|tree| probed(tree, &scratch, root));
            assert_eq!(here.keys().collect::<Vec<_>>(), there.keys().collect::<Vec<_>>());
            for (what, came) in here.iter().filter(|(what, came)| there[*what] != **came) {
                let is_listed = |row: &&[String; 3]| {
                    matches(&row[0], what) && matches(&row[1], came) && matches(&row[2], &there[what])
                };
                match listed.iter().find(is_listed) {
                    Some(row) => {
                        needed.insert(row.clone());
                    }
                    None => {
                        wrong.push(format!("{codec:?} {passthrough} root {root}: {what}: {came}, not {}", there[what]))
                    }
                }
            }
            assert!(here.len() > 1500, "{} probes", here.len());
        }
        drop(local);
        mounted.unmount().unwrap();
    }
    assert!(wrong.is_empty(), "{} answers differ:\n{}", wrong.len(), wrong.join("\n"));
    let idle: Vec<_> = listed.iter().filter(|row| !needed.contains(*row)).collect();
    assert!(idle.is_empty(), "listed and not so: {idle:?}");
}
