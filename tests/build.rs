//! Builds with real uv and real wheels. uv is found through `ENVFABRIC_UV` or `PATH`; packages come from PyPI.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use envfabric::build::{self, Context, Created, Event, Input, Outcome, Progress, Request, Uv};
use envfabric::environment::{Digest, Version};
use envfabric::error::{Error, Kind, Result};
use envfabric::store::{Index, LayerDoc, Node, Place, Store};
use tempfile::TempDir;

/// A store of its own with everything around it.
struct Room {
    dir: TempDir,
    store: Store,
    index: Index,
    uv: Uv,
    python: Option<String>,
    events: Events,
}

#[derive(Default)]
struct Events(Mutex<Vec<String>>);

impl Progress for Events {
    fn event(&self, event: &Event<'_>) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

/// A store that has the interpreter already; made once, copied with hard links, as nothing in a store ever changes.
fn template() -> &'static Path {
    static TEMPLATE: std::sync::OnceLock<TempDir> = std::sync::OnceLock::new();
    let template = TEMPLATE.get_or_init(|| {
        let room = Room::empty();
        build::add_interpreter(&room.context(), &python("3.11")).unwrap();
        room.dir
    });
    template.path()
}

impl Room {
    fn new() -> Room {
        let template = template();
        let dir = tempfile::tempdir().unwrap();
        for (name, flags) in [("store", "-al"), ("state", "-a")] {
            let copied = std::process::Command::new("cp").arg(flags).arg(template.join(name)).arg(dir.path()).status();
            assert!(copied.unwrap().success());
        }
        Room::in_dir(dir)
    }

