//! Which interpreter an environment gets: what was asked for, what the store has, what this machine has.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use rayon::prelude::*;
use uv_pep440::{Version, VersionSpecifiers};

use super::ingest;
use super::probe::{self, Brief};
use super::progress::{Event, Silent, Step};
use super::scratch::{self, Scratch};
use super::stage::Stage;
use super::{Context, tree};
use crate::environment::{Interpreter, Markers};
use crate::error::{Error, IoContext, Kind, Result};
use crate::store::StoredInterpreter;
use crate::sys::glibc_version;

/// What `--python` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// This executable.
    Path(PathBuf),
    /// Any of these versions.
    Version { specifiers: VersionSpecifiers, free_threaded: bool, exact: bool },
}

impl Wanted {
    /// `3`, `3.11`, `3.11.7`, `3.13t`, `>=3.9,<3.12`, `cpython3.11`, `python@3.11`, or a path.
    pub(super) fn parse(text: &str) -> Result<Wanted> {
        let text = text.trim();
        if text.contains('/') {
            return Ok(Wanted::Path(std::path::absolute(text).at("finding", text)?));
        }
        let bad = || {
            Error::new(Kind::Usage, format!("{text:?} names no Python"))
                .hint("give a path, a version (3.11, 3.11.7, 3.13t) or a range ('>=3.9,<3.12')")
        };
        let lower = text.to_ascii_lowercase();
        if ["pypy", "graalpy", "pyodide", "jython", "pyston"].iter().any(|other| lower.starts_with(other)) {
            return Err(Error::new(Kind::Unsupported, format!("{text:?} cannot be used: only CPython is supported"))
                .hint("name a CPython 3.9 or later, for example --python 3.12"));
        }
        let version = ["cpython", "python", "cp"].iter().find_map(|p| lower.strip_prefix(p)).unwrap_or(&lower);
        let version = version.trim_start_matches(['@', '-']);
        // `.python-version` may hold uv's long form, `cpython-3.11.7-linux-x86_64-gnu`.
        let version = version.split("-linux").next().unwrap_or(version);
        if version.starts_with(['<', '>', '=', '!', '~']) {
            let specifiers = VersionSpecifiers::from_str(version).map_err(|_| bad())?;
            return Ok(Wanted::Version { specifiers, free_threaded: false, exact: false });
        }
        let (number, free_threaded) = match version.strip_suffix('t') {
            Some(number) => (number, true),
            None => (version, false),
        };
        if !number.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(bad());
        }
        let exact = number.matches('.').count() >= 2;
        let specifier = if exact { format!("=={number}") } else { format!("=={number}.*") };
        let specifiers = VersionSpecifiers::from_str(&specifier).map_err(|_| bad())?;
        Ok(Wanted::Version { specifiers, free_threaded, exact })
    }

    fn any() -> Wanted {
        Wanted::Version { specifiers: VersionSpecifiers::empty(), free_threaded: false, exact: false }
    }

    fn accepts(&self, version: &str, free_threaded: bool) -> bool {
        match self {
            Wanted::Path(_) => false,
            Wanted::Version { specifiers, free_threaded: wanted, exact } => Version::from_str(version)
                .is_ok_and(|v| *wanted == free_threaded && specifiers.contains(&v) && (*exact || !v.any_prerelease())),
        }
    }
}

