//! A store of its own for each test of builds, and what such tests need: wheels made on the spot, a Python.

#![allow(dead_code, unreachable_pub, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use envfabric::build::{self, Context, Created, Event, Input, Progress, Request, Uv};
use envfabric::environment::{Digest, Version};
use envfabric::error::{Error, Result};
use envfabric::store::{Index, LayerDoc, Node, Place, Store};
use tempfile::TempDir;

/// A store of its own with everything around it.
pub struct Room {
    pub dir: TempDir,
    pub store: Store,
    pub index: Index,
    pub uv: Uv,
    pub python: Option<String>,
    pub events: Events,
}

#[derive(Default)]
pub struct Events(pub Mutex<Vec<String>>);

impl Progress for Events {
    fn event(&self, event: &Event<'_>) {
        self.0.lock().unwrap().push(format!("{event:?}"));
    }
}

/// A store that has the interpreter already; made once, copied with hard links, as nothing in a store ever changes.
pub fn template() -> &'static Path {
    static TEMPLATE: std::sync::OnceLock<TempDir> = std::sync::OnceLock::new();
    let template = TEMPLATE.get_or_init(|| {
        let room = Room::empty();
        build::add_interpreter(&room.context(), &python("3.11")).unwrap();
        room.dir
    });
    template.path()
}

impl Room {
    pub fn new() -> Room {
        let template = template();
        let dir = tempfile::tempdir().unwrap();
        for (name, flags) in [("store", "-al"), ("state", "-a")] {
            let copied = std::process::Command::new("cp").arg(flags).arg(template.join(name)).arg(dir.path()).status();
            assert!(copied.unwrap().success());
        }
        Room::in_dir(dir)
    }

    pub fn empty() -> Room {
        Room::in_dir(tempfile::tempdir().unwrap())
    }

    pub fn in_dir(dir: TempDir) -> Room {
        let store = Store::init(&dir.path().join("store")).unwrap();
        let index = Index::open(&dir.path().join("state"), &store).unwrap();
        let uv = Uv::new(None);
        if let Err(error) = uv.path() {
            panic!("these tests need uv: {error:?}");
        }
        Room { dir, store, index, uv, python: Some(python("3.11")), events: Events::default() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn context(&self) -> Context<'_> {
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

    pub fn request(&self, input: Input) -> Request {
        let mut request = Request::new("demo/a".parse().unwrap(), input);
        request.python = self.python.clone();
        request
    }

    pub fn create(&self, requirements: &[&str]) -> Result<Created> {
        build::create(&self.context(), &self.request(wanted(requirements)))
    }

    /// Every path of a layer with what it is.
    pub fn paths(&self, layer: &Digest) -> Vec<String> {
        let catalog = self.store.catalog(layer).unwrap();
        let rows = catalog.verify().unwrap();
        rows.iter()
            .filter(|r| !r.node.is_dir())
            .map(|r| String::from_utf8(catalog.path_of(r.id).unwrap()).unwrap())
            .collect()
    }

    pub fn read(&self, layer: &Digest, path: &str) -> String {
        let catalog = self.store.catalog(layer).unwrap();
        let row = catalog.find(path.as_bytes()).unwrap().unwrap_or_else(|| panic!("no {path}"));
        let Node::File { size, place, digest, .. } = row.node else { panic!("{path} is no file") };
        let bytes = match place {
            Place::Blob => self.store.read_blob(&digest).unwrap(),
            Place::Pack { offset } => {
                let pack = fs::read(self.store.object_path(&catalog.pack().unwrap())).unwrap();
                pack[offset as usize..(offset + size) as usize].to_vec()
            }
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Writes a layer below `root` as a mount would show it.
    pub fn show(&self, layer: &Digest, root: &Path) {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let catalog = self.store.catalog(layer).unwrap();
        let pack = catalog.pack().map(|pack| fs::read(self.store.object_path(&pack)).unwrap()).unwrap_or_default();
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

    pub fn lock_text(&self, version: &Version) -> String {
        String::from_utf8(self.store.read_blob(&version.lock.as_ref().unwrap().blob).unwrap()).unwrap()
    }
}

pub fn wanted(requirements: &[&str]) -> Input {
    Input::Requirements {
        requirements: requirements.iter().map(|r| r.to_string()).collect(),
        files: vec![],
        constraints: vec![],
    }
}

/// A Python of this machine: pyenv's where it is there, else whatever is found.
pub fn python(minor: &str) -> String {
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

pub fn names(created: &Created) -> Vec<&str> {
    created.layers.iter().map(|l| l.meta.name.as_str()).collect()
}

pub fn layer<'a>(created: &'a Created, name: &str) -> &'a LayerDoc {
    created.layers.iter().find(|l| l.meta.name == name).unwrap_or_else(|| panic!("no layer {name}"))
}

/// Makes a wheel with Python's zipfile: `files` as (path, content), `RECORD` listing them all.
pub fn wheel(dir: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
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

pub fn refused(error: &Error, parts: &[&str]) {
    let text = format!("{error:?}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}