    fn empty() -> Room {
        Room::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(dir: TempDir) -> Room {
        let store = Store::init(&dir.path().join("store")).unwrap();
        let index = Index::open(&dir.path().join("state"), &store).unwrap();
        let uv = Uv::new(None);
        if let Err(error) = uv.path() {
            panic!("these tests need uv: {error:?}");
        }
        Room { dir, store, index, uv, python: Some(python("3.11")), events: Events::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn context(&self) -> Context<'_> {
        Context {
            store: &self.store,
            index: &self.index,
            uv: &self.uv,
            state: self.path("state"),
            scratch: self.path("scratch"),
            progress: &self.events,
            trial: None,
        }
    }

    fn request(&self, input: Input) -> Request {
        let mut request = Request::new("demo/a".parse().unwrap(), input);
        request.python = self.python.clone();
        request
    }

    fn create(&self, requirements: &[&str]) -> Result<Created> {
        build::create(&self.context(), &self.request(wanted(requirements)))
    }

    /// Every path of a layer with what it is.
    fn paths(&self, layer: &Digest) -> Vec<String> {
        let catalog = self.store.catalog(layer).unwrap();
        let rows = catalog.verify().unwrap();
        rows.iter()
            .filter(|r| !r.node.is_dir())
            .map(|r| String::from_utf8(catalog.path_of(r.id).unwrap()).unwrap())
            .collect()
    }

    fn read(&self, layer: &Digest, path: &str) -> String {
        let catalog = self.store.catalog(layer).unwrap();
        let row = catalog.find(path.as_bytes()).unwrap().unwrap_or_else(|| panic!("no {path}"));
        let Node::File { size, place, digest, .. } = row.node else { panic!("{path} is no file") };
        let bytes = match place {
            Place::Blob => self.store.read_blob(&digest).unwrap(),
            Place::Pack { offset } => {
                let pack = fs::read(self.store.pack_path(catalog.pack().unwrap())).unwrap();
                pack[offset as usize..(offset + size) as usize].to_vec()
            }
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Writes a layer below `root` as a mount would show it.
    fn show(&self, layer: &Digest, root: &Path) {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let catalog = self.store.catalog(layer).unwrap();
        let pack = catalog.pack().map(|pack| fs::read(self.store.pack_path(pack)).unwrap()).unwrap_or_default();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(envfabric::store::FILE_MTIME as u64);
        fs::create_dir_all(root).unwrap();
        for row in catalog.verify().unwrap() {
            let path = root.join(String::from_utf8(catalog.path_of(row.id).unwrap()).unwrap());
            match row.node {
                Node::Dir { .. } => fs::create_dir_all(path).unwrap(),
                Node::Symlink { target } => symlink(String::from_utf8(target).unwrap(), path).unwrap(),
                Node::File { size, executable, digest, place } => {
                    let bytes = match place {
                        Place::Blob => self.store.read_blob(&digest).unwrap(),
                        Place::Pack { offset } => pack[offset as usize..(offset + size) as usize].to_vec(),
                    };
                    fs::write(&path, bytes).unwrap();
                    let mode = if executable { 0o755 } else { 0o644 };
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                    fs::File::open(&path).unwrap().set_modified(time).unwrap();
                }
            }
        }
    }

    fn lock_text(&self, version: &Version) -> String {
        String::from_utf8(self.store.read_blob(&version.lock.as_ref().unwrap().blob).unwrap()).unwrap()
    }
}

fn wanted(requirements: &[&str]) -> Input {
    Input::Requirements {
        requirements: requirements.iter().map(|r| r.to_string()).collect(),
        files: vec![],
        constraints: vec![],
    }
}

/// A Python of this machine: pyenv's where it is there, else whatever is found.
fn python(minor: &str) -> String {
    let home = std::env::var("HOME").unwrap_or_default();
    let versions = fs::read_dir(format!("{home}/.pyenv/versions")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions
        .filter(|e| e.file_name().to_string_lossy().starts_with(&format!("{minor}.")))
        .map(|e| e.path().join(format!("bin/python{minor}")))
        .filter(|p| p.exists())
        .collect();
    found.sort();
    found.pop().map_or_else(|| minor.to_string(), |p| p.to_string_lossy().into_owned())
}

fn names(created: &Created) -> Vec<&str> {
    created.layers.iter().map(|l| l.meta.name.as_str()).collect()
}

fn layer<'a>(created: &'a Created, name: &str) -> &'a LayerDoc {
    created.layers.iter().find(|l| l.meta.name == name).unwrap_or_else(|| panic!("no layer {name}"))
}

/// Makes a wheel with Python's zipfile: `files` as (path, content), `RECORD` listing them all.
fn wheel(dir: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
    let path = dir.join(format!("{name}-1.0-py3-none-any.whl"));
    let info = format!("{name}-1.0.dist-info");
    let mut all: Vec<(String, String)> = files.iter().map(|(p, c)| (p.to_string(), c.to_string())).collect();
    all.push((format!("{info}/METADATA"), format!("Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")));
    all.push((
        format!("{info}/WHEEL"),
        "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n".into(),
    ));
    let record: String = all.iter().map(|(p, _)| format!("{p},,\n")).collect();
    all.push((format!("{info}/RECORD"), record + &format!("{info}/RECORD,,\n")));
    let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    for (name, content) in all {
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        std::io::Write::write_all(&mut zip, content.as_bytes()).unwrap();
    }
    zip.finish().unwrap();
    path
}

fn refused(error: &Error, parts: &[&str]) {
    let text = format!("{error:?}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

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

#[test]
fn two_stores_and_staging_places_give_the_same_layers() {
    for (minor, wanted) in [
        ("3.9", vec!["requests==2.31.0", "docopt==0.6.2"]),
        ("3.11", vec!["numpy==1.26.4", "requests==2.31.0", "docopt==0.6.2"]),
        ("3.13", vec!["requests==2.31.0", "docopt==0.6.2"]),
    ] {
        let (mut a, mut b) = (Room::empty(), Room::empty());
        let python = python(minor);
        if minor != "3.11" && !python.contains('/') {
            println!("no Python {minor} here");
            continue;
        }
        (a.python, b.python) = (Some(python.clone()), Some(python));
        b.dir = tempfile::Builder::new().prefix("a-much-longer-name").tempdir().unwrap();
        let (one, two) = (a.create(&wanted).unwrap(), b.create(&wanted).unwrap());
        assert_eq!(one.version.layers, two.version.layers, "{minor}");
        assert_eq!(one.version.interpreter, two.version.interpreter);
        assert_eq!(one.version.scaffold, two.version.scaffold);
        assert_eq!(one.version.lock, two.version.lock);
        let scaffold = a.paths(&one.version.scaffold);
        assert!(scaffold.contains(&"bin/activate".to_string()) && scaffold.contains(&"lib64".to_string()));
        assert!(!scaffold.iter().any(|p| p.contains("python") || p.contains("pyvenv")), "{scaffold:?}");
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

/// `cargo test --release --test build timings -- --ignored --nocapture` prints what a larger environment costs.
#[test]
#[ignore = "prints figures; takes minutes on a cold cache"]
fn timings() {
    let mut room = Room::new();
    let wanted = ["pandas==2.2.2", "scikit-learn==1.5.0", "jupyterlab==4.2.1", "pyarrow==16.1.0", "matplotlib==3.9.0"];
    let start = Instant::now();
    let created = room.create(&wanted).unwrap();
    let files: u32 = created.layers.iter().map(|l| l.files).sum();
    println!("{} packages, {files} files, all new: {:?}", created.layers.len(), start.elapsed());
    println!("conflicts: {:?}", created.version.conflicts);
    let start = Instant::now();
    let mut request = room.request(lock_of(&room, &created));
    request.name = "demo/again".parse().unwrap();
    room.uv = Uv::new(Some("/nonexistent/uv".into()));
    build::create(&room.context(), &request).unwrap();
    println!("known lock, first time in this process: {:?}", start.elapsed());
    for number in 0..3 {
        request.name = format!("demo/again{number}").parse().unwrap();
        let start = Instant::now();
        build::create(&room.context(), &request).unwrap();
        println!("known lock: {:?}", start.elapsed());
    }
}

fn lock_of(room: &Room, created: &Created) -> Input {
    let lock = room.path("pylock.toml");
    fs::write(&lock, room.lock_text(&created.version)).unwrap();
    Input::Lock(lock)
}