/// The interpreter to use: `request` decides; without one, `requires` (a version specifier of a lock or project)
/// narrows the choice. One of the store is preferred to one of the machine, as the machine's must be ingested first.
pub(super) fn resolve(
    context: &Context<'_>,
    request: Option<&str>,
    requires: Option<&str>,
) -> Result<StoredInterpreter> {
    let wanted = match request {
        Some(text) => Wanted::parse(text)?,
        None => Wanted::any(),
    };
    if let Wanted::Path(path) = &wanted {
        return at_path(context, path);
    }
    let requires =
        requires.and_then(|text| VersionSpecifiers::from_str(text).ok()).unwrap_or_else(VersionSpecifiers::empty);
    let suits = |version: &str| Version::from_str(version).is_ok_and(|v| requires.contains(&v));
    let (stored, doubtful): (Vec<StoredInterpreter>, Vec<StoredInterpreter>) = context
        .store
        .interpreters()?
        .into_iter()
        .filter(|i| for_this_machine(&i.python) && wanted.accepts(&i.python.version, i.python.is_free_threaded()))
        .partition(|i| fits_libc(&i.python.libc, glibc_version()));
    if let Some(found) = stored.iter().find(|i| suits(&i.python.version)) {
        return Ok(found.clone());
    }
    // One that was taken in on a newer system may need nothing of what is newer there: only starting it tells.
    let starts = |i: &&StoredInterpreter| runnable(context, i).is_ok_and(|path| probe::brief(&path).is_ok());
    if let Some(found) = doubtful.iter().filter(|i| suits(&i.python.version)).find(starts) {
        return Ok(found.clone());
    }
    context.progress.event(&Event::Step(Step::FindingInterpreter));
    let (found, looked) = on_this_machine();
    let mut fitting: Vec<&(PathBuf, Brief)> =
        found.iter().filter(|(_, brief)| wanted.accepts(&brief.version, is_free_threaded(brief))).collect();
    fitting.sort_by_key(|(path, brief)| {
        (
            std::cmp::Reverse(suits(&brief.version)),
            std::cmp::Reverse(Version::from_str(&brief.version).ok()),
            path.clone(),
        )
    });
    if let Some((path, brief)) = fitting.first()
        && (suits(&brief.version) || stored.is_empty())
    {
        return at_path(context, path);
    }
    if let Some(found) = stored.into_iter().next() {
        return Ok(found);
    }
    let asked = request.map(str::to_string).or_else(|| (!requires.is_empty()).then(|| requires.to_string()));
    let asked = asked.unwrap_or_else(|| ">=3.9".into());
    if let Ok(out) = context.uv.run(["python", "find", "--no-project", &asked], &Silent)
        && let Some(path) = out.lines().last().filter(|line| line.starts_with('/'))
    {
        return at_path(context, Path::new(path));
    }
    let seen: Vec<String> =
        found.iter().map(|(path, brief)| format!("{} ({})", path.display(), brief.version)).collect();
    let version = asked.trim_start_matches(['>', '=', '~', '<']).split(',').next().unwrap_or("3.12").to_string();
    Err(Error::new(Kind::NotFound, format!("no Python {asked} was found"))
        .detail(format!("looked in {looked}\nfound: {}", if seen.is_empty() { "none".into() } else { seen.join(", ") }))
        .hint(format!("get it with `uv python install {version}`, or name one with --python PATH")))
}

fn is_free_threaded(brief: &Brief) -> bool {
    brief.soabi.as_deref().and_then(|abi| abi.split('-').nth(1)).is_some_and(|tag| tag.ends_with('t'))
}

fn for_this_machine(python: &Interpreter) -> bool {
    let Markers { platform_machine, sys_platform, .. } = &python.markers;
    let machine = nix::sys::utsname::uname().ok().map(|u| u.machine().to_os_string());
    sys_platform == "linux" && machine.is_none_or(|m| m == platform_machine.as_str())
}

/// True when what runs with `libc` (`glibc 2.36`, the one of the machine it was taken from) surely runs with this host's
/// glibc too. A host that does not tell its version is not doubted.
fn fits_libc(libc: &str, host: Option<&str>) -> bool {
    let Some(host) = host.map(numbers) else { return true };
    libc.strip_prefix("glibc ").is_some_and(|version| numbers(version) <= host)
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map(|number| number.parse().unwrap_or(0)).collect()
}

/// The C library that uv chooses wheels for when `python` runs on this machine.
pub(super) fn host_libc(python: &Interpreter) -> String {
    match (python.libc.starts_with("glibc "), glibc_version()) {
        (true, Some(version)) => format!("glibc {version}"),
        _ => python.libc.clone(),
    }
}

/// Fails unless wheels for `platform`, in uv's words, can run with `python`.
pub(super) fn check_platform(platform: &str, python: &Interpreter) -> Result<()> {
    let machine = &python.markers.platform_machine;
    let (arch, system) = match platform.split_once('-') {
        Some((arch, system)) => (arch, system),
        None if platform == "linux" => ("x86_64", "manylinux"),
        None => ("", platform),
    };
    let musl = system == "unknown-linux-musl" || system.starts_with("musllinux");
    let linux = musl || system == "unknown-linux-gnu" || system.starts_with("manylinux");
    if linux && arch == machine && musl == python.libc.starts_with("musl") {
        return Ok(());
    }
    let own = if python.libc.starts_with("musl") { "unknown-linux-musl" } else { "manylinux_2_28" };
    Err(Error::new(
        Kind::Usage,
        format!("wheels for {platform} do not fit the interpreter, which is for {machine} Linux with {}", python.libc),
    )
    .hint(format!("name an older Linux of the same kind, for example --python-platform {machine}-{own}")))
}

