//! From lock entries to files: uv installs into a staging venv, and every file there is given to its distribution.
//!
//! ```text
//! working pylock.toml --uv pip sync--> staging venv --RECORD--> files per distribution --compile--> layers
//! ```
//! Files of the staging venv may be hard links into uv's cache: they are read, never written.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::limits::{DISTRIBUTION_MAX, FILE_MAX, FILES_MAX, METADATA_MAX, RECORD_MAX};
use super::metadata::Metadata;
use super::progress::Progress;
use super::record;
use super::uv::{Call, Uv};
use super::wheel;
use crate::environment::lock::{Artifact, Lock, Origin, Package};
use crate::environment::{Digest, Interpreter};
use crate::error::{Error, IoContext, Kind, Result};

/// What staging needs.
pub(super) struct Stage<'a> {
    pub(super) uv: &'a Uv,
    /// A Python that runs on this machine, absolute.
    pub(super) executable: &'a Path,
    pub(super) python: &'a Interpreter,
    pub(super) scratch: &'a Path,
    /// Arguments for `uv pip sync` that come from the request.
    pub(super) options: &'a [String],
    /// Variables for it, likewise.
    pub(super) variables: &'a [(&'static str, String)],
    /// Directory that relative paths of the lock start from.
    pub(super) base: &'a Path,
    pub(super) progress: &'a dyn Progress,
}

/// One installed distribution.
#[derive(Debug)]
pub(super) struct Distribution {
    pub(super) metadata: Metadata,
    /// Path of its `.dist-info` below the venv.
    pub(super) dist_info: String,
    /// The venv that its files lie in.
    pub(super) root: PathBuf,
    /// Path below the venv -> what it is. Files that are left out of layers are not in here.
    pub(super) files: BTreeMap<Vec<u8>, Found>,
}

/// A file system object of a staging venv.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    File { size: u64, executable: bool },
    Symlink { target: Vec<u8> },
}

