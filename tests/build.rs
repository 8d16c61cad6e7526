//! Builds with real uv and real wheels. uv is found through `ENVFABRIC_UV` or `PATH`; packages come from PyPI.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod room;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use envfabric::build::{self, Context, Created, Input, Outcome, Request, Uv};
use envfabric::environment::Version;
use envfabric::error::{Error, Kind};
use envfabric::store::{Index, LayerDoc, Store};
use room::{Room, layer, names, python, refused, wanted, wheel};

#[test]
fn requirements_become_a_published_version() {
    let room = Room::new();
    let created = room.create(&["requests==2.31.0", "six==1.16.0", "docopt==0.6.2"]).unwrap();
    assert_eq!(created.outcome, Outcome::Published);
    assert_eq!(names(&created), ["certifi", "charset-normalizer", "docopt", "idna", "requests", "six", "urllib3"]);
    assert_eq!(room.store.current(&"demo/a".parse().unwrap()).unwrap(), created.version);
    let six = layer(&created, "six");
    let paths = room.paths(&six.digest);
    let sp = "lib/python3.11/site-packages";
    assert!(paths.contains(&format!("{sp}/six.py")));
    assert!(paths.contains(&format!("{sp}/__pycache__/six.cpython-311.pyc")));
    assert!(!paths.iter().any(|p| p.ends_with("REQUESTED")));
    let record = room.read(&six.digest, &format!("{sp}/six-1.16.0.dist-info/RECORD"));
    assert!(record.contains("six.py,sha256=") && !record.contains("REQUESTED"), "{record}");
    assert!(room.lock_text(&created.version).contains("name = \"docopt\""));
    assert!(layer(&created, "requests").meta.requires.iter().any(|r| r.starts_with("urllib3")));
    assert!(room.paths(&layer(&created, "charset-normalizer").digest).contains(&"bin/normalizer".to_string()));
    // The same again publishes nothing; another number of packages does, and installs only what is new.
    let again = room.create(&["requests==2.31.0", "six==1.16.0", "docopt==0.6.2"]).unwrap();
    assert_eq!((again.outcome, again.installed, again.version.number), (Outcome::Unchanged, 0, 1));
    let more = room.create(&["requests==2.31.0", "six==1.16.0", "docopt==0.6.2", "toml==0.10.2"]).unwrap();
    assert_eq!((more.outcome, more.installed, more.version.number), (Outcome::Published, 1, 2));
    assert_eq!(fs::read_dir(room.path("scratch/envfabric-build")).unwrap().count(), 0, "scratch is removed");
}

#[test]
fn a_known_lock_on_a_known_interpreter_starts_no_process() {
    let mut room = Room::new();
    let created = room.create(&["six==1.16.0", "idna==3.7"]).unwrap();
    let lock = room.path("pylock.toml");
    fs::write(&lock, room.lock_text(&created.version)).unwrap();
    room.uv = Uv::new(Some("/nonexistent/uv".into()));
    let start = Instant::now();
    let mut request = room.request(Input::Lock(lock));
    request.name = "demo/b".parse().unwrap();
    let b = build::create(&room.context(), &request).unwrap();
    println!("known lock: {:?}", start.elapsed());
    assert_eq!((b.installed, &b.version.layers), (0, &created.version.layers));
    assert_eq!(b.version.builder.uv, None);
    // By version instead of path, and without any wish, too.
    for python in [Some("3.11".to_string()), None] {
        request.python = python;
        request.name = "demo/c".parse().unwrap();
        build::create(&room.context(), &request).unwrap();
    }
}

/// Path and length of every file below `dir`.
fn files(dir: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files(&entry.path())),
            false => drop(found.insert(entry.path(), entry.metadata().unwrap().len())),
        }
    }
    found
}

#[test]
fn an_environment_of_a_known_lock_adds_at_most_4_files_and_16_kilobytes_to_the_store() {
    let room = Room::new();
    let created = room.create(&["six==1.16.0", "idna==3.7"]).unwrap();
    let lock = room.path("pylock.toml");
    fs::write(&lock, room.lock_text(&created.version)).unwrap();
    let mut request = room.request(Input::Lock(lock));
    for name in ["demo/b", "demo/c", "other/d"] {
        let before = files(room.store.root());
        request.name = name.parse().unwrap();
        build::create(&room.context(), &request).unwrap();
        let mut added = files(room.store.root());
        added.retain(|path, _| !before.contains_key(path));
        assert!(added.len() <= 4 && added.values().sum::<u64>() <= 16_000, "{added:?}");
    }
}

