//! What requirements files say beyond requirements: hashes, and where packages are looked for.
//!
//! uv parses and resolves the files. But `uv pip compile` puts the hashes of the index into the lock without comparing
//! them with those that the user wrote, and leaves the credentials of an index out of it. So both are read here: the
//! lock is cut down to the files whose hashes were named, and the installation is told the same indexes.
//! The line format is pip's: <https://pip.pypa.io/en/stable/reference/requirements-file-format/>.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::{Table, Value};
use uv_normalize::PackageName;

use crate::error::{Error, IoContext, Kind, Result};

/// How deep requirements files may include one another.
const DEPTH_MAX: usize = 20;

/// What was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// By normalised name: `sha256:<hex>` and the like.
    hashes: BTreeMap<String, BTreeSet<String>>,
    /// `--require-hashes`.
    all: bool,
    /// `--index-url`, the last one wins.
    pub(super) index_url: Option<String>,
    /// `--extra-index-url`.
    pub(super) extra_index_urls: Vec<String>,
}

/// Reads requirement strings and files, and the files that these include.
pub(super) fn read(requirements: &[String], files: &[PathBuf]) -> Result<Said> {
    let mut said = Said::default();
    for requirement in requirements {
        said.line(requirement, Path::new("."), 0)?;
    }
    for file in files {
        said.file(file, 0)?;
    }
    Ok(said)
}

impl Said {
    fn file(&mut self, path: &Path, depth: usize) -> Result<()> {
        if depth > DEPTH_MAX {
            return Err(Error::new(Kind::Invalid, format!("{} is included by itself", path.display())));
        }
        // A URL is uv's to read; its hashes cannot be seen here.
        if path.to_str().is_some_and(|p| p.contains("://")) {
            return Ok(());
        }
        let text = fs::read_to_string(path).at("reading", path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        for line in text.replace("\\\r\n", " ").replace("\\\n", " ").lines() {
            self.line(line, base, depth)?;
        }
        Ok(())
    }

    /// One logical line of a file in directory `base`.
    fn line(&mut self, line: &str, base: &Path, depth: usize) -> Result<()> {
        let line = expand(without_comment(line));
        let mut words = line.split_whitespace().flat_map(|word| match word.split_once('=') {
            // `--hash=x` and `--hash x` are one; so are `-rfile` and `-r file`, which pip writes apart.
            Some((flag, value)) if flag.starts_with("--") => vec![flag, value],
            _ => vec![word],
        });
        let mut name = None;
        let mut first = true;
        while let Some(word) = words.next() {
            match word {
                "--hash" => {
                    let Some(hash) = words.next() else { break };
                    self.hash(name.as_deref(), hash)?;
                }
                "--require-hashes" => self.all = true,
                "-i" | "--index-url" | "--pypi-url" => self.index_url = words.next().map(str::to_string),
                "--extra-index-url" => self.extra_index_urls.extend(words.next().map(str::to_string)),
                "-r" | "--requirement" => {
                    if let Some(file) = words.next() {
                        self.file(&base.join(file), depth + 1)?;
                    }
                }
                _ if word.starts_with('-') => {}
                _ => {
                    if first {
                        name = package(word);
                    }
                    if let Some((_, fragment)) = word.split_once('#') {
                        for hash in fragment.split('&').filter_map(|part| part.split_once('=')) {
                            if ALGORITHMS.contains(&hash.0) {
                                self.hash(name.as_deref(), &format!("{}:{}", hash.0, hash.1))?;
                            }
                        }
                    }
                }
            }
            first = false;
        }
        Ok(())
    }

    fn hash(&mut self, name: Option<&str>, hash: &str) -> Result<()> {
        let name = name.ok_or_else(|| Error::new(Kind::Invalid, format!("the hash {hash:?} belongs to no package")))?;
        let well_formed = hash.split_once(':').is_some_and(|(algorithm, digits)| {
            ALGORITHMS.contains(&algorithm) && digits.len() >= 32 && digits.bytes().all(|b| b.is_ascii_hexdigit())
        });
        if !well_formed {
            return Err(Error::new(Kind::Invalid, format!("{name} has a malformed hash, {hash:?}"))
                .hint("write --hash=sha256:<64 hex digits>"));
        }
        self.hashes.entry(name.to_string()).or_default().insert(hash.to_ascii_lowercase());
        Ok(())
    }

    /// Takes every file out of the lock `text` whose hash is not among those that were written for its package.
    ///
    /// # Errors
    /// [`Kind::Invalid`] when nothing of a package is left, or a hash is required and missing.
    pub(super) fn restrict(&self, text: String) -> Result<String> {
        if self.hashes.is_empty() && !self.all {
            return Ok(text);
        }
        let unreadable =
            |e: toml::de::Error| Error::new(Kind::Failed, "uv wrote a lock that is no TOML").with_source(e);
        let mut lock: Table = toml::from_str(&text).map_err(unreadable)?;
        for entry in lock.get_mut("packages").and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(entry) = entry.as_table_mut() else { continue };
            let name = entry.get("name").and_then(Value::as_str).unwrap_or_default().to_string();
            match self.hashes.get(&name) {
                Some(wanted) => keep(entry, &name, wanted)?,
                None if self.all => {
                    return Err(Error::new(Kind::Invalid, format!("--require-hashes: no hash is written for {name}"))
                        .hint("list every package with its hashes, as `uv pip compile --generate-hashes` does"));
                }
                None => {}
            }
        }
        toml::to_string(&lock).map_err(|e| Error::new(Kind::Failed, "the lock cannot be written").with_source(e))
    }
}