/// The interpreter at `path`, from the store where it is known, else ingested.
fn at_path(context: &Context<'_>, path: &Path) -> Result<StoredInterpreter> {
    let real = path.canonicalize().map_err(|source| {
        Error::io("finding", path, source).hint("name a Python executable, or a version such as 3.12, with --python")
    })?;
    // A venv's python links to its base: the path asked for must be run to know, unless it was before.
    if let Some(known) = known(context, path)? {
        return Ok(known);
    }
    context.progress.event(&Event::Step(Step::FindingInterpreter));
    if real.is_dir() {
        return Err(Error::new(Kind::Usage, format!("{} is a directory", path.display()))
            .hint("name the executable, for example bin/python3 in it"));
    }
    let mut executable = path.to_path_buf();
    let mut brief = probe::brief(path)?;
    brief.check(path)?;
    if brief.prefix != brief.base_prefix {
        let name = format!("python{}", brief.version.splitn(3, '.').take(2).collect::<Vec<_>>().join("."));
        let places = [brief.base_executable.clone(), brief.base_prefix.join("bin").join(name)];
        executable = places
            .into_iter()
            .filter(|place| probe::brief(place).is_ok_and(|b| b.prefix == b.base_prefix))
            .find_map(|place| place.canonicalize().ok())
            .ok_or_else(|| {
                Error::new(
                    Kind::NotFound,
                    format!("the Python that the venv of {} was made from is gone", path.display()),
                )
                .hint("name another Python with --python")
            })?;
        brief = probe::brief(&executable)?;
        brief.check(&executable)?;
    }
    let executable = executable.canonicalize().at("finding", &executable)?;
    let name = format!("python-{}", crate::environment::Digest::of(executable.as_os_str().as_encoded_bytes()).short());
    let _lock = scratch::lock(&context.state, [name], || context.progress.event(&Event::Step(Step::Waiting)))?;
    let stored = match known(context, &executable)? {
        Some(stored) => stored,
        None => take_in(context, &executable, &brief)?,
    };
    for path in [path, &executable] {
        context.index.set_note(&path_note(path), &format!("{} {}", fingerprint(path)?, stored.name))?;
    }
    context.index.set_note(&origin_note(&stored), &executable.to_string_lossy())?;
    Ok(stored)
}

fn take_in(context: &Context<'_>, executable: &Path, brief: &Brief) -> Result<StoredInterpreter> {
    let scratch = Scratch::new(&context.scratch)?;
    let python = provisional(brief);
    let stage = Stage {
        uv: context.uv,
        executable,
        python: &python,
        scratch: scratch.path(),
        options: &[],
        variables: &[],
        base: Path::new("/"),
        progress: context.progress,
    };
    ingest::ingest(context.store, &stage)
}

/// The interpreter at `origin`, which was taken in before, taken in once more; what the store has of it is repaired.
pub(super) fn ingest_again(context: &Context<'_>, origin: &Path) -> Result<StoredInterpreter> {
    let brief = probe::brief(origin)?;
    brief.check(origin)?;
    take_in(context, origin, &brief)
}

/// The interpreter of the store that the unchanged file at `path` is known to be; starts nothing.
fn known(context: &Context<'_>, path: &Path) -> Result<Option<StoredInterpreter>> {
    let Some(note) = context.index.note(&path_note(path))? else { return Ok(None) };
    let Some((then, name)) = note.rsplit_once(' ') else { return Ok(None) };
    if fingerprint(path)? != then {
        return Ok(None);
    }
    Ok(context.store.interpreters()?.into_iter().find(|i| i.name == name))
}

fn path_note(path: &Path) -> String {
    format!("interpreter at {}", path.display())
}

fn origin_note(stored: &StoredInterpreter) -> String {
    format!("origin of {}", stored.name)
}

