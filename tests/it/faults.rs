//! What goes wrong on real machines: killed builders, races, full disks, damage.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::wheels::Wheel;
use crate::world::{World, check, clean, is_root, python311, sh, text};

/// The lock of a published environment, as a file of its own.
fn lock_of(world: &World, name: &str) -> PathBuf {
    let shown = world.json(["show", name]);
    let blob = shown["lock"]["blob"].as_str().unwrap();
    let path = world.dir().join(format!("pylock.{}.toml", name.replace('/', "-")));
    fs::copy(world.store().join("blobs").join(blob), &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    path
}

fn fsck_is_clean(world: &World) {
    let report = world.json(["fsck"]);
    let errors: Vec<_> = report["findings"].as_array().unwrap().iter().filter(|f| f["severity"] == "error").collect();
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn two_processes_creating_into_one_store_fifty_times_at_once_lose_nothing() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "race/one", "six", "--python", &python]);
    world.ok(["create", "race/two", "idna", "--python", &python]);
    let locks = [lock_of(&world, "race/one"), lock_of(&world, "race/two")];
    for round in 0..50 {
        let started: Vec<_> = locks
            .iter()
            .map(|lock| {
                let args = ["create", "race/both", "--lock", lock.to_str().unwrap(), "--python", &python];
                // As on two machines: nothing but the store is shared, so no lock of this machine helps.
                let state = world.dir().join(lock.file_name().unwrap()).with_extension("state");
                world
                    .command(args)
                    .env("XDG_STATE_HOME", state)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for process in started {
            let output = process.wait_with_output().unwrap();
            assert!(output.status.success(), "round {round}: {}", text(&output.stderr));
        }
    }
    let versions = world.json(["versions", "race/both"]);
    let numbers: Vec<u64> = versions.as_array().unwrap().iter().map(|v| v["version"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "every number once, none left out");
    assert!(numbers.len() >= 50, "{} versions", numbers.len());
    let current = versions.as_array().unwrap().iter().find(|v| v["current"] == true).unwrap();
    assert_eq!(current["version"].as_u64(), numbers.last().copied());
    fsck_is_clean(&world);
}

#[test]
fn a_create_killed_at_any_moment_leaves_nothing_visible_and_the_next_succeeds() {
    let world = World::new();
    let python = python311();
    let wheel = |n: usize| {
        let mut wheel = Wheel::new("killme", &n.to_string()).file("killme/big.bin", vec![n as u8; 3_000_000]);
        for i in 0..60 {
            wheel = wheel.file(&format!("killme/m{i}.py"), format!("X = [{i}, {n}]\n"));
        }
        wheel.write(world.dir()).display().to_string()
    };
    // The current version that no kill may touch, and the time that a whole create takes.
    world.ok(["create", "kill/a", &wheel(0), "--python", &python]);
    let start = Instant::now();
    world.ok(["create", "kill/a", &wheel(1), "--python", &python]);
    let whole = start.elapsed();
    let mut killed = 0;
    for n in 0..30 {
        let before = world.json(["versions", "kill/a"]).as_array().unwrap().len();
        let wheel = wheel(n + 2);
        let mut process = world
            .command(["create", "kill/a", &wheel, "--python", &python])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole.mul_f64((n as f64 + 0.5) / 30.0));
        let _ = process.kill();
        let finished = process.wait().unwrap().success();
        killed += usize::from(!finished);
        let versions = world.json(["versions", "kill/a"]);
        let after = versions.as_array().unwrap().len();
        // Either the old state or the new one, and always one that is whole.
        assert!(after == before || after == before + 1, "{before} -> {after}");
        assert!(versions.as_array().unwrap().iter().all(|v| v["error"].is_null()), "{versions}");
        assert!(versions.as_array().unwrap().iter().any(|v| v["current"] == true), "{versions}");
        world.ok(["show", "kill/a"]);
    }
    assert!(killed >= 10, "only {killed} of 30 were killed before they were done");
    fsck_is_clean(&world);
    world.ok(["create", "kill/a", &wheel(99), "--python", &python]);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&world.store().display().to_string()), "a mount was left behind: {mounts}");
    let shown = world.json(["show", "kill/a"]);
    assert_eq!(shown["packages"][0]["version"], "99");
    let mount = world.mount();
    mount.run("kill/a", "import killme.m1; assert killme.m1.X == [1, 99]");
    // What the killed ones had begun to install is gone.
    let left: Vec<_> =
        fs::read_dir(world.dir().join("scratch")).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    let left: Vec<&PathBuf> =
        left.iter().filter(|p| p.is_dir() && fs::read_dir(p).is_ok_and(|mut d| d.next().is_some())).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_full_disk_during_create_is_told_and_harms_nothing() {
    if !is_root() {
        println!("skipped: a small file system needs root");
        return;
    }
    let world = World::new();
    let python = python311();
    let disk = world.dir().join("disk");
    fs::create_dir(&disk).unwrap();
    let d = disk.display().to_string();
    sh(&format!("mount -t tmpfs -o size=2g none {d}"));
    struct Unmount(String);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["--lazy", &self.0]).status();
        }
    }
    let _unmount = Unmount(d.clone());
    let store = disk.join("store");
    let on_disk = |args: &[&str]| {
        let mut command = world.command(args);
        command.env("ENVFABRIC_STORE", &store);
        command
    };
    check(&mut on_disk(&["init"]));
    check(&mut on_disk(&["create", "full/a", "six", "--python", &python]));
    let used: u64 = sh(&format!("df --output=used -k {d} | tail -1")).trim().parse().unwrap();
    sh(&format!("mount -o remount,size={}k {d}", used + 8 * 1024));
    let output = on_disk(&["create", "full/a", "numpy", "--python", &python]).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("No space left on device") && stderr.contains("hint:"), "{stderr}");
    let shown = check(&mut on_disk(&["show", "full/a"]));
    assert!(shown.contains("version 1") && shown.contains("six"), "{shown}");
    check(&mut on_disk(&["fsck"]));
    sh(&format!("mount -o remount,size=2g {d}"));
    check(&mut on_disk(&["create", "full/a", "numpy", "--python", &python]));
    check(&mut on_disk(&["fsck"]));
}

