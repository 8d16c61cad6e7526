//! A store, a state directory and mounts of their own, driven through the program.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// One store with everything around it. `uv`'s cache is the user's, so that wheels are downloaded once.
pub struct World {
    dir: PathBuf,
    store: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl World {
    /// An empty one, gone when dropped.
    pub fn new() -> World {
        let temporary = tempfile::Builder::new().prefix("envfabric-it-").tempdir().unwrap();
        let store = temporary.path().join("store");
        let world = World { dir: temporary.path().to_path_buf(), store, _temporary: Some(temporary) };
        world.init();
        world
    }

    /// One whose store is somewhere else, made already or not.
    pub fn with_store(store: PathBuf) -> World {
        let temporary = tempfile::Builder::new().prefix("envfabric-it-").tempdir().unwrap();
        World { dir: temporary.path().to_path_buf(), store, _temporary: Some(temporary) }
    }

    /// The one that all tests of this process share; for tests that only add environments of their own name.
    pub fn shared() -> &'static World {
        static SHARED: OnceLock<World> = OnceLock::new();
        SHARED.get_or_init(|| {
            let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shared-world");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            let world = World { store: dir.join("store"), dir, _temporary: None };
            world.init();
            world
        })
    }

    /// With the options of `ENVFABRIC_TEST_INIT`.
    fn init(&self) {
        let options = std::env::var("ENVFABRIC_TEST_INIT").unwrap_or_default();
        self.ok(["init"].into_iter().chain(options.split_whitespace()));
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn store(&self) -> PathBuf {
        self.store.clone()
    }

    /// `envfabric ARGS`, with every path in this world.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envfabric"));
        command
            .args(args)
            .env("ENVFABRIC_STORE", self.store())
            .env("ENVFABRIC_MOUNT", self.dir.join("envs"))
            .env("XDG_STATE_HOME", self.dir.join("state"))
            .env("XDG_DATA_HOME", self.dir.join("data"))
            .env("XDG_CONFIG_HOME", self.dir.join("config"))
            .env("ENVFABRIC_SCRATCH", self.dir.join("scratch"))
            .env("ENVFABRIC_UV", uv())
            .env_remove("ENVFABRIC_CONFIG")
            .env_remove("VIRTUAL_ENV")
            .stdin(Stdio::null());
        command
    }

    pub fn output<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs it, expects success, returns standard output.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        check(&mut self.command(args))
    }

    /// Runs it, expects exit code `code`, returns standard error.
    pub fn fails<S: AsRef<OsStr>>(&self, code: i32, args: impl IntoIterator<Item = S>) -> String {
        let output = self.output(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "stdout: {}\nstderr: {stderr}", text(&output.stdout));
        stderr
    }

    /// Runs it with `--json`, expects success, returns what it printed.
    pub fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> serde_json::Value {
        let mut command = self.command(args);
        serde_json::from_str(&check(command.arg("--json"))).unwrap()
    }

    /// Builds `name` unless it is there; one at a time, as several tests may want it.
    pub fn ensure(&self, name: &str, args: &[&str]) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
        if self.output(["show", name]).status.success() {
            return;
        }
        let mut all = vec!["create", name];
        all.extend(args);
        self.ok(all);
    }

    /// Mounts the store at a new place until the guard is dropped.
    pub fn mount(&self) -> Mount<'_> {
        let at = tempfile::Builder::new().prefix("mnt").tempdir_in(&self.dir).unwrap().keep();
        self.mount_at(&at)
    }

    /// With the options of `ENVFABRIC_TEST_MOUNT`, and a cache where `ENVFABRIC_TEST_CACHE` is set, so that the main job can
    /// be tested with each fast path switched off, and through the node cache.
    pub fn mount_at(&self, at: &Path) -> Mount<'_> {
        self.mount_with(at, &[])
    }

    /// With further options.
    pub fn mount_with(&self, at: &Path, more: &[&str]) -> Mount<'_> {
        let options = std::env::var("ENVFABRIC_TEST_MOUNT").unwrap_or_default();
        let options = options.split_whitespace().chain(more.iter().copied()).map(OsStr::new);
        // Several tests mount one store at a time, and a cache is for one mount.
        let cache = format!("--cache={}", at.with_extension("cache").display());
        let cached =
            std::env::var_os("ENVFABRIC_TEST_CACHE").filter(|_| !more.iter().any(|o| o.starts_with("--cache=")));
        let cache = cached.is_some().then_some(OsStr::new(&cache));
        self.ok([OsStr::new("mount"), at.as_os_str()].into_iter().chain(options).chain(cache));
        Mount { world: self, at: at.to_path_buf() }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.dir.join("envs").exists() {
            let _ = self.command(["umount", "--lazy"]).output();
        }
    }
}

