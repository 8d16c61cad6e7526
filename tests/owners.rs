//! Owners of workflows: who may look at what of a mount, as the kernel sees to it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::*;
use envfabric::cache;
use envfabric::environment::{Digest, Mode, Owner, SecretKey};
use envfabric::error::Kind;
use envfabric::mount::{Mounted, Options, mount as mount_store};
use envfabric::store::{Store, TrustedKeys};

/// Two ordinary users, and one in the group of the first.
const ALICE: u32 = 4_001;
const BOB: u32 = 4_002;
const CAROL: u32 = 4_003;

/// What may pass between a change and the moment at which everybody is held to it: a second, and what a busy machine takes.
const SEEN: Duration = Duration::from_millis(1_500);

/// A shell of user `uid`, who is in no group but those of its own number and of `gid`.
fn shell(uid: u32, gid: u32, script: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups");
    command.args(["sh", "-c", script]).current_dir("/");
    command
}

fn asked(uid: u32, gid: u32, script: &str) -> Output {
    shell(uid, gid, script).output().unwrap()
}

/// What `script` prints for user `uid`; none where it fails because it may not.
fn may(uid: u32, script: &str) -> Option<String> {
    let output = asked(uid, uid, script);
    let said = String::from_utf8_lossy(&output.stderr);
    let refused = said.contains("ermission denied") || said.contains("can't cd");
    assert!(output.status.success() || refused, "{script}: {output:?}");
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

fn owner(uid: u32, gid: u32, mode: &str) -> Option<Owner> {
    Some(Owner { uid, gid, mode: mode.parse().unwrap() })
}

/// A store with a private package in `private/node`, and another workflow.
fn fixture() -> Fixture {
    let fixture = Fixture::new();
    // Ordinary users must get through to the mount.
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let own = fixture.layer("own", vec![file(format!("{SITE}/own/secret.py"), "secret = 1\n")]);
    let mut layers = fixture.packages();
    fixture.publish("public/node", layers.clone());
    layers.push(own);
    fixture.publish("private/node", layers);
    fixture
}

fn mounted(fixture: &Fixture) -> Mounted {
    let options = Options::at(fixture.dir.path().join("m"));
    mount_store(fixture.store.clone(), fixture.index.clone(), &options).unwrap()
}

fn secret(at: &Path) -> String {
    format!("cat {}/private/node/.venv/{SITE}/own/secret.py", at.display())
}

#[test]
fn a_workflow_is_for_its_owner_its_group_and_root_and_for_nobody_else() {
    needs_mounts!();
    let fixture = fixture();
    fixture.store.set_owner("private", owner(ALICE, CAROL, "0750")).unwrap();
    let mounted = mounted(&fixture);
    let at = mounted.mount_point().to_path_buf();
    let shown = at.display();
    for uid in [ALICE, CAROL] {
        assert_eq!(may(uid, &secret(&at)).as_deref(), Some("secret = 1\n"), "{uid}");
        assert_eq!(may(uid, &format!("{shown}/private/node/.venv/bin/python 1")).unwrap(), "fake python 1\n");
    }
    assert_eq!(fs::read(at.join("private/node/.venv").join(SITE).join("own/secret.py")).unwrap(), b"secret = 1\n");
    // Nothing of it for anybody else: no bytes, no names, no attributes; by no name that leads there.
    for way in [
        secret(&at),
        format!("cat {shown}/private/node/.versions/1/.venv/{SITE}/own/secret.py"),
        format!("cat {shown}/private/node/metadata.json"),
        format!("cat {shown}/public/../private/node/pylock.toml"),
        format!("ls {shown}/private"),
        format!("ls {shown}/private/node/.versions"),
        format!("stat {shown}/private/node"),
        format!("readlink {shown}/private/node/.venv && false || stat {shown}/private/node/.venv"),
        format!("getfattr -n user.envfabric.version {shown}/private/node/.versions/1"),
        format!("getfattr -n user.envfabric.warm.all {shown}/private/node/.versions/1"),
        format!("getfattr -n user.envfabric.stats {shown}/private"),
        format!("cd {shown}/private"),
    ] {
        assert_eq!(may(BOB, &way), None, "{way}");
    }
    // Whether a name is there cannot be told either.
    let (there, not) = (
        asked(BOB, BOB, &format!("stat {shown}/private/node")),
        asked(BOB, BOB, &format!("stat {shown}/private/none")),
    );
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).replace("/none", "/node");
    assert_eq!(told(&there), told(&not));
    // And of what all may see, all is as it was.
    assert_eq!(may(BOB, &format!("ls {shown}")).unwrap(), "private\npublic\n");
    assert_eq!(
        may(BOB, &format!("cat {shown}/public/node/.venv/{SITE}/alpha/__init__.py")).unwrap(),
        "name = \"alpha\"\n"
    );
    let seen = |path: &str| {
        let meta = fs::symlink_metadata(at.join(path)).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    };
    for path in ["private", "private/node", "private/node/.versions"] {
        assert_eq!(seen(path), (ALICE, CAROL, 0o750), "{path}");
    }
    assert_eq!(seen("private/node/.venv"), (ALICE, CAROL, 0o777));
    // What is shared by all environments is nobody's in particular.
    assert_eq!(seen("private/node/.versions/1"), (0, 0, 0o755));
    assert_eq!(seen("public/node"), (0, 0, 0o755));

    // Who may list may not enter, and the other way round.
    fixture.store.set_owner("private", owner(ALICE, CAROL, "0754")).unwrap();
    until("names may be listed", || may(BOB, &format!("ls {shown}/private")).as_deref() == Some("node\n"));
    assert_eq!(may(BOB, &secret(&at)), None);
    fixture.store.set_owner("private", owner(ALICE, CAROL, "0751")).unwrap();
    until("it may be entered", || may(BOB, &secret(&at)).is_some());
    assert_eq!(may(BOB, &format!("ls {shown}/private")), None);
    mounted.unmount().unwrap();
}

