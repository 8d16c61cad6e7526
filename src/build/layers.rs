//! From staged distributions to layers in the store.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Request;
use super::bytecode::{self, Job};
use super::progress::{Event, PackageState, Step};
use super::record;
use super::stage::{Distribution, Found, Stage, left_out};
use crate::environment::lock::strip_credentials;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::{LayerDoc, LayerKind, LayerMeta, LayerWriter, Staged, StagedKind, Store};

/// Byte-compiles `distributions` (unless `request` says not to) and writes a layer each, in the same order.
pub(super) fn write(
    store: &Store,
    stage: &Stage<'_>,
    distributions: Vec<Distribution>,
    request: &Request,
) -> Result<Vec<LayerDoc>> {
    let with_bytecode = request.bytecode;
    let writer = if request.rebuild { LayerWriter::repairing(store) } else { LayerWriter::new(store) };
    let out_root = stage.scratch.join("bytecode");
    let mut jobs: Vec<(usize, Job)> = Vec::new();
    if with_bytecode {
        stage.progress.event(&Event::Step(Step::Compiling));
        for (number, distribution) in distributions.iter().enumerate() {
            let planned = plan(stage, number, distribution, &out_root);
            jobs.extend(planned.into_iter().map(|job| (number, Job { group: number, ..job })));
        }
    }
    let plain: Vec<Job> = jobs.iter().map(|(_, job)| job.clone()).collect();
    let threads = storing_threads();
    let (large, compiled) = std::thread::scope(|scope| {
        let large = std::thread::Builder::new().name("large files".into());
        let store = || storing(&threads, || writer.store_large(&sources(&distributions)));
        let large = large.spawn_scoped(scope, store).at("starting", "a thread");
        let compiled = bytecode::compile(stage.executable, stage.python, &plain, stage.scratch, stage.progress);
        (large.map(|large| large.join()), compiled)
    });
    let broken_off = |_| Err(Error::new(Kind::Failed, "storing the large files broke off"));
    let (large, compiled) = (large?.unwrap_or_else(broken_off)?, compiled?);
    let mut pycs: Vec<Vec<Staged>> = distributions.iter().map(|_| Vec::new()).collect();
    for (number, dir) in jobs.iter().map(|(n, job)| (*n, &job.out)).collect::<std::collections::BTreeSet<_>>() {
        let below = dir.strip_prefix(out_root.join(number.to_string())).unwrap_or(dir);
        pycs[number].extend(files_of(dir, below)?);
    }
    stage.progress.event(&Event::Step(Step::Storing));
    let work: Vec<(Distribution, Vec<Staged>)> = distributions.into_iter().zip(pycs).collect();
    let store = |(distribution, pycs): (Distribution, Vec<Staged>)| {
        let label = format!("{} {}", distribution.metadata.name, distribution.metadata.version);
        let meta = meta(stage, &distribution, &compiled, with_bytecode);
        let name = meta.name.clone();
        let mut staged = stage_files(&distribution)?;
        staged.extend(pycs);
        let doc = writer
            .write_with(meta, staged, Some(&large))
            .map_err(|e| e.context(format!("the layer of {label} could not be written")))?;
        stage.progress.event(&Event::Package { name: &name, state: PackageState::Stored });
        Ok(doc)
    };
    storing(&threads, || work.into_par_iter().map(store).collect())
}

/// More threads than there are processors: a store may be far away, and each object is waited for. None where they cannot
/// be started.
fn storing_threads() -> Option<ThreadPool> {
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    ThreadPoolBuilder::new().num_threads(processors + 4).build().ok()
}

/// Does `work` by those threads, or else by those that there are.
fn storing<R: Send>(threads: &Option<ThreadPool>, work: impl FnOnce() -> R + Send) -> R {
    match threads {
        Some(threads) => threads.install(work),
        None => work(),
    }
}

