//! What wheels, locks and directories of somebody else may not do to a build.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod room;

use std::fs;
use std::path::{Path, PathBuf};

use envfabric::build::{self, Context, Input, Request, Uv};
use envfabric::environment::Digest;
use envfabric::store::{Index, Store};
use room::{Room, layer, python, refused, wanted, wheel};

#[test]
fn hostile_wheels_are_refused_with_the_reason() {
    let room = Room::new();
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case<'_>; 9] = [
        ("dotdot", &[("../../evil.py", "")], &["dotdot-1.0-py3-none-any.whl", ".."]),
        ("absolute", &[("/tmp/evil.py", "")], &["absolute path"]),
        ("backslash", &[("a\\..\\b.py", "")], &["backslash"]),
        ("datadot", &[("datadot-1.0.data/data/../../evil", "")], &[".."]),
        ("activate", &[("activate-1.0.data/scripts/activate", "evil")], &["\"activate\"", "bin/activate"]),
        ("config", &[("config-1.0.data/data/pyvenv.cfg", "home = /evil")], &["pyvenv.cfg"]),
        ("lib64", &[("lib64-1.0.data/data/lib64", "x")], &["lib64"]),
        ("interp", &[("interp-1.0.data/scripts/python3", "#!python\nx")], &["reserved name"]),
        (
            "entry",
            &[("entry-1.0.dist-info/entry_points.txt", "[console_scripts]\npython = entry:x\n")],
            &["reserved name"],
        ),
    ];
    for (name, files, parts) in cases {
        let path = wheel(room.dir.path(), name, files);
        let error = room.create(&[path.to_str().unwrap()]).unwrap_err();
        refused(&error, parts);
    }
    assert!(room.store.environments().unwrap().is_empty());
}

#[test]
fn two_packages_with_one_path_keep_their_own_file_and_the_conflict_is_told() {
    let room = Room::new();
    let a = wheel(room.dir.path(), "clash_a", &[("shared.py", "who = 'a'\n"), ("same.py", "x = 1\n"), ("a/x.py", "")]);
    let b = wheel(room.dir.path(), "clash_b", &[("shared.py", "who = 'b'\n"), ("same.py", "x = 1\n"), ("b/x.py", "")]);
    let created = room.create(&[a.to_str().unwrap(), b.to_str().unwrap()]).unwrap();
    let sp = "lib/python3.11/site-packages";
    for (name, text) in [("clash-a", "who = 'a'\n"), ("clash-b", "who = 'b'\n")] {
        assert_eq!(room.read(&layer(&created, name).digest, &format!("{sp}/shared.py")), text);
    }
    let told: Vec<_> = created.version.conflicts.iter().filter(|c| c.path.ends_with(".py")).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].shown.as_str(), told[0].hidden.as_str()), ("clash-b", "clash-a"));
}

/// A wheel that brings another package's metadata, and files as if they were that one's.
fn forging_wheel(dir: &Path, metadata: &[&str]) -> PathBuf {
    let forged = |name: &str| format!("zevil-1.0.data/purelib/victim-1.0.dist-info/{name}");
    let texts = [
        ("METADATA", "Metadata-Version: 2.1\nName: victim\nVersion: 1.0\n"),
        ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        ("RECORD", "victim/__init__.py,,\nvictim-1.0.dist-info/METADATA,,\nvictim-1.0.dist-info/RECORD,,\n"),
    ];
    let mut files = vec![("zevil-1.0.data/purelib/victim/__init__.py".to_string(), "who = 'evil'\n")];
    files.extend(texts.iter().filter(|(name, _)| metadata.contains(name)).map(|(name, text)| (forged(name), *text)));
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
    wheel(dir, "zevil", &files)
}

#[test]
fn a_wheel_never_decides_what_another_packages_layer_holds() {
    let room = Room::new();
    let victim = wheel(room.dir.path(), "victim", &[("victim/__init__.py", "who = 'victim'\n")]);
    let victim = victim.to_str().unwrap();
    for metadata in [&["METADATA", "WHEEL", "RECORD"][..], &["METADATA"], &["RECORD"]] {
        let zevil = forging_wheel(room.dir.path(), metadata);
        let zevil = zevil.to_str().unwrap();
        for wheels in [vec![victim, zevil], vec![zevil, victim]] {
            refused(&room.create(&wheels).unwrap_err(), &["\"zevil\"", "metadata of package \"victim\""]);
        }
        assert!(room.create(&[zevil]).is_err(), "{metadata:?}");
    }
    assert!(room.store.environments().unwrap().is_empty());
    // Files alone may clash: each package keeps its own.
    let zevil = forging_wheel(room.dir.path(), &[]);
    let created = room.create(&[victim, zevil.to_str().unwrap()]).unwrap();
    let path = "lib/python3.11/site-packages/victim/__init__.py";
    assert_eq!(room.read(&layer(&created, "victim").digest, path), "who = 'victim'\n");
    assert_eq!(room.read(&layer(&created, "zevil").digest, path), "who = 'evil'\n");
    let again = room.create(&[victim]).unwrap();
    assert_eq!((again.installed, &again.version.layers[0]), (0, &layer(&created, "victim").digest));
}

