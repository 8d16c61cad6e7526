//! A synthetic store: a shell script for a Python, a scaffold, and layers of whatever a test wants.

#![allow(dead_code, unused_macros, missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envfabric::environment::{Builder, Digest, Document, EnvName, InterpreterRef, Source, VERSION_FORMAT, Version};
use envfabric::store::{Codec, Index, LayerKind, LayerMeta, LayerWriter, Store, now};
pub use envfabric::store::{Staged, StagedKind};
use tempfile::TempDir;

/// Ends a test that cannot run here, and says why.
macro_rules! needs_mounts {
    () => {
        if let Some(reason) = no_mounts_because() {
            eprintln!("skipped: {reason}");
            return;
        }
    };
}

pub const SITE: &str = "lib/python3.11/site-packages";

pub fn meta(name: &str, kind: LayerKind) -> LayerMeta {
    LayerMeta {
        kind,
        name: name.into(),
        version: "1.0".into(),
        abi: "cpython-311-x86_64-linux-gnu+a70d0d0a".into(),
        requires: vec![],
        requires_python: None,
        startup_files: vec![],
        uncompiled: Default::default(),
        bytecode: true,
    }
}

pub fn file(path: impl AsRef<str>, content: impl Into<Vec<u8>>) -> Staged {
    Staged { path: path.as_ref().into(), kind: StagedKind::Bytes { content: content.into(), executable: false } }
}

pub fn script(path: impl AsRef<str>, content: &str) -> Staged {
    Staged { path: path.as_ref().into(), kind: StagedKind::Bytes { content: content.into(), executable: true } }
}

pub fn link(path: impl AsRef<str>, target: &str) -> Staged {
    Staged { path: path.as_ref().into(), kind: StagedKind::Symlink { target: target.into() } }
}

pub fn empty_dir(path: impl AsRef<str>) -> Staged {
    Staged { path: path.as_ref().into(), kind: StagedKind::Dir }
}

/// Bytes that compress badly and differ everywhere.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

pub struct Fixture {
    pub dir: TempDir,
    pub store: Store,
    pub index: Arc<Index>,
    pub python: Digest,
    pub scaffold: Digest,
}

impl Default for Fixture {
    fn default() -> Self {
        Fixture::new()
    }
}

impl Fixture {
    pub fn new() -> Self {
        Fixture::with(Codec::Raw)
    }

    pub fn with(codec: Codec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init_with(&dir.path().join("store"), codec).unwrap();
        let index = Arc::new(Index::open(&dir.path().join("index"), &store).unwrap());
        let writer = LayerWriter::new(&store);
        let python = vec![
            script("bin/python3.11", "#!/bin/sh\necho \"fake python $*\"\n"),
            link("bin/python", "python3.11"),
            file("lib/python3.11/os.py", "import sys\n"),
            file("lib/libpython3.11.so.1.0", noise(300_000, 7)),
            file("include/python3.11/Python.h", "/* */\n"),
        ];
        let python = writer.write(meta("cpython", LayerKind::Interpreter), python).unwrap().digest;
        let scaffold = vec![
            file("bin/activate", "# activate\n"),
            link("lib64", "lib"),
            empty_dir(SITE),
            file(".gitignore", "*\n"),
        ];
        let scaffold = writer.write(meta("scaffold", LayerKind::Scaffold), scaffold).unwrap().digest;
        Fixture { dir, store, index, python, scaffold }
    }

    pub fn layer(&self, name: &str, files: Vec<Staged>) -> Digest {
        LayerWriter::new(&self.store).write(meta(name, LayerKind::Wheel), files).unwrap().digest
    }

    /// Three ordinary packages: a shared namespace, a script each, a large file.
    pub fn packages(&self) -> Vec<Digest> {
        let package = |name: &str, seed: u64| {
            vec![
                file(format!("{SITE}/{name}/__init__.py"), format!("name = {name:?}\n")),
                file(format!("{SITE}/{name}/data/big.bin"), noise(700_000, seed)),
                file(format!("{SITE}/{name}/data/small.bin"), noise(5_000, seed + 1)),
                file(format!("{SITE}/{name}/empty.py"), ""),
                file(format!("{SITE}/shared/{name}.py"), format!("# {name}\n")),
                file(format!("{SITE}/{name}-1.0.dist-info/METADATA"), format!("Name: {name}\n")),
                link(format!("{SITE}/{name}/alias"), "data/small.bin"),
                script(format!("bin/{name}"), "#!/bin/sh\necho hi\n"),
                file(format!("share/{name}/ünïcode \u{1F40D} name.txt"), "x"),
            ]
        };
        ["alpha", "beta", "gamma"].iter().zip([100, 200, 300]).map(|(n, s)| self.layer(n, package(n, s))).collect()
    }

    pub fn draft(&self, name: &str, layers: Vec<Digest>) -> Version {
        let document = |name: &str, text: &str| Document {
            name: name.into(),
            blob: self.store.ensure_blob(text.as_bytes()).unwrap(),
            size: text.len() as u64,
        };
        Version {
            format: VERSION_FORMAT,
            environment: name.parse().unwrap(),
            number: 1,
            created: now(),
            interpreter: InterpreterRef {
                layer: self.python,
                version: "3.11.7".into(),
                executable: "bin/python3.11".into(),
            },
            scaffold: self.scaffold,
            layers,
            summaries: vec![],
            lock: Some(document("pylock.toml", "lock-version = \"1.0\"\n")),
            pyproject: Some(document("pyproject.toml", "[project]\nname = \"x\"\n")),
            source: Source::Requirements { requirements: vec!["alpha".into()], files: vec![] },
            builder: Builder { envfabric: "0".into(), uv: None, host: "h".into() },
            conflicts: vec![],
            nonce: String::new(),
        }
    }

    pub fn publish(&self, name: &str, layers: Vec<Digest>) -> u64 {
        self.store.publish_version(self.draft(name, layers)).unwrap().version().number
    }

    pub fn name(&self, name: &str) -> EnvName {
        name.parse().unwrap()
    }

    /// A new directory beside the store.
    pub fn place(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

/// Why real mounts cannot be tried here; none when they can.
pub fn no_mounts_because() -> Option<&'static str> {
    if !Path::new("/dev/fuse").exists() {
        Some("/dev/fuse is missing")
    } else if !nix::unistd::geteuid().is_root() {
        Some("these tests mount as root")
    } else {
        None
    }
}

/// Waits until `holds`, and fails with `what` when it does not within ten seconds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