/// A mounted file system, unmounted when dropped.
pub struct Mount<'w> {
    world: &'w World,
    pub at: PathBuf,
}

impl Mount<'_> {
    /// `<mount>/<name>/.venv`
    pub fn venv(&self, name: &str) -> PathBuf {
        self.at.join(name).join(".venv")
    }

    pub fn python(&self, name: &str) -> PathBuf {
        self.venv(name).join("bin/python")
    }

    /// Runs `code` in environment `name`, expects success, returns standard output.
    pub fn run(&self, name: &str, code: &str) -> String {
        check(&mut clean(Command::new(self.python(name)).args(["-c", code])))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self.world.output([OsStr::new("umount"), OsStr::new("--lazy"), self.at.as_os_str()]);
    }
}

/// Takes out of `command`'s environment what would change a Python's behaviour.
pub fn clean(command: &mut Command) -> Command {
    let mut fresh = Command::new(command.get_program());
    fresh.args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => fresh.env(key, value),
            None => fresh.env_remove(key),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        fresh.current_dir(dir);
    }
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("PYTHON") {
            fresh.env_remove(key);
        }
    }
    fresh.stdin(Stdio::null());
    fresh
}

/// Runs `command`, expects success, returns standard output.
pub fn check(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\nstdout: {}\nstderr: {}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a shell script with `set -eu`, expects success, returns standard output.
pub fn sh(script: &str) -> String {
    check(&mut clean(Command::new("bash").args(["-euc", script])))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The uv program, as `scripts/test` found it.
pub fn uv() -> PathBuf {
    let set = std::env::var_os("ENVFABRIC_UV").map(PathBuf::from);
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join("uv")).find(|p| p.is_file())
    };
    let installed = || {
        let home = PathBuf::from(std::env::var_os("HOME")?);
        Some(home.join(".local/share/envfabric/tools/bin/uv")).filter(|uv| uv.is_file())
    };
    set.or_else(on_path).or_else(installed).expect("uv is missing: run scripts/test, or set ENVFABRIC_UV")
}

/// A CPython of this minor version to build on: pyenv's (with a shared libpython), else what is on PATH.
/// None when this machine has none; Debian 12 has 3.11.
pub fn python(minor: &str) -> Option<PathBuf> {
    let root = std::env::var_os("PYENV_ROOT").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".pyenv"));
    for versions in [root, home].into_iter().flatten().map(|r| r.join("versions")) {
        let Ok(entries) = fs::read_dir(versions) else { continue };
        let mut found: Vec<PathBuf> = entries
            .filter_map(|e| Some(e.ok()?.path()))
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("{minor}."))))
            .map(|p| p.join(format!("bin/python{minor}")))
            .filter(|p| p.is_file())
            .collect();
        found.sort();
        if let Some(python) = found.pop() {
            return Some(python);
        }
    }
    ["/usr/local/bin", "/usr/bin"].iter().map(|d| Path::new(d).join(format!("python{minor}"))).find(|p| p.is_file())
}

/// The Python that most tests use.
pub fn python311() -> String {
    python("3.11").expect("python3.11 is missing: run scripts/test").display().to_string()
}

/// Asks until `done` says so; for what happens soon but not at once.
pub fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