#[test]
fn an_owner_stays_through_new_versions_rollbacks_and_removal() {
    needs_mounts!();
    let fixture = fixture();
    let name = fixture.name("private/node");
    fixture.store.set_owner("private", owner(ALICE, ALICE, "0700")).unwrap();
    // Also of a workflow that is not there yet.
    fixture.store.set_owner("later", owner(BOB, BOB, "0700")).unwrap();
    let mounted = mounted(&fixture);
    let at = mounted.mount_point().to_path_buf();
    let layers = fixture.store.current(&name).unwrap().layers;
    let closed = |what: &str| {
        assert_eq!(may(BOB, &secret(&at)), None, "{what}");
        assert_eq!(may(BOB, &format!("ls {}/private", at.display())), None, "{what}");
    };
    closed("at first");
    assert_eq!(fixture.publish("private/node", layers.clone()), 2);
    until("the new version is shown", || {
        fs::read_link(at.join("private/node/.venv")).unwrap().starts_with(".versions/2")
    });
    closed("a new version");
    fixture.store.rollback(&name, 1).unwrap();
    until("the old version is shown", || {
        fs::read_link(at.join("private/node/.venv")).unwrap().starts_with(".versions/1")
    });
    closed("a rollback");
    assert!(may(ALICE, &secret(&at)).is_some());
    fixture.store.remove(&name).unwrap();
    closed("removed, while its paths stay for who uses them");
    assert!(may(ALICE, &format!("cat {}/private/node/.versions/1/metadata.json", at.display())).is_some());
    fixture.store.undo_remove(&name).unwrap();
    until("it is back", || may(ALICE, &format!("ls {}/private", at.display())).as_deref() == Some("node\n"));
    closed("it is back");
    fixture.publish("later/node", layers);
    until("the workflow is there", || at.join("later").exists());
    assert_eq!(may(ALICE, &format!("ls {}/later", at.display())), None, "private from its first moment");
    mounted.unmount().unwrap();
}