/// The files of `distributions` that are stored as they lie there.
fn sources(distributions: &[Distribution]) -> Vec<PathBuf> {
    let files = |distribution: &Distribution| -> Vec<PathBuf> {
        let rewritten = rewritten(distribution);
        let is_stored =
            |(path, found): &(&Vec<u8>, &Found)| matches!(found, Found::File { .. }) && !rewritten.contains(path);
        let files = distribution.files.iter().filter(is_stored);
        files.map(|(path, _)| distribution.root.join(OsStr::from_bytes(path))).collect()
    };
    distributions.iter().flat_map(files).collect()
}

/// The files of `distribution` to compile: sources below site-packages.
fn plan(stage: &Stage<'_>, number: usize, distribution: &Distribution, out_root: &Path) -> Vec<Job> {
    let site_packages = format!("{}/", stage.python.site_packages()).into_bytes();
    let sources = distribution.files.iter().filter(|(path, found)| {
        path.starts_with(&site_packages) && path.ends_with(b".py") && matches!(found, Found::File { .. })
    });
    sources
        .filter_map(|(path, _)| {
            let below = Path::new(OsStr::from_bytes(path));
            let out = out_root.join(number.to_string()).join(below.parent()?).join("__pycache__");
            Job::new(distribution.root.join(below), out, format!("/.venv/{}", below.to_str()?))
        })
        .collect()
}

/// The files directly in `dir`, to be shown at `below`.
fn files_of(dir: &Path, below: &Path) -> Result<Vec<Staged>> {
    let mut staged = Vec::new();
    if !dir.is_dir() {
        return Ok(staged);
    }
    for entry in fs::read_dir(dir).at("reading", dir)? {
        let entry = entry.at("reading", dir)?;
        let path = below.join(entry.file_name()).into_os_string();
        let kind = StagedKind::File { source: entry.path(), executable: false };
        staged.push(Staged { path: path.as_bytes().to_vec(), kind });
    }
    Ok(staged)
}

fn meta(
    stage: &Stage<'_>,
    distribution: &Distribution,
    compiled: &BTreeMap<String, String>,
    bytecode: bool,
) -> LayerMeta {
    let site_packages = format!("{}/", stage.python.site_packages());
    let paths = || distribution.files.keys().map(|path| String::from_utf8_lossy(path).into_owned());
    let startup_files = paths()
        .filter(|path| {
            path.strip_prefix(&site_packages).is_some_and(|rest| {
                // As a source, an extension module, or a package of either.
                let runs = |name: &str| {
                    rest.strip_prefix(name).is_some_and(|end| match end.strip_prefix('.') {
                        Some(suffix) => !suffix.contains('/'),
                        None => end.starts_with("/__init__."),
                    })
                };
                (rest.ends_with(".pth") && !rest.contains('/')) || runs("sitecustomize") || runs("usercustomize")
            })
        })
        .collect();
    let uncompiled =
        paths().filter_map(|path| compiled.get(&format!("/.venv/{path}")).map(|error| (path, error.clone()))).collect();
    LayerMeta {
        kind: LayerKind::Wheel,
        name: distribution.metadata.name.clone(),
        version: distribution.metadata.version.clone(),
        abi: stage.python.layer_abi(),
        requires: distribution.metadata.requires.clone(),
        requires_python: distribution.metadata.requires_python.clone(),
        startup_files,
        uncompiled,
        bytecode,
    }
}

/// What is not stored as it lies there.
fn rewritten(distribution: &Distribution) -> [Vec<u8>; 2] {
    ["RECORD", "direct_url.json"].map(|name| format!("{}/{name}", distribution.dist_info).into_bytes())
}