#[test]
fn a_store_of_a_newer_format_is_left_alone_and_says_so() {
    let world = World::new();
    let path = world.store().join("fabric.json");
    let original = fs::read_to_string(&path).unwrap();
    let newer = [
        original.replace(&format!("\"format\":{}", envfabric::store::STORE_FORMAT), "\"format\":99"),
        original.replace("\"incompatible\":[]", "\"incompatible\":[\"packs-of-the-future\"]"),
        "{\"format\": 12, \"everything\": \"else changed\"}".to_string(),
    ];
    for text in newer {
        fs::remove_file(&path).unwrap();
        fs::write(&path, &text).unwrap();
        let listing = || sh(&format!("cd {}; find . -type f -printf '%p %s\\n' | sort", world.store().display()));
        let before = listing();
        for args in [vec!["list"], vec!["create", "a/b", "six"], vec!["fsck"], vec!["remove", "a/b"], vec!["mount"]] {
            let stderr = world.fails(1, &args);
            assert!(stderr.contains("upgrade envfabric"), "{args:?}: {stderr}");
        }
        assert_eq!(listing(), before);
    }
    fs::write(&path, "{").unwrap();
    assert!(world.fails(1, ["list"]).contains("fabric.json"));
}

/// The files of a store that hold layer `package` of environment `name`.
fn layer_files(world: &World, name: &str, package: &str) -> (PathBuf, serde_json::Value) {
    let shown = world.json(["show", name]);
    let all = shown["packages"].as_array().unwrap();
    let layer = all.iter().find(|p| p["name"] == package).unwrap()["layer"].as_str().unwrap().to_string();
    let base = world.store().join("layers");
    let doc = fs::read_to_string(base.join(format!("{layer}.json"))).unwrap();
    let doc: serde_json::Value = serde_json::from_str(&doc).unwrap();
    let catalog = doc["catalog"].as_str().unwrap();
    (world.store().join("catalogs").join(catalog), doc)
}

fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_truncated_catalog_a_missing_blob_and_a_short_pack_are_told_and_harm_nothing_else() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "damage/a", "numpy", "six", "idna", "--python", &python]);
    world.ok(["create", "damage/b", "idna", "--python", &python]);
    let (_, numpy) = layer_files(&world, "damage/a", "numpy");
    let (six_catalog, _) = layer_files(&world, "damage/a", "six");
    let object = |room: &str, digest: &serde_json::Value| {
        let digest = digest.as_str().unwrap();
        world.store().join(room).join(digest)
    };
    let site = "lib/python3.11/site-packages";
    let read = |path: &Path| clean(Command::new("cat").arg(path)).stdout(Stdio::null()).output().unwrap();
    let told = |expected: &str, affects: &str| {
        let output = world.output(["fsck"]);
        let stdout = text(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{stdout}");
        assert!(stdout.contains(expected) && stdout.contains(affects), "{stdout}");
    };

    // A missing blob: one file cannot be read, everything else can.
    let blobs = numpy["blobs"].as_array().unwrap();
    let largest = blobs.iter().map(|b| object("blobs", b)).max_by_key(|p| fs::metadata(p).unwrap().len()).unwrap();
    let aside = world.dir().join("aside");
    fs::rename(&largest, &aside).unwrap();
    {
        let mount = world.mount();
        let out = clean(Command::new(mount.python("damage/a")).args(["-c", "import six, idna; import numpy"]))
            .output()
            .unwrap();
        let stderr = text(&out.stderr);
        assert!(!out.status.success() && (stderr.contains("numpy")), "{stderr}");
        mount.run("damage/a", "import six, idna");
        mount.run("damage/b", "import idna");
    }
    told(&format!("blobs/{}", largest.strip_prefix(world.store().join("blobs")).unwrap().display()), "damage/a@1");
    fs::rename(&aside, &largest).unwrap();
    fsck_is_clean(&world);

    // A pack cut short: EIO beyond the cut, never other bytes.
    let pack = object("packs", &numpy["pack"]);
    let whole = fs::read(&pack).unwrap();
    damage(&pack, |bytes| bytes.truncate(5000));
    {
        let mount = world.mount();
        let output = read(&mount.venv("damage/a").join(site).join("numpy/version.py"));
        assert!(text(&output.stderr).contains("Input/output error"), "{output:?}");
        mount.run("damage/b", "import idna");
    }
    told("packs/", "damage/a@1");
    damage(&pack, |bytes| *bytes = whole);

    // A catalog cut short: the layer is gone from view with an error, not silently.
    let whole = fs::read(&six_catalog).unwrap();
    damage(&six_catalog, |bytes| bytes.truncate(bytes.len() / 2));
    {
        let mount = world.mount();
        let output = read(&mount.venv("damage/a").join(site).join("six.py"));
        assert!(text(&output.stderr).contains("Input/output error"), "{output:?}");
        mount.run("damage/b", "import idna");
    }
    told("catalogs/", "damage/a@1");
    let listed = world.ok(["list"]);
    assert!(listed.contains("damage/a") && listed.contains("damage/b"), "{listed}");
    damage(&six_catalog, |bytes| *bytes = whole);

    // A catalog with other rows than its digest names.
    let (idna_catalog, _) = layer_files(&world, "damage/b", "idna");
    let whole = fs::read(&idna_catalog).unwrap();
    fs::set_permissions(&idna_catalog, fs::Permissions::from_mode(0o644)).unwrap();
    let db = rusqlite::Connection::open(&idna_catalog).unwrap();
    db.execute("UPDATE entry SET size = size + 1 WHERE kind = 1", ()).unwrap();
    drop(db);
    told("catalogs/", "damage/b@1");
    damage(&idna_catalog, |bytes| *bytes = whole);
    fsck_is_clean(&world);
    let mount = world.mount();
    mount.run("damage/a", "import numpy, six, idna");
}