/// Not a test of its own: a process of the test below, in a directory with settings of somebody else.
#[test]
fn child_creates_elsewhere() {
    let Some(dir) = std::env::var_os("ENVFABRIC_TEST_ELSEWHERE").map(PathBuf::from) else { return };
    let store = Store::open(&dir.join("store")).unwrap();
    let index = Index::open(&dir.join("state"), &store).unwrap();
    let (state, scratch) = (dir.join("state"), dir.join("scratch"));
    let uv = Uv::new(None);
    let context =
        Context { store: &store, index: &index, uv: &uv, state, scratch, progress: &build::Silent, trial: None };
    let input = match std::env::var_os("ENVFABRIC_TEST_LOCK") {
        Some(lock) => Input::Lock(lock.into()),
        None => wanted(&["six==1.16.0"]),
    };
    let mut request = Request::new("demo/a".parse().unwrap(), input);
    request.python = Some(python("3.11"));
    match build::create(&context, &request) {
        Ok(created) => println!("CREATED {}", created.layers.len()),
        Err(error) => println!("ERROR {error:?}"),
    }
}

#[test]
fn settings_of_the_directory_it_runs_in_do_not_change_what_is_installed() {
    let room = Room::new();
    let wheel = wheel(room.dir.path(), "plain", &[("plain.py", "x = 1\n")]);
    let wrong = format!(
        "lock-version = '1.0'\n[[packages]]\nname = 'plain'\nversion = '1.0'\narchive = {{path = {:?}, hashes = {{sha256 = '{}'}}}}\n",
        wheel.to_str().unwrap(),
        "0".repeat(64)
    );
    let lock = room.path("pylock.toml");
    fs::write(&lock, &wrong).unwrap();
    let digest = Digest::of(&fs::read(&wheel).unwrap()).to_string();
    fs::write(room.path("pylock.right.toml"), wrong.replace(&"0".repeat(64), &digest)).unwrap();
    let elsewhere = room.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let child = |lock: Option<&str>, variable: Option<&Path>| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child_creates_elsewhere", "--nocapture"]).current_dir(&elsewhere);
        command.env("ENVFABRIC_TEST_ELSEWHERE", room.dir.path()).env_remove("ENVFABRIC_TEST_LOCK");
        lock.map(|lock| command.env("ENVFABRIC_TEST_LOCK", room.path(lock)));
        variable.map(|file| command.env("UV_CONFIG_FILE", file));
        String::from_utf8_lossy(&command.output().unwrap().stdout).into_owned()
    };
    let file = elsewhere.join("uv.toml");
    let target = room.path("target");
    for text in [
        "[pip]\nverify-hashes = false\n".to_string(),
        format!("[pip]\nverify-hashes = false\ntarget = {target:?}\n"),
        format!("[pip]\nverify-hashes = false\nprefix = {target:?}\npython-platform = 'windows'\n"),
    ] {
        fs::write(&file, text).unwrap();
        for variable in [None, Some(file.as_path())] {
            let said = child(Some("pylock.toml"), variable);
            assert!(said.contains("Hash mismatch"), "{said}");
        }
    }
    for variable in [None, Some(file.as_path())] {
        let said = child(Some("pylock.right.toml"), variable);
        assert!(said.contains("CREATED 1"), "{said}");
    }
    assert!(!target.exists(), "nothing is installed where a setting says");
    // What would change a resolution is told.
    let said = child(None, None);
    assert!(said.contains("python-platform in") && said.contains("use --python-platform"), "{said}");
    fs::write(&file, format!("[pip]\nverify-hashes = false\ntarget = {target:?}\n")).unwrap();
    let said = child(None, None);
    assert!(said.contains("CREATED 1") && !target.exists(), "{said}");
}

#[test]
fn files_installed_through_lib64_belong_to_their_package() {
    let room = Room::new();
    let files = [("a.py", ""), ("through-1.0.data/data/lib64/python3.11/site-packages/through/b.py", "x = 1\n")];
    let path = wheel(room.dir.path(), "through", &files);
    let created = room.create(&[path.to_str().unwrap()]).unwrap();
    let paths = room.paths(&layer(&created, "through").digest);
    assert!(paths.contains(&"lib/python3.11/site-packages/through/b.py".to_string()), "{paths:?}");
}

#[test]
fn credentials_of_an_index_stand_neither_on_a_command_line_nor_in_the_store() {
    use std::os::unix::fs::PermissionsExt;
    let mut room = Room::new();
    let (program, said) = (room.path("uv"), room.path("said"));
    let uv = room.uv.path().unwrap().display().to_string();
    let script = format!(
        "#!/bin/sh\necho \"$UV_DEFAULT_INDEX $UV_INDEX $@\" | tee -a {0} >/dev/null\necho \"$@\" >>{0}.argv\nexec {uv} \"$@\"\n",
        said.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    room.uv = Uv::new(Some(program));
    let dir = room.path("links");
    fs::create_dir(&dir).unwrap();
    wheel(&dir, "linked", &[("linked.py", "")]);
    let mut request = room.request(wanted(&["linked"]));
    request.index.index_url = Some("http://user:s3cret@127.0.0.1:9/simple".into());
    request.index.extra_index_urls = vec!["http://user:s3cret@127.0.0.1:9/more".into()];
    request.index.find_links = vec![dir.display().to_string()];
    request.index.offline = true;
    let created = build::create(&room.context(), &request).unwrap();
    assert_eq!(created.layers.len(), 1);
    let environment = fs::read_to_string(&said).unwrap();
    assert!(environment.contains("s3cret@127.0.0.1:9/simple") && environment.contains("9/more"), "{environment}");
    let lines = fs::read_to_string(room.path("said.argv")).unwrap();
    assert!(lines.contains("pip sync") && !lines.contains("s3cret"), "{lines}");
    let found = std::process::Command::new("grep").args(["-r", "s3cret"]).arg(room.path("store")).status().unwrap();
    assert_eq!(found.code(), Some(1), "nothing in the store has the password");
}