#[test]
fn a_change_of_owner_is_seen_by_a_live_mount_within_a_second_by_who_knows_its_names_already() {
    needs_mounts!();
    let fixture = fixture();
    let mounted = mounted(&fixture);
    let at = mounted.mount_point().to_path_buf();
    for round in 0..3 {
        assert!(may(BOB, &secret(&at)).is_some(), "{round}");
        // One that asks by path all the time; and one that stands inside and has a file open.
        let begun = fixture.dir.path().join(format!("begun-{round}"));
        let script =
            format!("until [ -e {} ]; do {s} || exit 1; done; while {s}; do :; done", begun.display(), s = secret(&at));
        let asks = shell(BOB, BOB, &script).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let script =
            "cd \"$0\"; exec 3< own/secret.py; echo ready; read x; cat <&3; cat own/secret.py; ls ../../../../..";
        let mut stands = shell(BOB, BOB, script)
            .arg(at.join("private/node/.versions/1/.venv").join(SITE))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut hears = BufReader::new(stands.stdout.take().unwrap());
        let mut line = String::new();
        hears.read_line(&mut line).unwrap();
        fs::write(&begun, "").unwrap();
        std::thread::sleep(Duration::from_millis(150 * round));
        fixture.store.set_owner("private", owner(ALICE, ALICE, "0700")).unwrap();
        let changed = Instant::now();
        let ended = asks.wait_with_output().unwrap();
        let took = changed.elapsed();
        eprintln!("revoked within {took:?}");
        assert!(ended.status.success() && took < SEEN, "{took:?}: {ended:?}");
        assert_eq!(may(BOB, &secret(&at)), None);
        // What it has open, and where it stands, it keeps; the way up is barred.
        std::thread::sleep(SEEN);
        stands.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let rest: Vec<String> = hears.lines().map(Result::unwrap).collect();
        assert_eq!((rest, stands.wait().unwrap().success()), (vec!["secret = 1".to_string(); 2], false));
        // Back again, as quickly.
        fixture.store.set_owner("private", None).unwrap();
        let changed = Instant::now();
        until("it is everybody's again", || may(BOB, &secret(&at)).is_some());
        assert!(changed.elapsed() < SEEN, "{:?}", changed.elapsed());
    }
    mounted.unmount().unwrap();
}

#[test]
fn where_it_cannot_be_told_whose_a_workflow_is_nobody_is_let_in_but_root_and_who_mounted() {
    needs_mounts!();
    let fixture = fixture();
    fixture.store.set_owner("private", owner(ALICE, ALICE, "0755")).unwrap();
    let live = mounted(&fixture);
    assert!(may(BOB, &secret(live.mount_point())).is_some());
    let document = fixture.store.root().join("owners/private/2.json");
    let whole = fs::read(fixture.store.root().join("owners/private/1.json")).unwrap();
    let mut flipped = whole.clone();
    flipped[30] ^= 1;
    for (damage, bytes) in
        [("cut short", &whole[..40]), ("empty", b""), ("of another number", &whole), ("flipped", &flipped)]
    {
        fs::write(&document, bytes).unwrap();
        let error = fixture.store.owner("private").unwrap_err();
        assert!(error.to_string().contains("owners/private/2.json"), "{error}");
        assert!(!fixture.store.fsck(&|_, _| {}).unwrap().is_clean());
        // One that knew better, and one that begins now.
        until(damage, || may(ALICE, &secret(live.mount_point())).is_none());
        let options = Options::at(fixture.dir.path().join("new"));
        let new = mount_store(fixture.store.clone(), fixture.index.clone(), &options).unwrap();
        for at in [live.mount_point(), new.mount_point()] {
            assert_eq!((may(ALICE, &secret(at)), may(BOB, &secret(at))), (None, None), "{damage}");
            assert!(fs::read(at.join("private/node/.venv").join(SITE).join("own/secret.py")).is_ok(), "root");
            assert!(may(BOB, &format!("ls {}/public/node", at.display())).is_some(), "others are not affected");
        }
        new.unmount().unwrap();
        fs::remove_file(&document).unwrap();
        until("it is as it was", || may(ALICE, &secret(live.mount_point())).is_some());
    }
    fs::write(&document, "").unwrap();
    until("it is closed", || may(ALICE, &secret(live.mount_point())).is_none());
    fixture.store.set_owner("private", owner(ALICE, ALICE, "0700")).unwrap();
    until("what is said anew counts", || may(ALICE, &secret(live.mount_point())).is_some());
    assert_eq!(may(BOB, &secret(live.mount_point())), None);
    live.unmount().unwrap();
}