#[test]
fn a_create_that_fails_leaves_the_current_version_and_passes_on_uvs_words() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "fail/a", "six", "--python", &python]);
    let requires = Wheel::new("needsmore", "1").file("needsmore.py", "").requires("notinstalled>=7").write(world.dir());
    let bad_import = Wheel::new("badstart", "1")
        .file("badstart.pth", "import sys; sys.exit(9)\n")
        .file("badstart.py", "")
        .write(world.dir());
    let lock = world.dir().join("pylock.toml");
    let sha256 = sha256(&requires);
    fs::write(
        &lock,
        format!(
            "lock-version = \"1.0\"\ncreated-by = \"test\"\n[[packages]]\nname = \"needsmore\"\nversion = \"1\"\n\
             archive = {{ path = {:?}, hashes = {{ sha256 = \"{sha256}\" }} }}\n",
            requires.display().to_string()
        ),
    )
    .unwrap();
    let wrong_hash = world.dir().join("pylock.wrong.toml");
    fs::write(&wrong_hash, fs::read_to_string(&lock).unwrap().replace(&sha256, &"0".repeat(64))).unwrap();
    let cases: Vec<(Vec<String>, &str)> = vec![
        (vec!["six<1".into(), "six>1".into()], "No solution found"),
        (vec!["zz-no-such-package-qq1".into()], "zz-no-such-package-qq1"),
        (vec!["--lock".into(), lock.display().to_string()], "notinstalled"),
        (vec!["--lock".into(), wrong_hash.display().to_string()], "Hash mismatch"),
        (vec![bad_import.display().to_string()], "start"),
        (vec!["six".into(), "--python".into(), "/bin/true".into()], "/bin/true"),
        (vec!["six".into(), "--python".into(), "3.99".into()], "3.99"),
        (vec!["-r".into(), "/nonexistent.txt".into()], "/nonexistent.txt"),
        (vec!["--lock".into(), "/nonexistent.toml".into()], "/nonexistent.toml"),
    ];
    for (args, needle) in cases {
        let mut all: Vec<String> = vec!["create".into(), "fail/a".into()];
        if !args.contains(&"--python".to_string()) {
            all.extend(["--python".into(), python.clone()]);
        }
        all.extend(args.clone());
        let stderr = world.fails(1, &all);
        assert!(stderr.contains(needle), "{args:?}: {stderr}");
        assert_eq!(world.json(["versions", "fail/a"]).as_array().unwrap().len(), 1, "{args:?}");
    }
    // Without validation what does not fit together is published all the same, as asked.
    world.ok(["create", "fail/b", "--lock", lock.to_str().unwrap(), "--python", &python, "--no-validate"]);
    fsck_is_clean(&world);
}

fn sha256(path: &Path) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(fs::read(path).unwrap()))
}

#[test]
fn hostile_wheels_are_refused_with_the_reason() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "hostile/base", "six", "--python", &python]);
    let canary = world.dir().join("canary");
    let forged = |name: &str, text: &str| (format!("w10-1.data/purelib/victim-1.dist-info/{name}"), text.to_string());
    let forger = [
        forged("METADATA", "Metadata-Version: 2.1\nName: victim\nVersion: 1\n"),
        forged("RECORD", "victim.py,,\nvictim-1.dist-info/METADATA,,\nvictim-1.dist-info/RECORD,,\n"),
        ("w10-1.data/purelib/victim.py".to_string(), "evil = 1\n".to_string()),
    ];
    let forger = || forger.iter().fold(Wheel::new("w10", "1"), |wheel, (path, text)| wheel.file(path, text.as_str()));
    let victim = Wheel::new("victim", "1").file("victim.py", "").write(world.dir()).display().to_string();
    // The names say nothing of what is wrong, so that the reason must come from us or uv.
    let cases: Vec<(Wheel, Option<&str>, &str)> = vec![
        (Wheel::new("w1", "1").file("../../../../../../canary", "x"), None, "leaves the environment (..)"),
        (Wheel::new("w2", "1").file(canary.to_str().unwrap(), "x"), None, "has an absolute path"),
        (Wheel::new("w3", "1").file("a\\..\\b.py", "x"), None, "has a backslash in its path"),
        (Wheel::new("w4", "1").file("w4-1.data/data/bin/python", "#!/bin/sh\n"), None, "reserved name"),
        (
            Wheel::new("w5", "1").file("w5-1.data/scripts/activate", "#!/bin/sh\n"),
            None,
            "would replace \"bin/activate\"",
        ),
        (
            Wheel::new("w6", "1").file("w6-1.data/data/pyvenv.cfg", "home = /evil\n"),
            None,
            "would replace \"pyvenv.cfg\"",
        ),
        (Wheel::new("w7", "1").file("w7-1.data/data/lib64", "x"), None, "would replace \"lib64\""),
        (Wheel::new("w8", "1").file("w8.py", "").console("python3 = w8:main"), None, "reserved name"),
        (Wheel::new("w9", "1").file("w9.py", "").console("activate = w9:main"), None, "would replace \"bin/activate\""),
        (forger(), None, "installed by another package, which brings its metadata"),
        (forger(), Some(&victim), "metadata of package \"victim\""),
    ];
    for (wheel, with, reason) in cases {
        let path = wheel.write(world.dir());
        let name = path.display().to_string();
        let mut args = vec!["create", "hostile/x", &name, "--python", &python];
        args.extend(with);
        let stderr = world.fails(1, &args);
        assert!(stderr.contains(reason), "{}: {stderr}", path.display());
        assert!(stderr.contains(path.file_name().unwrap().to_str().unwrap().split('-').next().unwrap()), "{stderr}");
    }
    assert!(!canary.exists());
    assert!(world.output(["show", "hostile/x"]).status.code() == Some(1));
    let mount = world.mount();
    mount.run("hostile/base", "import six");
    fsck_is_clean(&world);
}

