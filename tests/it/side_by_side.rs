//! The mounted `.venv` against `uv venv --relocatable` + `uv pip sync` with the same lock.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::tree::{self, Entry};
use crate::wheels;
use crate::world::{World, check, python311, uv};

/// Real packages of every shape that wheels have.
const PACKAGES: &[&str] = &[
    // platform wheels with bundled shared libraries
    "numpy",
    "pandas",
    "pillow",
    "lxml",
    "psutil",
    "pyyaml",
    "aiohttp",
    "markupsafe",
    "protobuf",
    // abi3
    "cryptography",
    "bcrypt",
    "tornado",
    // namespace packages, old (nspkg.pth) and new
    "googleapis-common-protos",
    "zope.interface",
    "zope.event",
    "sphinxcontrib-applehelp==1.0.2",
    "backports.tarfile",
    "jaraco.functools",
    // .data directories, data files below share/ and etc/, headers
    "ipykernel",
    "jupyterlab-widgets",
    "widgetsnbextension",
    "notebook-shim",
    "nbconvert",
    "greenlet",
    // GUI and console entry points
    "qtconsole",
    "black",
    "pytest",
    "flask",
    "uvicorn",
    "httpx[cli]",
    "pygments",
    // native scripts, scripts of other kinds
    "ruff",
    "ninja",
    "jmespath",
    // source distributions
    "docopt",
    "antlr4-python3-runtime==4.9.3",
    // thousands of files
    "django",
    "sympy",
    "babel",
    "tzdata",
    // top-level single modules
    "six",
    "typing-extensions",
    "decorator",
    // .pth files
    "setuptools==69.5.1",
    "coverage",
    "pytest-cov",
    // ordinary ones
    "requests",
    "pip",
    "wheel",
    "sqlalchemy",
    "rich",
    "click",
    "jinja2",
    "attrs",
    "pydantic",
    "fastapi",
    "mypy",
];

/// What may differ, and why. This is the list of docs/guarantees.md.
fn allowed(path: &str) -> Option<&'static str> {
    let name = path.rsplit('/').next().unwrap_or(path);
    if path.split('/').any(|p| p == "__pycache__") {
        return Some("bytecode: ours is there from the start, uv writes none");
    }
    match path {
        "pyvenv.cfg" => return Some("pyvenv.cfg: rendered for whoever reads it"),
        ".lock" => return Some(".lock: uv's own lock file"),
        "bin/python" => return Some("bin/python: points into .python instead of the host's interpreter"),
        _ => {}
    }
    if name.starts_with("_envfabric") && path.ends_with(&format!("/site-packages/{name}")) {
        return Some("_envfabric.pth, _envfabric*.py: make imports from a mount cheaper");
    }
    let in_dist_info = path.rsplit('/').nth(1).is_some_and(|dir| dir.ends_with(".dist-info"));
    match name {
        _ if !in_dist_info => None,
        "REQUESTED" => Some("REQUESTED: belongs to a request, not to a wheel"),
        "uv_cache.json" => Some("uv_cache.json: time stamps of uv's cache"),
        _ => None,
    }
}

#[test]
fn the_mounted_venv_has_the_same_paths_kinds_modes_and_bytes_as_uv_makes() {
    let world = World::shared();
    let odd = wheels::Wheel::new("oddnames", "1.0")
        .file("oddnames/__init__.py", "NAME = 'naïve'\n")
        .file("oddnames/naïve_модуль.py", "x = 1\n")
        .file("oddnames/データ/été file.txt", "données\n")
        .file("oddnames-1.0.data/data/share/oddnames/ünï.cfg", "[a]\n")
        .file("oddnames-1.0.data/scripts/odd-script", "#!python\nprint('odd')\n")
        .write(world.dir());
    let python = python311();
    let odd = odd.display().to_string();
    let mut args: Vec<&str> = PACKAGES.to_vec();
    args.extend([odd.as_str(), "--python", &python]);
    world.ensure("side/by-side", &args);
    let mount = world.mount();

    // The same lock, as the mount shows it, installed by uv itself.
    let reference = world.dir().join("reference");
    let _ = fs::remove_dir_all(&reference);
    fs::create_dir(&reference).unwrap();
    let lock = reference.join("pylock.toml");
    fs::copy(mount.at.join("side/by-side/pylock.toml"), &lock).unwrap();
    let venv = reference.join(".venv");
    let uv = |args: &[&str]| check(Command::new(uv()).args(args).current_dir(&reference).env_remove("VIRTUAL_ENV"));
    uv(&["venv", "--quiet", "--relocatable", "--python", &python, venv.to_str().unwrap()]);
    uv(&["pip", "sync", "--quiet", "--python", venv.to_str().unwrap(), lock.to_str().unwrap()]);

    let shown = world.json(["show", "side/by-side"]);
    let ours = tree::walk(&mount.venv("side/by-side"));
    let theirs = tree::walk(&venv);
    let conflicts: Vec<String> = shown["conflicts"]
        .as_array()
        .map(|all| all.iter().map(|c| c["path"].as_str().unwrap().to_string()).collect())
        .unwrap_or_default();

    let mut excused: BTreeMap<&str, usize> = BTreeMap::new();
    let mut compared = (0usize, 0u64);
    let mut excuse = |path: &str| match allowed(path) {
        Some(why) => {
            *excused.entry(why).or_default() += 1;
            true
        }
        None if conflicts.iter().any(|c| c == path) => {
            *excused
                .entry("two wheels have this path: uv's result is a race, ours the order of the lock")
                .or_default() += 1;
            true
        }
        None => false,
    };
    let filter = |tree: BTreeMap<String, Entry>, excuse: &mut dyn FnMut(&str) -> bool| -> BTreeMap<String, Entry> {
        tree.into_iter().filter(|(path, _)| !excuse(path)).collect()
    };
    let ours = filter(ours, &mut excuse);
    let theirs = filter(theirs, &mut excuse);
    let differences = tree::differences(("the mount", &ours), ("uv's venv", &theirs), |path, a, b| {
        compared.0 += 1;
        if let Entry::File { size, .. } = a {
            compared.1 += size;
        }
        a == b || (path.ends_with(".dist-info/RECORD") && same_record(&mount.venv("side/by-side"), &venv, path))
    });
    // None of these packages share a path; should that change, the race is left out and told.
    assert!(conflicts.len() < 10, "{conflicts:?}");
    let packages = shown["packages"].as_array().unwrap().len();
    println!("compared {packages} packages: {} paths, {} bytes", compared.0, compared.1);
    for (why, count) in &excused {
        println!("excused {count}: {why}");
    }
    assert!(packages >= 40, "{packages} packages");
    assert!(compared.0 > 10_000, "{} paths", compared.0);
    assert!(differences.is_empty(), "{} differences\n{}", differences.len(), differences.join("\n"));
}

/// RECORD may lack the lines of files that are left out of layers, and nothing else.
fn same_record(ours: &Path, theirs: &Path, path: &str) -> bool {
    let lines = |root: &Path| -> Vec<String> {
        let text = fs::read_to_string(root.join(path)).unwrap();
        let left_out = |line: &str| {
            let file = line.split(',').next().unwrap_or_default();
            file.ends_with("/REQUESTED") || file.ends_with("/uv_cache.json")
        };
        text.lines().filter(|l| !left_out(l)).map(str::to_string).collect()
    };
    lines(ours) == lines(theirs)
}