impl Stage<'_> {
    /// Installs `packages` and returns their distributions, in the same order.
    pub(super) fn install(&self, packages: &[&Package]) -> Result<Vec<Distribution>> {
        for package in packages {
            self.inspect_local_wheels(package)?;
        }
        let mut clashing = BTreeSet::new();
        let mut found = self.install_together("together", packages, &mut clashing)?;
        // Two distributions with one path race in uv: only one of them alone shows what it would install.
        let names: Vec<String> = packages.iter().map(|p| p.name.clone()).filter(|n| clashing.contains(n)).collect();
        for (number, name) in names.iter().enumerate() {
            let alone: Vec<&Package> = packages.iter().filter(|p| p.name == *name).copied().collect();
            let mut again = self.install_together(&format!("alone{number}"), &alone, &mut BTreeSet::new())?;
            if let Some(distribution) = again.remove(name) {
                found.insert(name.clone(), distribution);
            }
        }
        packages
            .iter()
            .map(|package| {
                let distribution = found.remove(&package.name).ok_or_else(|| {
                    Error::new(Kind::Failed, format!("uv did not install {}", package.label()))
                        .hint("this is unexpected; run again with ENVFABRIC_LOG=debug and look at what uv was given")
                })?;
                check_version(package, &distribution.metadata)?;
                Ok(distribution)
            })
            .collect()
    }

    fn inspect_local_wheels(&self, package: &Package) -> Result<()> {
        let artifacts: Vec<&Artifact> = match &package.origin {
            Origin::Index { wheels, .. } => wheels.iter().collect(),
            Origin::Archive { artifact, .. } => vec![artifact],
            _ => Vec::new(),
        };
        for path in artifacts.into_iter().filter_map(|a| a.local_path(self.base)) {
            if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("whl")) && path.is_file() {
                wheel::inspect(&path).map_err(|e| e.context(format!("{} cannot be installed", package.label())))?;
            }
        }
        Ok(())
    }

    fn install_together(
        &self,
        label: &str,
        packages: &[&Package],
        clashing: &mut BTreeSet<String>,
    ) -> Result<HashMap<String, Distribution>> {
        let root = self.scratch.join(label);
        make_venv(self.uv, self.executable, &root, self.progress)?;
        let before = snapshot(&root)?;
        let lock = self.scratch.join(format!("pylock.{label}.toml"));
        fs::write(&lock, Lock::working_copy(packages, self.base)?).at("writing", &lock)?;
        let mut args: Vec<OsString> =
            ["pip", "sync", "--preview-features", "pylock", "--link-mode", "hardlink", "--no-compile-bytecode"]
                .map(Into::into)
                .to_vec();
        // The layer is found by these hashes for ever: no setting of whatever directory this runs in may switch the
        // check off, or choose another file, target or platform. The lock has exact addresses; what sources are built
        // with comes from the request's indexes or uv's variables.
        args.push("--verify-hashes".into());
        args.extend(self.options.iter().map(Into::into));
        // uv takes a directory for unchanged while its pyproject.toml is, and would install what it built before.
        for package in packages.iter().filter(|p| matches!(p.origin, Origin::Directory { .. })) {
            args.extend(["--refresh-package".into(), package.name.clone().into()]);
        }
        args.extend(["--python".into(), root.clone().into(), lock.into()]);
        self.uv.call(Call { args, variables: self.variables, sealed: true, ..Call::default() }, self.progress)?;
        let after = walk(&root)?;
        self.attribute(&root, packages, &before, after, clashing)
    }

    /// Gives every file to the distribution whose RECORD or `.dist-info` has it.
    ///
    /// uv lists in a RECORD whatever it unpacked of a wheel, listed there or not, so a wheel that brings the metadata of
    /// another distribution, to pass its files off as that one's, shows itself here: it is refused.
    fn attribute(
        &self,
        root: &Path,
        packages: &[&Package],
        before: &Snapshot,
        after: BTreeMap<Vec<u8>, Found>,
        clashing: &mut BTreeSet<String>,
    ) -> Result<HashMap<String, Distribution>> {
        let site_packages = self.python.site_packages();
        let mut distributions: HashMap<String, Distribution> = HashMap::new();
        let mut owners: HashMap<Vec<u8>, Vec<String>> = HashMap::new();
        for dist_info in dist_infos(&site_packages, &after) {
            let path = root.join(&dist_info);
            let metadata = Metadata::parse(&read_capped(&path.join("METADATA"), METADATA_MAX)?)
                .map_err(|e| e.context(format!("metadata of {dist_info} cannot be read")))?;
            if !packages.iter().any(|package| package.name == metadata.name) {
                let asked: Vec<String> = packages.iter().map(|package| package.label()).collect();
                let why = "it was installed by another package, which brings its metadata";
                return Err(refused(&metadata.name, why).detail(format!("installed were: {}", asked.join(", "))));
            }
            for line in record::parse(&String::from_utf8_lossy(&read_capped(&path.join("RECORD"), RECORD_MAX)?)) {
                // uv writes `..` only to climb out of site-packages first; anywhere else it put the file elsewhere.
                if line.path.split('/').skip_while(|part| *part == "..").any(|part| part == "..") {
                    return Err(refused(&metadata.name, &format!("its RECORD names {:?}", line.path)));
                }
                let place = record::resolve(&site_packages, &line.path)
                    .ok_or_else(|| refused(&metadata.name, &format!("its RECORD names {:?}, outside", line.path)))?;
                let names = owners.entry(place).or_default();
                if !names.contains(&metadata.name) {
                    names.push(metadata.name.clone());
                }
            }
            let name = metadata.name.clone();
            let files = BTreeMap::new();
            let new = Distribution { metadata, dist_info, root: root.to_path_buf(), files };
            if let Some(other) = distributions.insert(name.clone(), new) {
                return Err(refused(&name, &format!("it is installed twice (also as {})", other.dist_info)));
            }
        }
        check_base(root, before, &after, &owners)?;
        let by_dist_info: HashMap<Vec<u8>, String> =
            distributions.iter().map(|(name, d)| (d.dist_info.clone().into_bytes(), name.clone())).collect();
        let dist_info_of = |path: &[u8]| {
            path.iter().enumerate().filter(|(_, b)| **b == b'/').find_map(|(at, _)| by_dist_info.get(&path[..at]))
        };
        for (path, names) in &owners {
            if let Some(owner) = dist_info_of(path)
                && let Some(other) = names.iter().find(|name| *name != owner)
            {
                let shown = String::from_utf8_lossy(path);
                return Err(refused(other, &format!("it brings {shown:?}, metadata of package {owner:?}")));
            }
        }
        for (path, found) in after {
            if before.contains_key(&path) {
                continue;
            }
            let own_dist_info = dist_info_of(&path);
            let mut names = owners.get(&path).cloned().unwrap_or_default();
            if let Some(name) = own_dist_info
                && !names.contains(name)
            {
                names.push(name.clone());
            }
            let shown = String::from_utf8_lossy(&path).into_owned();
            let Some(first) = names.first() else {
                return Err(Error::new(Kind::Invalid, format!("{shown:?} was installed and no RECORD has it"))
                    .hint("one of the wheels is malformed; install them one by one to find out which"));
            };
            if let Found::Symlink { target } = &found
                && leaves(&path, target)
            {
                return Err(refused(first, &format!("{shown:?} is a symbolic link that leaves the environment")));
            }
            if names.len() > 1 {
                clashing.extend(names.iter().cloned());
            }
            for name in &names {
                if let Some(distribution) = distributions.get_mut(name)
                    && !left_out(&path, &distribution.dist_info)
                {
                    distribution.files.insert(path.clone(), found.clone());
                }
            }
        }
        for distribution in distributions.values() {
            check_size(distribution)?;
        }
        Ok(distributions)
    }
}