#[test]
fn what_a_lock_came_to_is_believed_only_while_the_store_has_all_of_it() {
    let room = Room::new();
    let created = room.create(&["six==1.16.0", "idna==3.7"]).unwrap();
    let lock = room.path("pylock.toml");
    fs::write(&lock, room.lock_text(&created.version)).unwrap();
    let mut request = room.request(Input::Lock(lock.clone()));
    let create = |name: &str, request: &mut Request| {
        request.name = name.parse().unwrap();
        build::create(&room.context(), request).unwrap()
    };
    let first = create("demo/b", &mut request);
    assert_eq!(create("demo/c", &mut request).version.layers, first.version.layers);
    // A layer and the lock's text are lost: both come back.
    let (layer, text) = (room.store.layer_path(&first.version.layers[0]), first.version.lock.clone().unwrap());
    fs::remove_file(&layer).unwrap();
    fs::remove_file(room.store.blob_path(&text.blob)).unwrap();
    let again = create("demo/d", &mut request);
    assert_eq!((again.installed, again.version.lock.as_ref()), (1, Some(&text)));
    assert_eq!(room.store.read_blob(&text.blob).unwrap().len() as u64, text.size);
    assert!(layer.exists());
    // Whatever else it depends on is asked for anew.
    request.bytecode = false;
    assert_eq!(create("demo/e", &mut request).installed, 2);
    request.bytecode = true;
    fs::write(&lock, room.lock_text(&created.version).replace("idna", "idna-ssl")).unwrap();
    assert!(build::create(&room.context(), &request).is_err());
}

#[test]
fn two_stores_and_staging_places_give_the_same_layers() {
    for (minor, wanted) in [
        ("3.9", vec!["requests==2.31.0", "docopt==0.6.2"]),
        ("3.11", vec!["numpy==1.26.4", "requests==2.31.0", "docopt==0.6.2"]),
        ("3.13", vec!["requests==2.31.0", "docopt==0.6.2"]),
    ] {
        let longer = tempfile::Builder::new().prefix("a-much-longer-name").tempdir().unwrap();
        let (mut a, mut b) = (Room::empty(), Room::in_dir(longer));
        let python = python(minor);
        if minor != "3.11" && !python.contains('/') {
            println!("no Python {minor} here");
            continue;
        }
        (a.python, b.python) = (Some(python.clone()), Some(python));
        let (one, two) = (a.create(&wanted).unwrap(), b.create(&wanted).unwrap());
        assert_eq!(one.version.layers, two.version.layers, "{minor}");
        assert_eq!(one.version.interpreter, two.version.interpreter);
        assert_eq!(one.version.scaffold, two.version.scaffold);
        assert_eq!(one.version.lock, two.version.lock);
        let scaffold = a.paths(&one.version.scaffold);
        assert!(scaffold.contains(&"bin/activate".to_string()) && scaffold.contains(&"lib64".to_string()));
        assert!(!scaffold.iter().any(|p| p.starts_with("bin/python") || p.contains("pyvenv")), "{scaffold:?}");
    }
}

/// Another machine: its index and its copy of nothing; the interpreter is taken from the store.
#[test]
fn another_machine_builds_with_the_interpreter_of_the_store() {
    let room = Room::new();
    let first = room.create(&["six==1.16.0"]).unwrap();
    let state = room.path("other-state");
    let index = Index::open(&state, &room.store).unwrap();
    let context = Context { index: &index, state: state.clone(), ..room.context() };
    let mut request = room.request(wanted(&["requests==2.31.0", "docopt==0.6.2"]));
    request.python = Some("3.11".into());
    let second = build::create(&context, &request).unwrap();
    assert_eq!(second.version.interpreter, first.version.interpreter);
    assert!(state.join("pythons").join(&second.interpreter.name).join("bin/python3.11").is_file());
    let other = Room::empty();
    let there = other.create(&["requests==2.31.0", "docopt==0.6.2"]).unwrap();
    assert_eq!(there.version.layers, second.version.layers, "bytecode does not tell which copy compiled it");
}