#[test]
fn a_store_that_is_away_keeps_the_owner_that_was_known() {
    needs_mounts!();
    let fixture = fixture();
    fixture.store.set_owner("private", owner(ALICE, ALICE, "0700")).unwrap();
    for distant in [false, true] {
        let options = Options {
            distant: Some(distant),
            patience: Duration::from_millis(500),
            ..Options::at(fixture.dir.path().join(format!("m{distant}")))
        };
        let mounted = mount_store(fixture.store.clone(), fixture.index.clone(), &options).unwrap();
        let at = mounted.mount_point().to_path_buf();
        assert!(may(ALICE, &secret(&at)).is_some() && may(BOB, &secret(&at)).is_none());
        let aside = fixture.dir.path().join("aside");
        fs::rename(fixture.store.root(), &aside).unwrap();
        for empty in [false, true] {
            if empty {
                // As an unmounted NAS looks.
                fs::create_dir(fixture.store.root()).unwrap();
            }
            let end = Instant::now() + Duration::from_millis(1_500);
            while Instant::now() < end {
                assert_eq!(may(ALICE, &secret(&at)).as_deref(), Some("secret = 1\n"));
                assert_eq!(may(BOB, &secret(&at)), None);
            }
        }
        fs::remove_dir(fixture.store.root()).unwrap();
        fs::rename(&aside, fixture.store.root()).unwrap();
        assert_eq!(may(BOB, &secret(&at)), None);
        mounted.unmount().unwrap();
    }
}

fn key() -> SecretKey {
    SecretKey::new(&[9; 32], "release").unwrap()
}

/// The store as a machine sees it that trusts the key, and remembers in `state`.
fn trusting(fixture: &Fixture, state: &Path) -> Store {
    let store = Store::open(fixture.store.root()).unwrap();
    let trust = TrustedKeys::new(vec![key().public()], Some(state), &store).unwrap();
    store.trusting(trust)
}

/// Does something to the store; the document that it has put there.
type Attack<'a> = Box<dyn Fn() -> PathBuf + 'a>;