const ALGORITHMS: [&str; 5] = ["md5", "sha1", "sha256", "sha384", "sha512"];

fn keep(entry: &mut Table, name: &str, wanted: &BTreeSet<String>) -> Result<()> {
    let is_wanted = |file: &Value| {
        let hashes = file.get("hashes").and_then(Value::as_table);
        let mut hashes = hashes.into_iter().flatten().filter_map(|(algorithm, hex)| Some((algorithm, hex.as_str()?)));
        hashes.any(|(algorithm, hex)| wanted.contains(&format!("{algorithm}:{}", hex.to_ascii_lowercase())))
    };
    if let Some(wheels) = entry.get_mut("wheels").and_then(Value::as_array_mut) {
        wheels.retain(is_wanted);
        if wheels.is_empty() {
            entry.remove("wheels");
        }
    }
    for single in ["sdist", "archive"] {
        if entry.get(single).is_some_and(|file| !is_wanted(file)) {
            entry.remove(single);
        }
    }
    if ["wheels", "sdist", "archive"].iter().any(|kind| entry.contains_key(*kind)) {
        return Ok(());
    }
    let version = entry.get("version").and_then(Value::as_str).map(|v| format!("=={v}")).unwrap_or_default();
    Err(Error::new(
        Kind::Invalid,
        format!("hash mismatch: no file of {name}{version} has a hash that was written for it"),
    )
    .detail(wanted.iter().map(|hash| format!("written: {hash}")).collect::<Vec<_>>().join("\n"))
    .hint("the index has other files than the requirements name: find out why before you change the hashes"))
}

fn without_comment(line: &str) -> &str {
    let line = line.trim_start();
    if line.starts_with('#') {
        return "";
    }
    line.find(" #").or_else(|| line.find("\t#")).map_or(line, |at| &line[..at])
}

/// `${NAME}` of the environment, as pip has it; a variable that is not set stays as it is written.
fn expand(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("${") {
        out.push_str(&rest[..at]);
        let Some(end) = rest[at..].find('}') else { break };
        let name = &rest[at + 2..at + end];
        let known = name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
        match std::env::var(name).ok().filter(|_| known) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[at..=at + end]),
        }
        rest = &rest[at + end + 1..];
    }
    out.push_str(rest);
    out
}