/// What the mount shows, made by hand.
#[test]
fn a_view_of_the_layers_runs_and_the_trial_tells_when_it_does_not() {
    let room = Room::new();
    let created = room.create(&["requests==2.31.0", "numpy==1.26.4"]).unwrap();
    let dir = room.path("view/demo/a/.versions/1");
    room.show(&created.version.interpreter.layer, &dir.join(".python"));
    for layer in [&created.version.scaffold].into_iter().chain(&created.version.layers) {
        room.show(layer, &dir.join(".venv"));
    }
    std::os::unix::fs::symlink("../../.python/bin/python3.11", dir.join(".venv/bin/python")).unwrap();
    let home = dir.join(".python/bin");
    fs::write(dir.join(".venv/pyvenv.cfg"), format!("home = {}\nversion_info = 3.11\n", home.display())).unwrap();
    build::run_trial(&dir, &created.layers).unwrap();
    let run = |args: &[&str]| {
        let output = std::process::Command::new(dir.join(".venv/bin/python")).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_string() + &String::from_utf8_lossy(&output.stderr)
    };
    // Imported from the bytecode of the layer, and tracebacks show where the file is now.
    let site = dir.join(".venv/lib/python3.11/site-packages/requests");
    let script = "import requests, numpy, requests.api as a; print(a.__cached__, a.get.__code__.co_filename)";
    let expected = format!("{0}/__pycache__/api.cpython-311.pyc {0}/api.py", site.display());
    assert_eq!(run(&["-c", script]), expected);
    let verbose = run(&["-v", "-c", "import requests.api, json"]);
    for file in ["requests/__pycache__/api", "json/__pycache__/__init__"] {
        let matches = |l: &&str| l.contains("matches") && l.contains(file);
        assert!(verbose.lines().any(|l| matches(&l)), "bytecode of {file} is used");
    }
    let script = std::process::Command::new(dir.join(".venv/bin/normalizer")).arg("--version").output().unwrap();
    assert!(script.status.success(), "{}", String::from_utf8_lossy(&script.stderr));
    fs::remove_dir_all(dir.join(".venv/lib/python3.11/site-packages/idna-3.11.dist-info")).ok();
    for entry in fs::read_dir(dir.join(".venv/lib/python3.11/site-packages")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("idna-") {
            fs::remove_dir_all(entry.path()).unwrap();
        }
    }
    refused(&build::run_trial(&dir, &created.layers).unwrap_err(), &["does not show idna"]);
}

#[test]
fn the_trial_of_a_list_of_layers_is_made_once_and_its_failure_publishes_nothing() {
    let room = Room::new();
    let asked = std::cell::Cell::new(0);
    let good = |_: &Version, _: &[std::sync::Arc<LayerDoc>]| {
        asked.set(asked.get() + 1);
        Ok(())
    };
    let bad = |_: &Version, _: &[std::sync::Arc<LayerDoc>]| Err(Error::new(Kind::Failed, "it does not start"));
    let context = Context { trial: Some(&bad), ..room.context() };
    let request = room.request(wanted(&["six==1.16.0"]));
    refused(&build::create(&context, &request).unwrap_err(), &["it does not start"]);
    assert!(room.store.environments().unwrap().is_empty());
    let context = Context { trial: Some(&good), ..room.context() };
    build::create(&context, &request).unwrap();
    build::create(&context, &room.request(wanted(&["idna==3.7"]))).unwrap();
    assert_eq!(asked.get(), 2, "other layers are another view");
    let mut request = room.request(wanted(&["six==1.16.0"]));
    request.name = "demo/b".parse().unwrap();
    build::create(&context, &request).unwrap();
    assert_eq!(asked.get(), 2, "the same layers in the same order are not tried again");
    let bad = |_: &Version, _: &[std::sync::Arc<LayerDoc>]| Err(Error::new(Kind::Unsupported, "no /dev/fuse"));
    let context = Context { trial: Some(&bad), ..room.context() };
    request.input = wanted(&["toml==0.10.2"]);
    refused(&build::create(&context, &request).unwrap_err(), &["no /dev/fuse", "--no-validate"]);
}

