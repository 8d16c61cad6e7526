//! Taking Pythons into the store. The Pythons of this machine are used where they are there: pyenv's and Debian's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use envfabric::build::{self, Context, Silent, Uv};
use envfabric::error::Kind;
use envfabric::store::{Index, Node, Place, Store, StoredInterpreter};

fn context<'a>(dir: &Path, store: &'a Store, index: &'a Index, uv: &'a Uv) -> Context<'a> {
    Context { store, index, uv, state: dir.join("state"), scratch: dir.join("scratch"), progress: &Silent, trial: None }
}

fn pythons() -> Vec<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let pyenv = |v: &str, m: &str| PathBuf::from(format!("{home}/.pyenv/versions/{v}/bin/python{m}"));
    let all = [pyenv("3.9.18", "3.9"), pyenv("3.11.7", "3.11"), pyenv("3.13.0", "3.13"), "/usr/bin/python3.11".into()];
    let found: Vec<PathBuf> = all.into_iter().filter(|p| p.exists()).collect();
    println!("pythons: {found:?}");
    found
}

/// Writes the files of a layer to `root`, as a mount would show them.
fn show(store: &Store, interpreter: &StoredInterpreter, root: &Path) {
    let catalog = store.catalog(&interpreter.layer).unwrap();
    let pack = fs::read(store.object_path(&catalog.pack().unwrap())).unwrap();
    fs::create_dir_all(root).unwrap();
    for row in catalog.verify().unwrap() {
        let path = root.join(String::from_utf8(catalog.path_of(row.id).unwrap()).unwrap());
        match row.node {
            Node::Dir { .. } => fs::create_dir_all(path).unwrap(),
            Node::Symlink { target } => std::os::unix::fs::symlink(String::from_utf8(target).unwrap(), path).unwrap(),
            Node::File { size, executable, digest, place } => {
                match place {
                    Place::Blob => fs::write(&path, store.read_blob(&digest).unwrap()).unwrap(),
                    Place::Pack { offset } => {
                        fs::write(&path, &pack[offset as usize..(offset + size) as usize]).unwrap()
                    }
                }
                if executable {
                    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                    fs::set_permissions(&path, mode).unwrap();
                }
            }
        }
    }
}

#[test]
fn every_python_is_relocatable_and_the_same_in_two_stores() {
    for path in pythons() {
        let mut stored = Vec::new();
        for _ in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::init(&dir.path().join("store")).unwrap();
            let index = Index::open(&dir.path().join("state"), &store).unwrap();
            let uv = Uv::new(None);
            let context = context(dir.path(), &store, &index, &uv);
            let start = Instant::now();
            let python = build::add_interpreter(&context, path.to_str().unwrap()).unwrap();
            let first = start.elapsed();
            let nowhere = Uv::new(Some("/nonexistent".into()));
            let start = Instant::now();
            let again = build::add_interpreter(&Context { uv: &nowhere, ..context }, path.to_str().unwrap()).unwrap();
            println!("{}: {first:?}, known: {:?}", python.name, start.elapsed());
            assert_eq!(again, python);
            let root = dir.path().join("shown/.python");
            show(&store, &python, &root);
            let script = "import sys, ssl, sqlite3, ctypes, sysconfig, json; print(sys.prefix, [v for v in \
                          sysconfig.get_config_vars().values() if str(v).find('.pyenv/versions') >= 0])";
            let out = Command::new(root.join("bin/python")).args(["-I", "-c", script]).output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            assert_eq!(text.trim(), format!("{} []", root.display()), "{}", String::from_utf8_lossy(&out.stderr));
            assert!(
                python.python.host_libraries.iter().any(|l| l.starts_with("libc.")),
                "{:?}",
                python.python.host_libraries
            );
            assert!(!root.join(python.python.lib_dir()).join("EXTERNALLY-MANAGED").exists());
            assert!(root.join(python.python.site_packages()).is_dir());
            // Its bytecode is good: nothing is compiled again with the constant time set.
            stored.push(python);
        }
        assert_eq!(stored[0].layer, stored[1].layer, "{}", path.display());
        assert_eq!((&stored[0].name, &stored[0].scaffold), (&stored[1].name, &stored[1].scaffold));
    }
}

#[test]
fn a_venv_stands_for_its_base_and_what_cannot_be_used_is_refused() {
    let Some(python) = pythons().into_iter().find(|p| p.to_string_lossy().contains("3.11")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let store = Store::init(&dir.path().join("store")).unwrap();
    let index = Index::open(&dir.path().join("state"), &store).unwrap();
    let uv = Uv::new(None);
    let context = context(dir.path(), &store, &index, &uv);
    let venv = dir.path().join("venv");
    let made = Command::new(&python).args(["-m", "venv", "--without-pip"]).arg(&venv).status().unwrap();
    assert!(made.success());
    let from_venv = build::add_interpreter(&context, venv.join("bin/python").to_str().unwrap()).unwrap();
    let from_base = build::add_interpreter(&context, python.to_str().unwrap()).unwrap();
    assert_eq!(from_venv, from_base);
    assert_eq!(store.interpreters().unwrap().len(), 1);
    assert_eq!(build::add_interpreter(&context, "3.11").unwrap(), from_base);
    for (request, kind, part) in [
        ("pypy3.10", Kind::Unsupported, "only CPython"),
        ("3.99", Kind::NotFound, "uv python install 3.99"),
        ("/nonexistent/python", Kind::NotFound, "/nonexistent/python"),
        ("/bin/true", Kind::Invalid, "does not answer"),
        ("banana", Kind::Usage, "names no Python"),
    ] {
        let error = build::add_interpreter(&context, request).unwrap_err();
        assert_eq!(error.kind(), kind, "{request}: {error:?}");
        assert!(format!("{error:?}").contains(part), "{request}: {error:?}");
    }
    let old = python.to_string_lossy().replace("3.11.7", "3.8.18").replace("python3.11", "python3.8");
    if Path::new(&old).exists() && old.contains("3.8") {
        assert_eq!(build::add_interpreter(&context, &old).unwrap_err().kind(), Kind::Unsupported);
    }
}