/// The normalised name of what a requirement asks for, where it can be seen: `six==1.0`, `six[x] @ url`, `./six-1.0.whl`.
fn package(word: &str) -> Option<String> {
    let end = word.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))).unwrap_or(word.len());
    let is_place = word.contains('/') || [".whl", ".tar.gz", ".zip"].iter().any(|suffix| word.contains(suffix));
    let plain = &word[..end];
    let name = if is_place && !word[end..].starts_with(['@', '[', '=', '<', '>', '~', '!', ';']) {
        let file = word.split(['#', '?']).next()?.rsplit('/').next()?;
        match file.strip_suffix(".whl") {
            Some(stem) => stem.split('-').next()?,
            None => file.trim_end_matches(".zip").trim_end_matches(".tar.gz").rsplit_once('-')?.0,
        }
    } else {
        plain
    };
    PackageName::from_str(name).ok().map(|name| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn lines(text: &str) -> Result<Said> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/more.txt"), format!("inner==1 --hash {A}\n")).unwrap();
        fs::write(dir.path().join("a.txt"), text).unwrap();
        read(&[], &[dir.path().join("a.txt")])
    }

    #[test]
    fn hashes_are_found_wherever_pip_takes_them() {
        for (text, name) in [
            (format!("Six==1.16.0 --hash={A}"), "six"),
            (format!("six[x]>=1; python_version > '3' \\\n    --hash {A} # why"), "six"),
            (format!("Zope.Interface @ https://h/x.whl#{}", A.replace(':', "=")), "zope-interface"),
            (format!("https://h/p/foo_bar-1.0-py3-none-any.whl#{}&x=y", A.replace(':', "=")), "foo-bar"),
            (format!("./dist/foo-1.0.tar.gz --hash={A}"), "foo"),
            ("-r sub/more.txt".to_string(), "inner"),
        ] {
            let said = lines(&text).unwrap();
            assert_eq!(said.hashes.keys().collect::<Vec<_>>(), [name], "{text}");
            assert_eq!(said.hashes[name], BTreeSet::from([A.to_string()]), "{text}");
        }
        for plain in ["six==1.16.0", "# six --hash=x", "-e ./dir", "-c constraints.txt", "", "six # --hash=sha256:x"] {
            assert_eq!(lines(plain).unwrap(), Said::default(), "{plain}");
        }
        for bad in ["six --hash=deadbeef", "six --hash=sha256:xyz", &format!("--hash={A}")] {
            assert_eq!(lines(bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
        assert!(lines("--require-hashes\nsix").unwrap().all);
        assert!(lines("-r a.txt").is_err(), "a file that includes itself");
    }

    #[test]
    fn indexes_are_found() {
        let said = lines("-i https://u:p@h/simple\n--extra-index-url=https://b/simple\n-f ./wheels").unwrap();
        assert_eq!(said.index_url.as_deref(), Some("https://u:p@h/simple"));
        assert_eq!(said.extra_index_urls, ["https://b/simple"]);
    }

    #[test]
    fn a_lock_keeps_only_files_whose_hashes_were_written() {
        let b = A.replace('a', "b").replace("shb", "sha");
        let lock = format!(
            "lock-version = \"1.0\"\ncreated-by = \"x\"\n[[packages]]\nname = \"six\"\nversion = \"1\"\n\
             wheels = [{{ url = \"w1\", hashes = {{ sha256 = \"{}\" }} }}, {{ url = \"w2\", hashes = {{ sha256 = \"{}\" }} }}]\n\
             sdist = {{ url = \"s\", hashes = {{ sha256 = \"{}\" }} }}\n",
            &A[7..],
            &b[7..],
            &b[7..]
        );
        let kept = lines(&format!("six --hash={A}")).unwrap().restrict(lock.clone()).unwrap();
        assert!(kept.contains("w1") && !kept.contains("w2") && !kept.contains("\"s\""), "{kept}");
        let other = A.replace("aaaa", "cccc");
        let error = lines(&format!("six --hash={other}")).unwrap().restrict(lock.clone()).unwrap_err();
        assert!(error.to_string().contains("hash mismatch"), "{error:?}");
        assert!(lines("--require-hashes\nidna").unwrap().restrict(lock.clone()).is_err());
        assert_eq!(lines("six").unwrap().restrict(lock.clone()).unwrap(), lock);
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(line in ".{0,200}") {
            let _ = Said::default().line(&line, Path::new("/nonexistent"), 0);
        }
    }
}