#[test]
fn a_store_that_is_replaced_under_a_mount_is_never_taken_for_the_old_one() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "swap/a", "six==1.15.0", "--python", &python]);
    world.ok(["mount"]);
    let mounted = world.dir().join("envs");
    assert!(mounted.join("swap/a/.venv/bin/python").exists());
    fs::rename(world.store(), world.dir().join("aside")).unwrap();
    world.ok(["init"]);
    world.ok(["create", "swap/a", "six==1.16.0", "--python", &python]);
    world.ok(["create", "swap/b", "six==1.16.0", "--python", &python]);
    // The mount goes on with what it knows, and shows nothing of the new store under old names.
    assert!(mounted.join("swap/a/.versions/1").exists() && !mounted.join("swap/b").exists());
    let stderr = world.fails(1, ["run", "swap/a", "--", "python", "-c", "import six; print(six.__version__)"]);
    assert!(stderr.contains("mount again"), "{stderr}");
    world.ok(["umount"]);
    let said = world.ok(["run", "swap/a", "--", "python", "-c", "import six; print(six.__version__)"]);
    assert_eq!(said.trim(), "1.16.0");
}

#[test]
fn what_was_lost_of_a_layer_comes_back_when_it_is_built_again() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "lost/a", "six", "idna", "--python", &python]);
    let (catalog, doc) = layer_files(&world, "lost/a", "six");
    let pack = doc["pack"].as_str().unwrap();
    let pack = world.store().join("packs").join(pack);
    let object = |room: &str, name: &str| world.store().join(room).join(name);
    let digest = doc["digest"].as_str().unwrap();
    let document = world.store().join("layers").join(format!("{digest}.json"));
    let summary = world.json(["show", "lost/a"])["summaries"][0]["blob"].as_str().unwrap().to_string();
    let summary = object("blobs", &summary);
    // What lies beside the layers' own catalogs is that of all together.
    let catalogs = sh(&format!("find {} -type f", world.store().join("catalogs").display()));
    let bundle = catalogs.lines().map(PathBuf::from).max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    for lost in [&catalog, &pack, &document, &summary, &bundle] {
        fs::remove_file(lost).unwrap();
        let stdout = text(&world.output(["fsck"]).stdout);
        assert!(stdout.contains("lost/a@1"), "{}: {stdout}", lost.display());
        world.ok(["create", "lost/a", "six", "idna", "--python", &python, "--rebuild"]);
        fsck_is_clean(&world);
    }
    let lock = world.json(["show", "lost/a"])["lock"]["blob"].as_str().unwrap().to_string();
    fs::remove_file(world.store().join("blobs").join(&lock)).unwrap();
    assert_eq!(world.output(["fsck"]).status.code(), Some(1));
    world.ok(["create", "lost/a", "six", "idna", "--python", &python, "--rebuild"]);
    fsck_is_clean(&world);
    // Damage that keeps the length, too.
    for damaged in [&pack, &summary, &bundle, &catalog] {
        damage(damaged, |bytes| bytes[100] ^= 1);
        assert_eq!(world.output(["fsck"]).status.code(), Some(1), "{}", damaged.display());
        world.ok(["create", "lost/a", "six", "idna", "--python", &python, "--rebuild"]);
        fsck_is_clean(&world);
    }
    let mount = world.mount();
    mount.run("lost/a", "import six, idna");
}

#[test]
fn ctrl_c_during_create_ends_it_at_once_and_leaves_nothing() {
    let world = World::new();
    let python = python311();
    let process = world
        .command(["create", "ctrl/c", "numpy", "pandas", "--python", &python])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let pid = nix::unistd::Pid::from_raw(process.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = process.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(world.fails(1, ["show", "ctrl/c"]).contains("no environment"));
    fsck_is_clean(&world);
}