#[test]
fn urls_repositories_and_namespace_packages() {
    let room = Room::new();
    let git = |args: &[&str]| {
        let dir = room.path("repo");
        let mut command = std::process::Command::new("git");
        command.args(["-c", "user.name=t", "-c", "user.email=t@t"]).args(args).current_dir(dir);
        assert!(command.status().unwrap().success());
    };
    fs::create_dir_all(room.path("repo/inrepo")).unwrap();
    fs::write(room.path("repo/pyproject.toml"), "[project]\nname='inrepo'\nversion='3.0'\ndescription='d'\n[build-system]\nrequires=['flit_core==3.9.0']\nbuild-backend='flit_core.buildapi'\n").unwrap();
    fs::write(room.path("repo/inrepo/__init__.py"), "").unwrap();
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-qm", "x"]);
    let repo = format!("inrepo @ git+file://{}", room.path("repo").display());
    let one = wheel(room.dir.path(), "ns_one", &[("ns/one/__init__.py", "x = 1\n")]);
    let two = wheel(room.dir.path(), "ns_two", &[("ns/two/__init__.py", "x = 2\n"), ("ns/caf\u{e9}.txt", "x")]);
    let url = "https://files.pythonhosted.org/packages/d9/5a/e7c31adbe875f2abbb91bd84cf2dc52d792b5a01506781dbcf25c91daf11/six-1.16.0-py2.py3-none-any.whl";
    let wanted = [repo.as_str(), one.to_str().unwrap(), two.to_str().unwrap(), &format!("six @ {url}")];
    let created = room.create(&wanted).unwrap();
    assert_eq!(names(&created), ["inrepo", "ns-one", "ns-two", "six"]);
    assert!(created.version.conflicts.is_empty(), "{:?}", created.version.conflicts);
    let text = room
        .read(&layer(&created, "inrepo").digest, "lib/python3.11/site-packages/inrepo-3.0.dist-info/direct_url.json");
    assert!(text.contains("commit_id"), "{text}");
    assert_eq!(room.create(&wanted).unwrap().installed, 0, "all of them have keys");
}

/// Not a test of its own: the body of a process that the test below kills.
#[test]
fn child_creates() {
    let Some(dir) = std::env::var_os("ENVFABRIC_TEST_DIR").map(PathBuf::from) else { return };
    let store = Store::open(&dir.join("store")).unwrap();
    let index = Index::open(&dir.join("state"), &store).unwrap();
    let (state, scratch) = (dir.join("state"), dir.join("scratch"));
    let uv = Uv::new(None);
    let context =
        Context { store: &store, index: &index, uv: &uv, state, scratch, progress: &build::Silent, trial: None };
    let mut request = Request::new("demo/a".parse().unwrap(), wanted(&["requests==2.31.0", "docopt==0.6.2"]));
    request.python = Some(python("3.11"));
    build::create(&context, &request).unwrap();
}

