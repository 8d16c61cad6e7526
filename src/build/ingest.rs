//! Taking a Python installation into the store: copy, make relocatable, prove, write.
//!
//! ```text
//! original --copy--> staging tree --RUNPATH, sysconfig, .pc--> relocatable --run with the original hidden--> layer
//! ```
//! A build with a shared libpython carries the absolute path of its library directory; copied as it is, it would load
//! whatever libpython lies there on another node, silently. So the proof runs before anything is published.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::bytecode::{self, Job};
use super::elf::{self, Rule};
use super::layers;
use super::probe::{self, Full};
use super::progress::{Event, Step};
use super::stage::Stage;
use super::tree;
use crate::environment::Interpreter;
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::{LayerKind, LayerMeta, LayerWriter, Staged, StagedKind, Store, StoredInterpreter, now};

const SYSCONFIG: &str = include_str!("sysconfig_append.py");

/// Prefixes that hold much besides Python.
const SHARED_PREFIXES: [&str; 3] = ["/", "/usr", "/usr/local"];

/// What setting up a mount namespace says where it is not permitted: a sandbox, a kernel without user namespaces
/// (EINVAL) or with a limit of them (ENOSPC). Any other failure is the interpreter's.
const NOT_PERMITTED: [i32; 5] = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL, libc::ENOSPC];

/// Ingests the interpreter at `stage.executable` and publishes it. `stage.python` is not looked at.
pub(super) fn ingest(store: &Store, stage: &Stage<'_>) -> Result<StoredInterpreter> {
    stage.progress.event(&Event::Step(Step::AddingInterpreter));
    let script = stage.scratch.join("probe.py");
    let original = probe::full(stage.executable, &script, &[])?;
    original.brief.check(stage.executable)?;
    let mut python = describe(&original);
    if original.platlibdir != "lib" {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{} keeps its library in {}", stage.executable.display(), original.platlibdir),
        )
        .hint("use one from `uv python install`, which keeps it in lib"));
    }
    let root = stage.scratch.join("python");
    copy(stage.executable, &original, &python, &root)?;
    let proved = prove(&original, &python, &root, &script, stage)?;
    python.host_libraries = host_libraries(&proved, &root);
    python.broken_modules = proved.failed;

    let mut staged = tree::staged(&root)?;
    let uncompiled = compile(&python, &root, &mut staged, stage)?;
    stage.progress.event(&Event::Step(Step::Storing));
    let meta = LayerMeta {
        kind: LayerKind::Interpreter,
        name: "cpython".into(),
        version: python.version.clone(),
        abi: python.layer_abi(),
        requires: Vec::new(),
        requires_python: None,
        startup_files: Vec::new(),
        uncompiled,
        bytecode: true,
    };
    let layer = LayerWriter::repairing(store).write(meta, staged)?.digest;
    let scaffold = layers::write_scaffold(store, &Stage { python: &python, ..*stage })?.digest;
    let threads = if python.is_free_threaded() { "t" } else { "" };
    let platform = python.abi.splitn(3, '-').nth(2).unwrap_or("unknown");
    let stored = StoredInterpreter {
        name: format!("cpython-{}{threads}-{platform}-{}", python.version, layer.short()),
        layer,
        scaffold,
        python,
        origin: stage.executable.to_string_lossy().into_owned(),
        created: now(),
    };
    store.publish_interpreter(&stored)?;
    if store.signer().is_some() {
        return Ok(stored);
    }
    // Another builder may have been first, with another uv's scaffold: what is published counts.
    let there = store.interpreters()?.into_iter().find(|i| i.name == stored.name);
    Ok(there.unwrap_or(stored))
}

fn describe(full: &Full) -> Interpreter {
    let libc = match full.libc.0.as_str() {
        "" => "musl".to_string(),
        name => format!("{name} {}", full.libc.1),
    };
    let mut python = Interpreter {
        implementation: full.brief.implementation.clone(),
        version: full.brief.version.clone(),
        abi: full.brief.soabi.clone().unwrap_or_default(),
        magic: full.magic.clone(),
        executable: String::new(),
        libc,
        markers: full.markers.clone(),
        host_libraries: Vec::new(),
        broken_modules: BTreeMap::new(),
    };
    python.executable = format!("bin/{}", python.lib_dir().trim_start_matches("lib/"));
    python
}