/// Changes when the file does. A venv's `pyvenv.cfg` counts too, as it decides what the link beside it means.
fn fingerprint(path: &Path) -> Result<String> {
    let meta = fs::metadata(path).at("reading", path)?;
    let config = path.parent().and_then(Path::parent).map(|root| root.join("pyvenv.cfg"));
    let config = config.and_then(|c| fs::metadata(c).ok()).map_or(0, |m| m.mtime_nsec() + m.mtime());
    Ok(format!("{}:{}:{}.{}:{config}", meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// An executable of `stored` that runs on this machine: where it was taken from, or a copy from the store.
pub(super) fn runnable(context: &Context<'_>, stored: &StoredInterpreter) -> Result<PathBuf> {
    if let Some(path) = context.index.note(&origin_note(stored))?.map(PathBuf::from)
        && path.is_file()
        && known(context, &path)?.is_some_and(|k| k.name == stored.name)
    {
        return Ok(path);
    }
    let name = safe_name(stored)?;
    let pythons = context.state.join("pythons");
    let root = pythons.join(name);
    let executable = root.join(&stored.python.executable);
    if executable.is_file() {
        return Ok(executable);
    }
    let waiting = || context.progress.event(&Event::Step(Step::Waiting));
    let _lock = scratch::lock(&context.state, [format!("copy-{}", stored.layer.short())], waiting)?;
    if !executable.is_file() {
        // The lock is ours, so what is there of this name is of a process that was killed.
        let left = format!("{name}.part-");
        for entry in fs::read_dir(&pythons).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&left) {
                fs::remove_dir_all(entry.path()).at("removing", entry.path())?;
            }
        }
        let part = pythons.join(format!("{left}{}", std::process::id()));
        tree::materialise(context.store, &stored.layer, &part)?;
        fs::rename(&part, &root).at("renaming", &part)?;
    }
    Ok(executable)
}

/// The name of `stored`, which is to be used in a path: the document comes from the store, and may be anybody's.
fn safe_name(stored: &StoredInterpreter) -> Result<&str> {
    let name = stored.name.as_str();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    let relative = Path::new(&stored.python.executable).components().all(|c| matches!(c, Component::Normal(_)));
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(plain) || !relative {
        return Err(Error::new(
            Kind::Corrupt,
            format!("the interpreter {name:?} of the store has an unacceptable name"),
        )
        .hint("run `envfabric fsck`"));
    }
    Ok(name)
}

/// Enough of an interpreter to begin an ingest with.
fn provisional(brief: &Brief) -> Interpreter {
    let none = String::new;
    Interpreter {
        implementation: brief.implementation.clone(),
        version: brief.version.clone(),
        abi: brief.soabi.clone().unwrap_or_default(),
        magic: none(),
        executable: none(),
        libc: none(),
        markers: Markers {
            implementation_name: none(),
            implementation_version: none(),
            os_name: none(),
            platform_machine: none(),
            platform_python_implementation: none(),
            platform_release: none(),
            platform_system: none(),
            platform_version: none(),
            python_full_version: none(),
            python_version: none(),
            sys_platform: none(),
        },
        host_libraries: Vec::new(),
        broken_modules: Default::default(),
    }
}

/// Every usable CPython that is found, and a sentence about where was looked.
fn on_this_machine() -> (Vec<(PathBuf, Brief)>, String) {
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = env::var_os("HOME").map(PathBuf::from).filter(absolute);
    let below_home = |dir: &str| home.as_ref().map(|home| home.join(dir));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = env::split_paths(&path).filter(absolute).collect();
    dirs.extend(["/usr/local/bin", "/usr/bin"].map(PathBuf::from));
    let uv_dir = env::var_os("UV_PYTHON_INSTALL_DIR").map(PathBuf::from).filter(absolute);
    let roots = [below_home(".pyenv/versions"), uv_dir.or_else(|| below_home(".local/share/uv/python"))];
    let mut looked = "PATH, /usr/local/bin, /usr/bin".to_string();
    for root in roots.iter().flatten() {
        looked.push_str(&format!(", {}", root.display()));
        dirs.extend(fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path().join("bin")));
    }
    let mut executables = BTreeSet::new();
    for dir in dirs {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|n| n.strip_prefix("python3")) else { continue };
            let version = rest.strip_prefix('.').map(|r| r.strip_suffix('t').unwrap_or(r));
            if !(rest.is_empty() || version.is_some_and(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()))) {
                continue;
            }
            // pyenv's shims are scripts that fail for versions that are not switched on.
            if let Ok(real) = entry.path().canonicalize()
                && is_elf(&real)
            {
                executables.insert(real);
            }
        }
    }
    let found: Vec<(PathBuf, Brief)> = executables
        .into_par_iter()
        .filter_map(|path| probe::brief(&path).ok().map(|brief| (path, brief)))
        .filter(|(path, brief)| brief.check(path).is_ok())
        .collect();
    (found, looked)
}