#[test]
fn a_killed_create_leaves_nothing_visible_and_the_next_one_succeeds() {
    let room = Room::new();
    let name = "demo/a".parse().unwrap();
    let start = || {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child_creates"]).env("ENVFABRIC_TEST_DIR", room.dir.path());
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    for wait in [30, 150, 300, 600, 900, 1300, 1700, 2200] {
        let mut child = start();
        std::thread::sleep(std::time::Duration::from_millis(wait));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for number in room.store.version_numbers(&name).unwrap() {
            room.store.version(&name, number).unwrap();
        }
    }
    let mut all: Vec<_> = (0..8).map(|_| start()).collect();
    assert!(all.iter_mut().all(|child| child.wait().unwrap().success()));
    assert_eq!(room.store.current(&name).unwrap().layers.len(), 6);
    assert!(room.store.fsck(&|_, _| ()).unwrap().is_clean());
    assert_eq!(
        fs::read_dir(room.path("scratch/envfabric-build")).unwrap().count(),
        0,
        "what the killed ones left is removed"
    );
}

#[test]
fn many_at_once_install_once() {
    let room = Room::new();
    let results: Vec<Created> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let index = Index::open(&room.path("state"), &room.store).unwrap();
                    let context =
                        Context { index: &index, uv: &Uv::new(None), progress: &build::Silent, ..room.context() };
                    build::create(&context, &room.request(wanted(&["idna==3.7"]))).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(results.iter().map(|r| r.installed).sum::<usize>(), 1);
    assert_eq!(results.iter().filter(|r| r.outcome == Outcome::Published).count(), 1);
    assert_eq!(room.store.version_numbers(&"demo/a".parse().unwrap()).unwrap(), [1]);
}

#[test]
fn failures_pass_on_what_uv_says_and_leave_the_current_version() {
    let room = Room::new();
    room.create(&["six==1.16.0"]).unwrap();
    let error = room.create(&["zz-no-such-package-qq1"]).unwrap_err();
    refused(&error, &["could not be resolved", "zz-no-such-package-qq1 was not found"]);
    let broken = room.path("broken");
    fs::create_dir(&broken).unwrap();
    fs::write(broken.join("pyproject.toml"), "[project]\nname='broken'\nversion='1'\n[build-system]\nrequires=[]\nbuild-backend='backend'\nbackend-path=['.']\n").unwrap();
    fs::write(
        broken.join("backend.py"),
        "def build_wheel(*a, **k):\n    raise SystemExit('the compiler is missing')\n",
    )
    .unwrap();
    let error = room.create(&[broken.to_str().unwrap()]).unwrap_err();
    refused(&error, &["the compiler is missing"]);
    let created = room.store.current(&"demo/a".parse().unwrap()).unwrap();
    assert_eq!(created.number, 1);
    // A lock whose hash is wrong.
    let text = room.lock_text(&created);
    let at = text.find("sha256 = \"").unwrap() + 10;
    let wrong = format!("{}{}{}", &text[..at], "0".repeat(64), &text[at + 64..]);
    let at = wrong.rfind("sha256 = \"").unwrap() + 10;
    let wrong = format!("{}{}{}", &wrong[..at], "0".repeat(64), &wrong[at + 64..]);
    let lock = room.path("pylock.toml");
    fs::write(&lock, wrong).unwrap();
    let error = build::create(&room.context(), &room.request(Input::Lock(lock))).unwrap_err();
    refused(&error, &["Hash mismatch"]);
    assert_eq!(room.store.current(&"demo/a".parse().unwrap()).unwrap().number, 1);
}

#[test]
fn an_inconsistent_lock_is_refused_unless_told_otherwise() {
    let room = Room::new();
    let created = room.create(&["requests==2.31.0"]).unwrap();
    let text = room.lock_text(&created.version);
    let kept: Vec<&str> = text.split("[[packages]]").filter(|part| !part.contains("name = \"idna\"")).collect();
    let lock = room.path("pylock.toml");
    fs::write(&lock, kept.join("[[packages]]")).unwrap();
    let mut request = room.request(Input::Lock(lock));
    let error = build::create(&room.context(), &request).unwrap_err();
    refused(&error, &["The package `requests` requires `idna>=2.5,<4`, but it's not installed"]);
    request.validate = false;
    assert_eq!(build::create(&room.context(), &request).unwrap().layers.len(), 4);
}

#[test]
fn sources_of_every_kind() {
    let room = Room::new();
    let dir = room.path("src");
    fs::create_dir_all(dir.join("mine")).unwrap();
    fs::write(dir.join("pyproject.toml"), "[project]\nname='mine'\nversion='2.0'\ndescription='d'\nrequires-python='>=3.9'\ndependencies=['six==1.16.0']\n[project.optional-dependencies]\nnet=['idna==3.7']\n[dependency-groups]\ndev=['toml==0.10.2']\nextra=['docopt==0.6.2']\n[build-system]\nrequires=['flit_core==3.9.0']\nbuild-backend='flit_core.buildapi'\n").unwrap();
    fs::write(dir.join("mine/__init__.py"), "'''Mine'''\nx = 1\n").unwrap();
    // A source directory as a requirement: built each time, as it may have changed.
    let created = room.create(&[dir.to_str().unwrap()]).unwrap();
    assert_eq!(names(&created), ["mine", "six"]);
    assert!(
        room.paths(&layer(&created, "mine").digest)
            .contains(&"lib/python3.11/site-packages/mine/__init__.py".to_string())
    );
    fs::write(dir.join("mine/__init__.py"), "'''Mine'''\nx = 2\n").unwrap();
    let changed = room.create(&[dir.to_str().unwrap()]).unwrap();
    assert_ne!(changed.version.layers, created.version.layers);
    // A project without a lock, with one, and with a stale one.
    let project = |extras: &[&str], groups: &[&str]| {
        let mut request = room.request(Input::Project(dir.clone()));
        request.name = "demo/project".parse().unwrap();
        request.extras = extras.iter().map(|e| e.to_string()).collect();
        request.groups = groups.iter().map(|e| e.to_string()).collect();
        build::create(&room.context(), &request)
    };
    refused(&project(&[], &[]).unwrap_err(), &["no uv.lock", "uv lock --project"]);
    room.uv.run(["lock", "--python", &python("3.11"), "--project", dir.to_str().unwrap()], &build::Silent).unwrap();
    let before = fs::read_dir(&dir).unwrap().count();
    assert_eq!(names(&project(&[], &[]).unwrap()), ["mine", "six", "toml"]);
    let created = project(&["net"], &["extra"]).unwrap();
    assert_eq!(names(&created), ["docopt", "idna", "mine", "six", "toml"]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), before, "nothing is written into the project");
    assert_eq!(created.version.lock.as_ref().unwrap().name, "uv.lock");
    assert_eq!(room.lock_text(&created.version), fs::read_to_string(dir.join("uv.lock")).unwrap());
    assert!(created.version.pyproject.is_some());
    refused(&project(&["nope"], &[]).unwrap_err(), &["nope"]);
    // The lock by itself, in place and elsewhere.
    for (path, expected) in
        [(dir.join("uv.lock"), vec!["mine", "six", "toml"]), (room.path("my.lock"), vec!["six", "toml"])]
    {
        if !path.exists() {
            fs::copy(dir.join("uv.lock"), &path).unwrap();
        }
        let mut request = room.request(Input::Lock(path));
        request.name = "demo/lock".parse().unwrap();
        assert_eq!(names(&build::create(&room.context(), &request).unwrap()), expected);
    }
    let text = fs::read_to_string(dir.join("pyproject.toml")).unwrap().replace("six==1.16.0", "six==1.15.0");
    fs::write(dir.join("pyproject.toml"), text).unwrap();
    refused(&project(&[], &[]).unwrap_err(), &["needs to be updated", "run `uv lock"]);
    // Requirements files with hashes and constraints.
    let file = room.path("requirements.txt");
    fs::write(&file, "six==1.16.0 --hash=sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254\n")
        .unwrap();
    let input = Input::Requirements { requirements: vec![], files: vec![file.clone()], constraints: vec![] };
    let created = build::create(&room.context(), &room.request(input)).unwrap();
    assert_eq!(names(&created), ["six"]);
    let input = Input::Requirements {
        requirements: vec!["six".into()],
        files: vec![],
        constraints: vec![room.path("none.txt")],
    };
    assert_eq!(build::create(&room.context(), &room.request(input)).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn files_that_do_not_compile_are_told_and_shown_without_bytecode() {
    let room = Room::new();
    let path = wheel(
        room.dir.path(),
        "old",
        &[("old/__init__.py", ""), ("old/two.py", "print 'x'\n"), ("z.pth", "import sys\n")],
    );
    let created = room.create(&[path.to_str().unwrap()]).unwrap();
    let old = layer(&created, "old");
    assert_eq!(old.meta.uncompiled.keys().collect::<Vec<_>>(), ["lib/python3.11/site-packages/old/two.py"]);
    assert_eq!(old.meta.startup_files, ["lib/python3.11/site-packages/z.pth"]);
    let mut request = room.request(wanted(&[path.to_str().unwrap()]));
    request.bytecode = false;
    let plain = build::create(&room.context(), &request).unwrap();
    assert!(!room.paths(&plain.version.layers[0]).iter().any(|p| p.ends_with(".pyc")));
    assert_ne!(plain.version.layers, created.version.layers);
}