/// Names of the shared libraries that are mapped from outside the tree, sorted.
fn host_libraries(probed: &Full, root: &Path) -> Vec<String> {
    let outside = probed.mapped.iter().filter(|path| !path.starts_with(root));
    let names = outside.filter_map(|path| path.file_name()?.to_str()).filter(|name| name.contains(".so"));
    let mut names: Vec<String> = names.map(str::to_string).collect();
    names.sort();
    names.dedup();
    names
}

/// Copies what belongs to the interpreter to `root`, relocatable.
fn copy(executable: &Path, full: &Full, python: &Interpreter, root: &Path) -> Result<()> {
    let prefix = full.brief.base_prefix.as_path();
    let shared_prefix = SHARED_PREFIXES.iter().any(|p| prefix == Path::new(p));
    let lib_dir = python.lib_dir();
    fs::create_dir_all(root.join("bin")).at("creating", root)?;
    fs::create_dir_all(root.join(python.site_packages())).at("creating", root)?;
    let binary = executable.canonicalize().at("finding", executable)?;
    tree::copy_file(&binary, &root.join(&python.executable))?;
    let name = python.executable.trim_start_matches("bin/");
    for link in ["python3", "python"] {
        let path = root.join("bin").join(link);
        std::os::unix::fs::symlink(name, &path).at("creating", &path)?;
    }
    let stdlib = full.stdlib.canonicalize().at("finding", &full.stdlib)?;
    tree::copy_tree(&stdlib, &root.join(&lib_dir), &|path| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        matches!(name, "__pycache__" | "EXTERNALLY-MANAGED")
            || matches!(path.to_str(), Some("site-packages" | "dist-packages"))
            || (in_config_dir(path) && (name.ends_with(".a") || name.starts_with("libpython")))
    })?;
    if let Some(soname) = &full.soname {
        copy_libpython(full, soname, root)?;
    }
    if full.include.is_dir()
        && let Some(name) = full.include.file_name()
    {
        let to = root.join("include").join(name);
        tree::copy_tree(&full.include, &to, &|_| false)?;
        // Debian's pyconfig.h only includes the real one, which lies elsewhere.
        if let Some(multiarch) = &full.multiarch {
            let real = Path::new("/usr/include").join(multiarch).join(name).join("pyconfig.h");
            if shared_prefix && real.is_file() {
                tree::copy_file(&real, &to.join("pyconfig.h"))?;
            }
        }
    }
    if let Some(wheels) = full.wheel_pkg_dir.as_deref().filter(|dir| dir.is_dir()) {
        tree::copy_tree(wheels, &root.join("share/python-wheels"), &|_| false)?;
    }
    if !shared_prefix {
        copy_private(full, prefix, root)?;
    }
    relocate_elf(root, prefix, full)?;
    relocate_texts(full, python, root, prefix)
}

/// True below `config-3.11-x86_64-linux-gnu`, where builds keep a static libpython and links to the shared one.
fn in_config_dir(path: &Path) -> bool {
    path.iter().next().and_then(|first| first.to_str()).is_some_and(|first| first.starts_with("config-"))
}

fn copy_libpython(full: &Full, soname: &str, root: &Path) -> Result<()> {
    let dirs = [full.libdir.clone(), Some(full.brief.base_prefix.join("lib"))];
    let mapped = full.mapped.iter().find(|p| p.file_name().is_some_and(|n| n == soname)).cloned();
    let found = dirs.into_iter().flatten().map(|dir| dir.join(soname)).chain(mapped).find(|p| p.is_file());
    let Some(library) = found else {
        return Err(Error::new(Kind::Failed, format!("{soname} of this Python was not found"))
            .hint("name another Python with --python; `uv python install 3.12` gets one that needs no such library"));
    };
    tree::copy_file(&library, &root.join("lib").join(soname))?;
    if let Some((plain, _)) = soname.split_once(".so.") {
        let link = root.join("lib").join(format!("{plain}.so"));
        std::os::unix::fs::symlink(soname, &link).at("creating", &link)?;
    }
    let stable = library.with_file_name("libpython3.so");
    if stable.is_file() {
        tree::copy_file(&stable, &root.join("lib/libpython3.so"))?;
    }
    Ok(())
}