fn is_elf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interpreter_of_a_newer_or_other_c_library_is_doubted() {
        for (libc, host, fits) in [
            ("glibc 2.36", Some("2.36"), true),
            ("glibc 2.9", Some("2.36"), true),
            ("glibc 2.36", Some("2.9"), false),
            ("glibc 2.36.1", Some("2.36"), false),
            ("musl", Some("2.36"), false),
            ("musl", None, true),
        ] {
            assert_eq!(fits_libc(libc, host), fits, "{libc} on {host:?}");
        }
    }

    #[test]
    fn a_platform_must_fit_the_interpreter() {
        let python = crate::environment::cpython311();
        for platform in ["linux", "x86_64-manylinux_2_17", "x86_64-manylinux2014", "x86_64-unknown-linux-gnu"] {
            check_platform(platform, &python).unwrap();
        }
        for platform in
            ["windows", "macos", "aarch64-manylinux_2_28", "x86_64-unknown-linux-musl", "x86_64-linux-android", ""]
        {
            let error = check_platform(platform, &python).unwrap_err();
            assert_eq!((error.kind(), error.hint_text().is_some()), (Kind::Usage, true), "{platform}");
        }
    }

    #[test]
    fn a_name_from_the_store_stays_one_component() {
        let stored = |name: &str, executable: &str| StoredInterpreter {
            name: name.into(),
            layer: crate::environment::Digest::of(b""),
            scaffold: crate::environment::Digest::of(b""),
            python: Interpreter { executable: executable.into(), ..crate::environment::cpython311() },
            origin: String::new(),
            created: crate::store::now(),
        };
        safe_name(&stored("cpython-3.13.0t-x86_64-linux-gnu-0a1b", "bin/python3.13t")).unwrap();
        for (name, executable) in
            [("", "bin/x"), ("..", "bin/x"), ("a/b", "bin/x"), ("/a", "bin/x"), ("a", "/bin/sh"), ("a", "../x")]
        {
            assert_eq!(safe_name(&stored(name, executable)).unwrap_err().kind(), Kind::Corrupt, "{name} {executable}");
        }
    }

    #[test]
    fn requests_are_read() {
        for (text, version, free_threaded, accepted) in [
            ("3", "3.12.1", false, true),
            ("3.11", "3.11.7", false, true),
            ("3.1", "3.11.7", false, false),
            ("3.11.7", "3.11.8", false, false),
            ("cpython3.11", "3.11.7", false, true),
            ("cpython@3.11", "3.11.7", false, true),
            ("cpython-3.11.7-linux-x86_64-gnu", "3.11.7", false, true),
            ("Python3.11", "3.11.7", false, true),
            (">=3.9,<3.12", "3.11.7", false, true),
            (">=3.9, <3.12", "3.12.0", false, false),
            ("3.13", "3.13.0", true, false),
            ("3.13t", "3.13.0", true, true),
            ("3.14", "3.14.0rc1", false, false),
            ("3.14.0rc1", "3.14.0rc1", false, true),
        ] {
            assert_eq!(Wanted::parse(text).unwrap().accepts(version, free_threaded), accepted, "{text} {version}");
        }
        assert!(matches!(Wanted::parse("/usr/bin/python3").unwrap(), Wanted::Path(_)));
        assert!(matches!(Wanted::parse("./venv/bin/python").unwrap(), Wanted::Path(p) if p.is_absolute()));
        assert_eq!(Wanted::parse("pypy3.10").unwrap_err().kind(), Kind::Unsupported);
        for bad in ["", "banana", "3.x", ">=banana", "-3"] {
            assert!(Wanted::parse(bad).is_err() || bad == "-3", "{bad}");
        }
    }
}