fn stage_files(distribution: &Distribution) -> Result<Vec<Staged>> {
    let [record_path, direct_url] = rewritten(distribution);
    let site_packages = distribution.dist_info.rsplit_once('/').map_or("", |(parent, _)| parent);
    let text = |source: &PathBuf| {
        fs::read(source).at("reading", source).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let mut staged = Vec::with_capacity(distribution.files.len());
    for (path, found) in &distribution.files {
        let source = distribution.root.join(OsStr::from_bytes(path));
        let kind = match found {
            Found::Symlink { target } => StagedKind::Symlink { target: target.clone() },
            Found::File { executable, .. } if *path == record_path => {
                let lines = record::parse(&text(&source)?);
                let drop = |path: &str| {
                    record::resolve(site_packages, path).is_none_or(|place| left_out(&place, &distribution.dist_info))
                };
                StagedKind::Bytes { content: record::rewrite(&lines, drop).into_bytes(), executable: *executable }
            }
            Found::File { executable, .. } if *path == direct_url => {
                StagedKind::Bytes { content: strip_credentials(&text(&source)?).into_bytes(), executable: *executable }
            }
            Found::File { executable, .. } => StagedKind::File { source, executable: *executable },
        };
        staged.push(Staged { path: path.clone(), kind });
    }
    Ok(staged)
}

/// The layer of what `uv venv` makes besides links to the interpreter and `pyvenv.cfg`: `bin/activate`, `lib64`, ...
pub(super) fn write_scaffold(store: &Store, stage: &Stage<'_>) -> Result<LayerDoc> {
    let root = stage.scratch.join("scaffold");
    super::stage::make_venv(stage.uv, stage.executable, &root, stage.progress)?;
    let mut staged = vec![Staged { path: stage.python.site_packages().into_bytes(), kind: StagedKind::Dir }];
    for (dir, below) in [(root.clone(), PathBuf::new()), (root.join("bin"), "bin".into())] {
        for entry in fs::read_dir(&dir).at("reading", &dir)? {
            let entry = entry.at("reading", &dir)?;
            let name = entry.file_name();
            let kind = entry.file_type().at("reading", entry.path())?;
            let ours = name.as_bytes().starts_with(b"python") || name == "pyvenv.cfg" || name == ".lock";
            if kind.is_dir() || ours {
                continue;
            }
            let path = below.join(&name).into_os_string().as_bytes().to_vec();
            let kind = if kind.is_symlink() {
                let target = fs::read_link(entry.path()).at("reading", entry.path())?;
                StagedKind::Symlink { target: target.into_os_string().as_bytes().to_vec() }
            } else {
                StagedKind::File { source: entry.path(), executable: false }
            };
            staged.push(Staged { path, kind });
        }
    }
    staged.extend(accelerator(stage)?);
    let meta = LayerMeta {
        kind: LayerKind::Scaffold,
        name: "scaffold".into(),
        version: stage.uv.version()?.to_string(),
        abi: stage.python.layer_abi(),
        requires: Vec::new(),
        requires_python: None,
        startup_files: Vec::new(),
        uncompiled: BTreeMap::new(),
        bytecode: true,
    };
    LayerWriter::repairing(store).write(meta, staged)
}

/// What makes imports from a mount cheaper (see [`crate::view`]): modules, their bytecode, and the line that runs them.
fn accelerator(stage: &Stage<'_>) -> Result<Vec<Staged>> {
    const MODULES: [(&str, &str); 2] = [
        ("_envfabric", include_str!("accelerator/_envfabric.py")),
        ("_envfabric_imports", include_str!("accelerator/_envfabric_imports.py")),
    ];
    let python = stage.python;
    let site_packages = python.site_packages();
    let (sources, out) = (stage.scratch.join("accelerator"), stage.scratch.join("accelerator-bytecode"));
    fs::create_dir_all(&sources).at("creating", &sources)?;
    let file = |name: &str, kind| Staged { path: format!("{site_packages}/{name}").into_bytes(), kind };
    let line = StagedKind::Bytes { content: b"import _envfabric\n".to_vec(), executable: false };
    let mut staged = vec![file("_envfabric.pth", line)];
    let mut jobs = Vec::new();
    for (name, text) in MODULES {
        let (name, source) = (format!("{name}.py"), sources.join(format!("{name}.py")));
        fs::write(&source, text).at("writing", &source)?;
        jobs.extend(Job::new(source.clone(), out.clone(), format!("/.venv/{site_packages}/{name}")));
        staged.push(file(&name, StagedKind::File { source, executable: false }));
    }
    bytecode::compile(stage.executable, python, &jobs, stage.scratch, stage.progress)?;
    for compiled in super::tree::staged(&out)? {
        let name = String::from_utf8_lossy(&compiled.path).into_owned();
        staged.push(file(&format!("__pycache__/{name}"), compiled.kind));
    }
    Ok(staged)
}