/// What an installation with a prefix of its own keeps beside the standard library: private libraries, Tcl, terminfo.
fn copy_private(full: &Full, prefix: &Path, root: &Path) -> Result<()> {
    let real_prefix = prefix.canonicalize().at("finding", prefix)?;
    let stdlib = full.stdlib.canonicalize().at("finding", &full.stdlib)?;
    for library in full.mapped.iter().filter(|p| p.starts_with(&real_prefix) && !p.starts_with(&stdlib)) {
        let Ok(below) = library.strip_prefix(&real_prefix) else { continue };
        let to = root.join(below);
        if !below.starts_with("lib") || !library.is_file() || to.exists() {
            continue;
        }
        tree::copy_file(library, &to)?;
        // It is asked for by its short name, which is a link beside it.
        let (Some(dir), Some(to_dir)) = (library.parent(), to.parent()) else { continue };
        for entry in fs::read_dir(dir).at("reading", dir)?.flatten() {
            let link = to_dir.join(entry.file_name());
            if entry.path().is_symlink() && entry.path().canonicalize().is_ok_and(|t| t == *library) && !link.exists() {
                std::os::unix::fs::symlink(library.file_name().unwrap_or_default(), &link).at("creating", &link)?;
            }
        }
    }
    let lib = prefix.join("lib");
    for entry in fs::read_dir(&lib).at("reading", &lib)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let tcl = ["tcl", "tk", "itcl", "thread"].iter().any(|p| name.starts_with(p));
        if tcl && entry.path().is_dir() {
            tree::copy_tree(&entry.path(), &root.join("lib").join(&name), &|_| false)?;
        }
    }
    let terminfo = prefix.join("share/terminfo");
    if terminfo.is_dir() {
        tree::copy_tree(&terminfo, &root.join("share/terminfo"), &|_| false)?;
    }
    Ok(())
}

fn relocate_elf(root: &Path, prefix: &Path, full: &Full) -> Result<()> {
    // The build may have been told another name of the prefix (through a link), and that is what the files hold.
    let built = full.libdir.as_deref().and_then(Path::parent);
    let built = built.filter(|b| b.canonicalize().ok() == prefix.canonicalize().ok()).unwrap_or(prefix);
    let prefixes = [prefix.to_string_lossy(), built.to_string_lossy()];
    for path in tree::files(root)? {
        let bytes = fs::read(&path).at("reading", &path)?;
        let below = path.strip_prefix(root).unwrap_or(&path);
        let up = vec![".."; below.components().count().saturating_sub(1)].join("/");
        let rule = Rule { prefixes: [&prefixes[0], &prefixes[1]], up: &up, library: full.soname.as_deref() };
        let patched = elf::relocate(&bytes, &rule).map_err(|e| e.context(format!("{} failed", below.display())))?;
        if let Some(patched) = patched {
            fs::write(&path, patched).at("writing", &path)?;
        }
    }
    Ok(())
}

/// Lets build information follow the tree: sysconfig's variables, and `.pc` files.
fn relocate_texts(full: &Full, python: &Interpreter, root: &Path, prefix: &Path) -> Result<()> {
    let data = root.join(python.lib_dir()).join(format!("{}.py", full.sysconfigdata));
    let data = if data.is_symlink() { data.canonicalize().at("finding", &data)? } else { data };
    if data.is_file() {
        let quote = |text: &str| serde_json::to_string(text).unwrap_or_default();
        // In /usr most paths are the system's own and stay.
        let name = python.lib_dir().trim_start_matches("lib/").replace('.', "\\.");
        let roots = match prefix == Path::new("/usr") {
            true => format!(
                "({}, {}, {})",
                quote(&format!("/lib/{name}")),
                quote(&format!("/include/{name}")),
                quote("/share/python-wheels")
            ),
            false => "()".to_string(),
        };
        let text = SYSCONFIG.replace("@OLD@", &quote(&prefix.to_string_lossy())).replace("@ROOTS@", &roots);
        let mut bytes = fs::read(&data).at("reading", &data)?;
        bytes.extend_from_slice(text.as_bytes());
        fs::write(&data, bytes).at("writing", &data)?;
    }
    let from = prefix.join("lib/pkgconfig");
    if SHARED_PREFIXES.iter().any(|p| prefix == Path::new(p)) || !from.is_dir() {
        return Ok(());
    }
    let to = root.join("lib/pkgconfig");
    fs::create_dir_all(&to).at("creating", &to)?;
    for entry in fs::read_dir(&from).at("reading", &from)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("python") && name.ends_with(".pc") && entry.path().is_file() {
            let text = fs::read_to_string(entry.path()).at("reading", entry.path())?;
            let lines = text.lines().map(|line| match line.starts_with("prefix=") {
                true => "prefix=${pcfiledir}/../..\n".to_string(),
                false => format!("{line}\n"),
            });
            fs::write(to.join(&name), lines.collect::<String>()).at("writing", to.join(&name))?;
        }
    }
    Ok(())
}

