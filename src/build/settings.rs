//! Settings of uv's configuration files that would make it resolve for something else than was asked for.
//!
//! Indexes, proxies, resolution strategies and the like apply to `uv pip compile` as the user set them. What changes the
//! target of the resolution, or leaves packages out of its result, is refused, with the place of the setting: such a
//! lock would not be what the command line says, and another directory would give another one.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::error::{Error, Kind, Result};

/// Keys of `[pip]` that are refused, with what to use instead.
const REFUSED: [(&str, &str); 7] = [
    ("group", "name groups with --group, of a project or lock"),
    ("no-deps", "write a lock with it and build from that with --lock"),
    ("no-emit-package", "write a lock with it and build from that with --lock"),
    ("output-file", "remove it: the lock is kept in the store"),
    ("python-platform", "use --python-platform"),
    ("python-version", "use --python"),
    ("universal", "remove it: a universal lock can be used with --lock"),
];

/// Fails when a configuration file that uv would read in `dir` has one of [`REFUSED`]. `platform_given` says that the
/// command line names a platform, which counts more than a file.
pub(super) fn check(dir: &Path, platform_given: bool) -> Result<()> {
    if env::var_os("UV_NO_CONFIG").is_some_and(|value| !matches!(value.to_str(), Some("" | "0" | "false"))) {
        return Ok(());
    }
    files(dir).iter().try_for_each(|file| check_file(file, platform_given))
}

fn check_file(file: &Path, platform_given: bool) -> Result<()> {
    // What cannot be read is uv's to complain about.
    let Some(table) = fs::read_to_string(file).ok().and_then(|text| toml::from_str::<Table>(&text).ok()) else {
        return Ok(());
    };
    let table = Value::Table(table);
    let (pip, name) = match file.file_name().is_some_and(|name| name == "pyproject.toml") {
        true => (table.get("tool").and_then(|t| t.get("uv")).and_then(|t| t.get("pip")), "tool.uv.pip"),
        false => (table.get("pip"), "pip"),
    };
    let Some(Value::Table(pip)) = pip else { return Ok(()) };
    for (key, instead) in REFUSED {
        let on = pip.get(key).is_some_and(|value| *value != Value::Boolean(false));
        if on && !(platform_given && key == "python-platform") {
            let message = format!("[{name}] {key} in {} would change what is resolved", file.display());
            return Err(Error::new(Kind::Usage, message).hint(instead));
        }
    }
    Ok(())
}

/// Every file that uv may read settings from in `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    if let Some(file) = env::var_os("UV_CONFIG_FILE").filter(|file| !file.is_empty()) {
        return vec![dir.join(file)];
    }
    let mut files: Vec<PathBuf> =
        dir.ancestors().flat_map(|dir| ["uv.toml", "pyproject.toml"].map(|name| dir.join(name))).collect();
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let own = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).and_then(absolute);
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")).and_then(absolute);
    let shared = env::var_os("XDG_CONFIG_DIRS").unwrap_or_else(|| "/etc/xdg".into());
    let shared: Vec<PathBuf> = env::split_paths(&shared).filter_map(absolute).collect();
    files.extend(own.or(home).into_iter().chain(shared).chain(["/etc".into()]).map(|dir| dir.join("uv/uv.toml")));
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_change_the_target_are_refused_and_indexes_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        for (file, text, refused) in [
            ("uv.toml", "index-url = 'https://h/simple'\n[pip]\nextra-index-url = ['https://h/x']", None),
            ("uv.toml", "[pip]\ntarget = '/x'\nverify-hashes = false\nuniversal = false", None),
            ("uv.toml", "[pip]\npython-platform = 'windows'", Some("use --python-platform")),
            ("pyproject.toml", "[tool.uv.pip]\npython-version = '3.9'", Some("use --python")),
            ("pyproject.toml", "[pip]\npython-version = '3.9'", None),
            ("uv.toml", "[pip]\nno-emit-package = ['x']", Some("--lock")),
            ("uv.toml", "no TOML", None),
        ] {
            let path = dir.path().join(file);
            fs::write(&path, text).unwrap();
            match (check(&below, false), refused) {
                (Ok(()), None) => {}
                (Err(error), Some(hint)) => {
                    assert!(error.chain().contains(file), "{error:?}");
                    assert!(error.hint_text().unwrap().contains(hint), "{error:?}");
                    assert_eq!(check(&below, true).is_ok(), text.contains("python-platform"), "{text}");
                }
                (result, _) => panic!("{file} {text}: {result:?}"),
            }
            fs::remove_file(&path).unwrap();
        }
    }
}