#[test]
fn an_owner_that_no_trusted_key_has_signed_lets_nobody_in_where_keys_are_trusted() {
    needs_mounts!();
    let fixture = Fixture::new();
    fs::set_permissions(fixture.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let signing = fixture.store.clone().signing_with(key());
    let own = fixture.layer("own", vec![file(format!("{SITE}/own/secret.py"), "secret = 1\n")]);
    let mut draft = fixture.draft("private/node", vec![own]);
    let all: Vec<Digest> = [draft.interpreter.layer, draft.scaffold].iter().chain(&draft.layers).copied().collect();
    draft.summaries = fixture.store.ensure_summaries(&fixture.index, &all, true).unwrap();
    signing.publish_version(draft).unwrap();
    signing.set_owner("private", owner(ALICE, ALICE, "0700")).unwrap();
    let state = fixture.place("state");
    let options = Options {
        cache: Some(cache::Options { keep_free: 0, ..cache::Options::at(fixture.dir.path().join("cache")) }),
        ..Options::at(fixture.dir.path().join("m"))
    };
    let mounted = mount_store(trusting(&fixture, &state), fixture.index.clone(), &options).unwrap();
    let at = mounted.mount_point().to_path_buf();
    assert!(may(ALICE, &secret(&at)).is_some() && may(BOB, &secret(&at)).is_none());
    // Whoever can write to the store says that it is his, or everybody's.
    let attacks: [(&str, Attack<'_>); 3] = [
        (
            "unsigned",
            Box::new(|| {
                let said = fixture.store.set_owner("private", owner(BOB, BOB, "0777")).unwrap();
                fixture.store.root().join(format!("owners/private/{}.json", said.sequence))
            }),
        ),
        (
            "signed by another",
            Box::new(|| {
                let other = fixture.store.clone().signing_with(SecretKey::new(&[8; 32], "other").unwrap());
                let said = other.set_owner("private", None).unwrap();
                fixture.store.root().join(format!("owners/private/{}.json", said.sequence))
            }),
        ),
        (
            "signed for another workflow",
            Box::new(|| {
                for _ in 0..2 {
                    signing.set_owner("other", owner(BOB, BOB, "0777")).unwrap();
                }
                let path = fixture.store.root().join("owners/private/2.json");
                fs::copy(fixture.store.root().join("owners/other/2.json"), &path).unwrap();
                path
            }),
        ),
    ];
    for (attack, run) in attacks {
        let path = run();
        let error = trusting(&fixture, &state).owner("private").unwrap_err();
        assert!(matches!(error.kind(), Kind::Rejected | Kind::Corrupt), "{attack}: {error}");
        until(attack, || may(ALICE, &secret(&at)).is_none());
        assert_eq!(may(BOB, &secret(&at)), None, "{attack}");
        fs::remove_file(path).unwrap();
        until("it is as it was", || may(ALICE, &secret(&at)).is_some());
    }
    // A machine that has seen a newer statement refuses the one before it, until it is told to forget.
    signing.set_owner("private", owner(CAROL, CAROL, "0700")).unwrap();
    until("the new owner counts", || may(CAROL, &secret(&at)).is_some());
    fs::remove_file(fixture.store.root().join("owners/private/2.json")).unwrap();
    until("an old owner is refused", || may(CAROL, &secret(&at)).is_none());
    assert_eq!(may(ALICE, &secret(&at)), None);
    assert_eq!(trusting(&fixture, &state).owner("private").unwrap_err().kind(), Kind::Rejected);
    assert!(trusting(&fixture, &state).trust().unwrap().forget("private").unwrap());
    assert_eq!(trusting(&fixture, &state).owner("private").unwrap().unwrap().owner.unwrap().mode, Mode::PRIVATE);
    mounted.unmount().unwrap();
}

#[test]
fn owners_are_enforced_in_a_mount_that_an_ordinary_user_made_through_fusermount3() {
    needs_mounts!();
    // fusermount3 wants a user who has a name.
    const NOBODY: u32 = 65_534;
    let program = Path::new(env!("CARGO_BIN_EXE_envfabric"));
    if !Path::new("/usr/bin/fusermount3").exists() {
        eprintln!("skipped: needs fusermount3");
        return;
    }
    let fixture = fixture();
    fixture.store.set_owner("private", owner(BOB, BOB, "0700")).unwrap();
    fixture.store.set_owner("public", owner(NOBODY, NOBODY, "0700")).unwrap();
    let root = fixture.dir.path();
    fs::copy(program, root.join("program")).unwrap();
    for place in ["home", "m"] {
        std::os::unix::fs::chown(fixture.place(place), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    // A namespace in which the device is open to everybody.
    let script = format!(
        "mknod -m666 {root}/fuse c 10 229 && mount --bind {root}/fuse /dev/fuse && exec setpriv --reuid={NOBODY} \
         --regid={NOBODY} --clear-groups env HOME={root}/home sh -c '{root}/program --store {store} mount {root}/m >&2 || exit 1
         grep -c \"{root}/m .*default_permissions\" /proc/self/mountinfo
         cat {root}/m/public/node/.venv/{SITE}/alpha/__init__.py
         {secret}
         {root}/program --store {store} umount {root}/m >&2'",
        root = root.display(),
        store = fixture.store.root().display(),
        secret = secret(&root.join("m")),
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(told, "1\nname = \"alpha\"\n", "{errors}");
    assert!(errors.contains("secret.py: Permission denied") && output.status.success(), "{errors}");
    // As in one that root made.
    let mounted = mounted(&fixture);
    let lines = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = format!(" {} ", mounted.mount_point().display());
    assert!(lines.lines().any(|line| line.contains(&at) && line.contains("default_permissions")), "{lines}");
    mounted.unmount().unwrap();
}

#[test]
fn owners_are_shown_and_set_by_names_and_numbers() {
    let fixture = fixture();
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envfabric"));
        command.arg("--store").arg(fixture.store.root()).args(args).env("HOME", fixture.dir.path());
        for variable in ["XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "ENVFABRIC_CONFIG"] {
            command.env_remove(variable);
        }
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        (output.status.code().unwrap(), text[0].clone(), text[1].clone())
    };
    let owned = |workflow: &str| -> serde_json::Value {
        let (code, told, errors) = run(&["owner", workflow, "--json"]);
        assert_eq!(code, 0, "{errors}");
        serde_json::from_str::<serde_json::Value>(&told).unwrap()["owner"].clone()
    };
    let is = |uid: u32, gid: u32, mode: &str| serde_json::json!({ "uid": uid, "gid": gid, "mode": mode });
    assert_eq!(run(&["owner", "private"]).1, "private is for everybody who is let into the mount\n");
    let (code, told, _) = run(&["owner", "private", "--uid", "nobody"]);
    assert!(
        code == 0 && told.starts_with("private is for user 65534 (nobody), group 65534 (nogroup), mode 0700, since")
    );
    assert_eq!(owned("private"), is(65_534, 65_534, "0700"));
    // What is not given stays.
    assert_eq!(run(&["owner", "private", "--gid", "daemon"]).0, 0);
    assert_eq!(owned("private"), is(65_534, 1, "0700"));
    assert_eq!(run(&["owner", "private", "--mode", "750"]).0, 0);
    assert_eq!(owned("private"), is(65_534, 1, "0750"));
    let shown: serde_json::Value = serde_json::from_str(&run(&["show", "private/node", "--json"]).1).unwrap();
    assert_eq!(shown["owner"], is(65_534, 1, "0750"));
    assert!(run(&["show", "private/node"]).1.contains("for      user 65534"));
    // Users that this machine does not know.
    let (code, _, errors) = run(&["owner", "later", "--uid", "4001"]);
    assert!(code == 2 && errors.contains("--gid GROUP"), "{errors}");
    let (code, _, errors) = run(&["owner", "later", "--uid", "4001", "--gid", "4003"]);
    assert!(code == 0 && errors.contains("no environment in later yet"), "{errors}");
    assert_eq!(owned("later"), is(4_001, 4_003, "0750"));
    for (wrong, says) in [
        (&["--uid", "nobody-of-that-name"][..], "knows no user"),
        (&["--gid", "4003"], "name a user"),
        (&["--uid", "1", "--mode", "4755"], "is not a mode"),
        (&["--uid", "1", "--nobody"], "cannot be used with"),
        (&["--uid", "4294967295", "--gid", "1"], "stands for no user"),
    ] {
        let (code, _, errors) = run(&[&["owner", "fresh"], wrong].concat());
        assert!(code == 2 && errors.contains(says), "{errors}");
    }
    assert_eq!(run(&["owner", "a/b"]).0, 2);
    assert_eq!(run(&["owner", "private", "--nobody"]).0, 0);
    assert_eq!(owned("private"), serde_json::Value::Null);
    let check = || -> serde_json::Value {
        let report: serde_json::Value = serde_json::from_str(&run(&["doctor", "--json"]).1).unwrap();
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "owners").cloned().unwrap_or_default()
    };
    assert!(check()["state"] == "note" && check()["hint"].as_str().unwrap().contains("who can read the store itself"));
    fs::set_permissions(fixture.store.root(), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!((&check()["state"], &check()["facts"]["workflows"]), (&"ok".into(), &1.into()));
    // One that cannot be read is told, and written over.
    let next = fixture.store.root().join("owners/private/5.json");
    fs::write(&next, "{").unwrap();
    let (code, _, errors) = run(&["owner", "private"]);
    assert!(code == 1 && errors.contains("owners/private/5.json") && errors.contains("say it anew"), "{errors}");
    assert_eq!(run(&["fsck"]).0, 1);
    assert_eq!(check()["state"], "bad");
    assert_eq!(run(&["owner", "private", "--uid", "nobody"]).0, 0);
    assert_eq!(owned("private"), is(65_534, 65_534, "0700"));
}