/// Makes a relocatable venv at `root`.
pub(super) fn make_venv(uv: &Uv, executable: &Path, root: &Path, progress: &dyn Progress) -> Result<()> {
    let mut args: Vec<OsString> =
        ["venv", "--relocatable", "--no-project", "--quiet", "--python"].map(Into::into).into();
    args.extend([executable.into(), root.into()]);
    uv.call(Call { args, sealed: true, ..Call::default() }, progress).map(|_| ())
}

/// The content of a file of a `.dist-info`, of which at most `max` bytes are accepted.
fn read_capped(path: &Path, max: u64) -> Result<Vec<u8>> {
    let refused = |why: String| {
        Error::new(Kind::Invalid, format!("a package is refused: {} {why}", path.display()))
            .hint("the wheel is malformed or hostile; report it to its author")
    };
    let mut bytes = Vec::new();
    match fs::File::open(path).and_then(|file| file.take(max + 1).read_to_end(&mut bytes)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(refused("is missing".into())),
        other => other.at("reading", path)?,
    };
    if bytes.len() as u64 > max {
        return Err(refused(format!("has more than {max} bytes")));
    }
    Ok(bytes)
}

fn refused(name: &str, why: &str) -> Error {
    Error::new(Kind::Invalid, format!("package {name:?} is refused: {why}"))
        .hint("the wheel is malformed or hostile; report it to its author")
}

fn check_version(package: &Package, metadata: &Metadata) -> Result<()> {
    use std::str::FromStr;
    let Some(wanted) = &package.version else { return Ok(()) };
    let same = match (uv_pep440::Version::from_str(wanted), uv_pep440::Version::from_str(&metadata.version)) {
        (Ok(a), Ok(b)) => a == b,
        _ => *wanted == metadata.version,
    };
    if same {
        return Ok(());
    }
    let why = format!("the lock says version {wanted}, and its metadata say {:?}", metadata.version);
    Err(refused(&package.name, &why))
}

fn check_size(distribution: &Distribution) -> Result<()> {
    let name = &distribution.metadata.name;
    let mut total = 0u64;
    for (path, found) in &distribution.files {
        if let Found::File { size, .. } = found {
            if *size > FILE_MAX {
                let shown = String::from_utf8_lossy(path);
                return Err(refused(name, &format!("{shown:?} has {size} bytes, and {FILE_MAX} are allowed")));
            }
            total = total.saturating_add(*size);
        }
    }
    if distribution.files.len() > FILES_MAX || total > DISTRIBUTION_MAX {
        return Err(refused(name, &format!("it installs {} files of {total} bytes", distribution.files.len())));
    }
    Ok(())
}

/// True for what belongs to an installation rather than to a wheel: it would differ between builders.
pub(super) fn left_out(path: &[u8], dist_info: &str) -> bool {
    let in_dist_info = path.strip_prefix(dist_info.as_bytes()).and_then(|rest| rest.strip_prefix(b"/"));
    matches!(in_dist_info, Some(b"REQUESTED" | b"uv_cache.json"))
        || path.split(|b| *b == b'/').any(|part| part == b"__pycache__")
}