/// Runs the copy where the original cannot be seen, and fails unless it stands on its own.
fn prove(original: &Full, python: &Interpreter, root: &Path, script: &Path, stage: &Stage<'_>) -> Result<Full> {
    let executable = root.join(&python.executable);
    let hidden = hidden_paths(original, stage);
    let probed = match probe::full(&executable, script, &hidden) {
        Err(error) if matches!(error.kind(), Kind::Os(errno) if NOT_PERMITTED.contains(&errno)) => {
            let note = "the interpreter was proved by its memory map only: this machine permits no mount namespaces";
            tracing::info!(reason = %error.chain(), "{note}");
            stage.progress.event(&Event::Note(note));
            probe::full(&executable, script, &[])
        }
        other => other,
    }
    .map_err(|e| e.context(format!("{} cannot be made relocatable", stage.executable.display())))?;
    let fail = |why: String| {
        Err(Error::new(Kind::Failed, format!("{} cannot be made relocatable: {why}", stage.executable.display()))
            .hint("use one from `uv python install`, which is relocatable as it is"))
    };
    for (what, path) in [("prefix", &probed.brief.prefix), ("base_prefix", &probed.brief.base_prefix)] {
        if path != root {
            return fail(format!("its sys.{what} is {}", path.display()));
        }
    }
    if let Some(path) = probed.mapped.iter().find(|p| hidden.iter().any(|h| p.starts_with(h))) {
        return fail(format!("the copy still uses {}", path.display()));
    }
    // A wrong RUNPATH falls through to the host's libpython, where there is one, and mostly works.
    let foreign = |path: &&PathBuf| {
        !path.starts_with(root) && path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libpython"))
    };
    if let Some(path) = probed.mapped.iter().find(foreign) {
        return fail(format!("the copy uses {} of the host", path.display()));
    }
    if let Some((module, why)) = probed.failed.iter().find(|(name, _)| !original.failed.contains_key(*name)) {
        return fail(format!("module {module} of the copy does not import ({why})"));
    }
    Ok(probed)
}

/// What of the original is hidden while the copy is proved.
fn hidden_paths(original: &Full, stage: &Stage<'_>) -> Vec<PathBuf> {
    let real = |path: &Path| path.canonicalize().ok();
    let prefix = real(&original.brief.base_prefix);
    if let Some(prefix) = prefix.filter(|p| !SHARED_PREFIXES.iter().any(|s| p == Path::new(s)))
        && !stage.scratch.starts_with(&prefix)
    {
        return vec![prefix];
    }
    let library = original.soname.as_ref().zip(original.libdir.as_ref()).map(|(name, dir)| dir.join(name));
    let paths = [
        Some(original.stdlib.clone()),
        Some(original.include.clone()),
        original.wheel_pkg_dir.clone(),
        Some(original.executable.clone()),
        library,
    ];
    paths.into_iter().flatten().filter_map(|path| real(&path)).collect()
}

/// Compiles the standard library, but not its tests, which nobody imports; returns what did not compile.
fn compile(
    python: &Interpreter,
    root: &Path,
    staged: &mut Vec<Staged>,
    stage: &Stage<'_>,
) -> Result<BTreeMap<String, String>> {
    stage.progress.event(&Event::Step(Step::Compiling));
    let out_root = stage.scratch.join("python-bytecode");
    let lib = format!("{}/", python.lib_dir());
    let jobs: Vec<Job> = staged
        .iter()
        .filter(|s| matches!(s.kind, StagedKind::File { .. }))
        .filter_map(|s| std::str::from_utf8(&s.path).ok())
        .filter(|path| path.starts_with(&lib) && path.ends_with(".py"))
        .filter(|path| !path.split('/').any(|part| matches!(part, "test" | "tests" | "idle_test")))
        .filter_map(|path| {
            let out = out_root.join(Path::new(path).parent()?).join("__pycache__");
            Job::new(root.join(path), out, format!("/.python/{path}"))
        })
        .collect();
    let failed = bytecode::compile(stage.executable, python, &jobs, stage.scratch, stage.progress)?;
    if out_root.is_dir() {
        staged.extend(tree::staged(&out_root)?);
    }
    Ok(failed.into_iter().map(|(name, why)| (name.trim_start_matches("/.python/").to_string(), why)).collect())
}
