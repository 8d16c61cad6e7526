//! Rollbacks and new versions under running programs.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::wheels::Wheel;
use crate::world::{World, check, clean, is_root, python311, sh, text, until};

/// Two versions of one environment that differ in what `switcher` says, and in what is there.
fn two_versions(world: &World, name: &str) {
    let python = python311();
    for n in ["1", "2"] {
        let wheel = Wheel::new("switcher", n)
            .file("switcher/__init__.py", format!("VERSION = {n}\n"))
            .file("switcher/late.py", format!("VERSION = {n}\n"))
            .file(&format!("switcher/only{n}.py"), "")
            .write(world.dir());
        world.ok(["create", name, wheel.to_str().unwrap(), "six", "--python", &python]);
    }
}

#[test]
fn a_running_interpreter_and_everything_inside_a_version_never_notice_a_switch() {
    let world = World::new();
    two_versions(&world, "switch/a");
    let mount = world.mount();
    let says = || mount.run("switch/a", "import switcher; print(switcher.VERSION)").trim().to_string();
    assert_eq!(says(), "2");

    // An interpreter of version 2 that will import more later, with its working directory in the version.
    let pinned = mount.at.join("switch/a/.versions/2/.venv");
    let mut running = clean(Command::new(pinned.join("bin/python")).args([
        "-c",
        "import sys, os, switcher, glob\n\
         sys.stdout.write('ready\\n'); sys.stdout.flush(); sys.stdin.readline()\n\
         import switcher.late, xml.dom.minidom, json.tool\n\
         base = os.getcwd()\n\
         assert os.path.samefile('.', base) and 'switcher' in os.listdir('.')\n\
         print(switcher.VERSION, switcher.late.VERSION, len(os.listdir(os.path.dirname(switcher.__file__))))",
    ]))
    .current_dir(pinned.join("lib/python3.11/site-packages"))
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut ready = [0u8; 6];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut ready).unwrap();

    // Loops that list and read, inside the pinned version and through the name.
    let stop = world.dir().join("stop");
    let script = format!(
        "cd {}; while [ ! -e {} ]; do ls -R lib >/dev/null; cat pyvenv.cfg bin/activate >/dev/null; pwd -P >/dev/null; \
         ls {} >/dev/null; stat -c %i {}/.versions >/dev/null; done; echo fine",
        pinned.display(),
        stop.display(),
        mount.at.join("switch/a").display(),
        mount.at.join("switch/a").display(),
    );
    let listing = clean(Command::new("bash").args(["-euc", &script]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();

    let mut expected = "2";
    for _ in 0..6 {
        let next = if expected == "2" { "1" } else { "2" };
        world.ok(["rollback", "switch/a", next]);
        expected = next;
        // Within about a second everything new is the new version; what is asked meanwhile is one of both.
        until("the switch is seen", Duration::from_secs(10), || says() == expected);
        assert_eq!(
            fs::read_link(mount.venv("switch/a")).unwrap().to_str(),
            Some(format!(".versions/{next}/.venv").as_str())
        );
        let there =
            |n: &str| mount.venv("switch/a").join(format!("lib/python3.11/site-packages/switcher/only{n}.py")).exists();
        assert!(there(next));
        assert!(!there(if next == "1" { "2" } else { "1" }), "a stale name is seen");
    }
    // A new version, a removal, and the way back.
    let python = python311();
    world.ok(["create", "switch/a", "six", "idna", "--python", &python]);
    until("the new version is seen", Duration::from_secs(10), || {
        fs::read_link(mount.venv("switch/a")).unwrap().to_str() == Some(".versions/3/.venv")
    });
    let mut listed: Vec<_> = fs::read_dir(mount.at.join("switch/a/.versions"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    assert_eq!(listed, ["1", "2", "3"]);
    world.ok(["remove", "switch/a"]);
    until("the removal is seen", Duration::from_secs(10), || {
        fs::read_dir(mount.at.join("switch")).map(|d| d.count()).unwrap_or(0) == 0
    });

    // The interpreter that ran all the while goes on as if nothing had been.
    std::io::Write::write_all(running.stdin.as_mut().unwrap(), b"go\n").unwrap();
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("2 2 "), "{}", text(&output.stdout));
    fs::write(&stop, "").unwrap();
    let listing = listing.wait_with_output().unwrap();
    assert_eq!((text(&listing.stdout).trim(), text(&listing.stderr).as_str()), ("fine", ""));
    world.ok(["rollback", "switch/a"]);
    until("it is back", Duration::from_secs(10), || mount.venv("switch/a").exists());
}

#[test]
fn bind_mounts_inside_an_environment_stand_through_switches() {
    if !is_root() {
        println!("skipped: bind mounts need root");
        return;
    }
    let world = World::new();
    two_versions(&world, "switch/b");
    let mount = world.mount();
    let base = mount.at.join("switch/b").display().to_string();
    let at = tempfile::tempdir_in(world.dir()).unwrap();
    let a = at.path().display();
    let tool = env!("CARGO_BIN_EXE_envfabric");
    let script = format!(
        "mkdir {a}/env {a}/version {a}/site
         mount --bind {base} {a}/env
         mount --bind {base}/.versions/2 {a}/version
         mount --bind {base}/.versions/2/.venv/lib/python3.11/site-packages {a}/site
         cd {a}/site
         for n in 1 2 1 2 1; do
           {tool} rollback switch/b $n >/dev/null
           for i in $(seq 200); do [ \"$(readlink {a}/env/.venv)\" = .versions/$n/.venv ] && break; sleep 0.02; done
           [ \"$(readlink {a}/env/.venv)\" = .versions/$n/.venv ]
           [ \"$({a}/env/.venv/bin/python -I -c 'import switcher; print(switcher.VERSION)')\" = $n ]
           [ \"$({a}/version/.venv/bin/python -I -c 'import switcher; print(switcher.VERSION)')\" = 2 ]
           grep -q 'VERSION = 2' switcher/__init__.py {a}/site/switcher/late.py
           ls -lR . >/dev/null
         done
         mountpoint -q {a}/env && mountpoint -q {a}/version && mountpoint -q {a}/site"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "bash", "-euc", &script]);
    command.env("ENVFABRIC_STORE", world.store()).env("XDG_STATE_HOME", world.dir().join("state"));
    check(&mut clean(&mut command));
}

#[test]
fn a_version_that_is_open_survives_many_publications_of_others() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "many/a", "six", "--python", &python]);
    let mount = world.mount();
    let held = fs::File::open(mount.at.join("many/a/.versions/1/.venv/lib/python3.11/site-packages/six.py")).unwrap();
    for n in 0..5 {
        let wheel = Wheel::new("filler", &n.to_string()).file("filler.py", format!("N = {n}\n")).write(world.dir());
        world.ok(["create", &format!("many/n{n}"), wheel.to_str().unwrap(), "--python", &python]);
    }
    until("all names are seen", Duration::from_secs(10), || fs::read_dir(mount.at.join("many")).unwrap().count() == 6);
    assert!(std::io::read_to_string(held).unwrap().contains("Benjamin Peterson"));
    let names = sh(&format!("ls {}", mount.at.join("many").display()));
    assert_eq!(names.split_whitespace().collect::<Vec<_>>(), ["a", "n0", "n1", "n2", "n3", "n4"]);
}