/// Everything but directories below `root`, by path; uv's own lock file is passed over.
fn walk(root: &Path) -> Result<BTreeMap<Vec<u8>, Found>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![Vec::new()];
    while let Some(dir) = todo.pop() {
        let path = root.join(std::ffi::OsStr::from_bytes(&dir));
        for entry in fs::read_dir(&path).at("reading", &path)? {
            let entry = entry.at("reading", &path)?;
            let mut below = dir.clone();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(entry.file_name().as_bytes());
            let meta = entry.metadata().at("reading", entry.path())?;
            if meta.is_dir() {
                todo.push(below);
            } else if meta.is_symlink() {
                let target = fs::read_link(entry.path()).at("reading", entry.path())?.into_os_string().into_vec();
                found.insert(below, Found::Symlink { target });
            } else if meta.is_file() {
                if below == b".lock" && meta.len() == 0 {
                    continue;
                }
                let executable = meta.permissions().mode() & 0o111 != 0;
                found.insert(below, Found::File { size: meta.len(), executable });
            } else {
                let message = format!("{} is neither a file, a directory nor a symbolic link", entry.path().display());
                return Err(Error::new(Kind::Invalid, message));
            }
        }
    }
    Ok(found)
}

/// What a tree held: path -> what it was, and the digest of a file.
type Snapshot = BTreeMap<Vec<u8>, (Found, Option<Digest>)>;

/// [`walk`] with the digests of all files.
fn snapshot(root: &Path) -> Result<Snapshot> {
    walk(root)?
        .into_iter()
        .map(|(path, found)| Ok((path.clone(), (found.clone(), digest(root, &path, &found)?))))
        .collect()
}

fn digest(root: &Path, path: &[u8], found: &Found) -> Result<Option<Digest>> {
    let Found::File { .. } = found else { return Ok(None) };
    let path = root.join(std::ffi::OsStr::from_bytes(path));
    Ok(Some(Digest::of(&fs::read(&path).at("reading", &path)?)))
}

/// Fails when anything that was there before the installation is not as it was.
fn check_base(
    root: &Path,
    before: &Snapshot,
    after: &BTreeMap<Vec<u8>, Found>,
    owners: &HashMap<Vec<u8>, Vec<String>>,
) -> Result<()> {
    for (path, (found, content)) in before {
        let now = after.get(path);
        if now == Some(found) && digest(root, path, found)? == *content {
            continue;
        }
        let shown = String::from_utf8_lossy(path);
        let why = format!("it would replace {shown:?} of the environment itself");
        return Err(match owners.get(path).and_then(|names| names.first()) {
            Some(name) => refused(name, &why),
            None => Error::new(Kind::Invalid, format!("a package is refused: {why}"))
                .hint("install the packages one by one to find out which"),
        });
    }
    Ok(())
}

/// The `.dist-info` directories directly in site-packages, sorted.
fn dist_infos(site_packages: &str, files: &BTreeMap<Vec<u8>, Found>) -> Vec<String> {
    let prefix = format!("{site_packages}/").into_bytes();
    let names: BTreeSet<String> = files
        .keys()
        .filter_map(|path| path.strip_prefix(prefix.as_slice()))
        .filter_map(|rest| rest.split(|b| *b == b'/').next())
        .filter(|name| name.ends_with(b".dist-info"))
        .map(|name| format!("{site_packages}/{}", String::from_utf8_lossy(name)))
        .collect();
    names.into_iter().collect()
}

/// True when a symlink at `path` with `target` points out of the tree by name.
fn leaves(path: &[u8], target: &[u8]) -> bool {
    let mut depth = path.iter().filter(|b| **b == b'/').count();
    target.starts_with(b"/")
        || target.split(|b| *b == b'/').any(|part| match part {
            b"" | b"." => false,
            b".." => match depth.checked_sub(1) {
                Some(up) => {
                    depth = up;
                    false
                }
                None => true,
            },
            _ => {
                depth += 1;
                false
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symlink_that_leaves_is_told_by_its_name() {
        for (path, target, out) in [
            ("bin/x", "y", false),
            ("bin/x", "../lib/y", false),
            ("bin/x", "../../y", true),
            ("bin/x", "/etc", true),
            ("a/b/c", "../../..", true),
            ("a/b/c", "../x/../../y", false),
        ] {
            assert_eq!(leaves(path.as_bytes(), target.as_bytes()), out, "{path} -> {target}");
        }
    }

    #[test]
    fn what_differs_between_builders_stays_out() {
        let info = "lib/python3.11/site-packages/x-1.dist-info";
        for (path, out) in [("REQUESTED", true), ("uv_cache.json", true), ("RECORD", false), ("direct_url.json", false)]
        {
            assert_eq!(left_out(format!("{info}/{path}").as_bytes(), info), out, "{path}");
        }
        assert!(left_out(b"lib/python3.11/site-packages/x/__pycache__/y.cpython-311.pyc", info));
        assert!(!left_out(b"lib/python3.11/site-packages/x/REQUESTED", info));
    }
}
