//! A look into wheels that lie on this machine, before uv unpacks them.
//!
//! uv drops entries that leave the target without a word, writes symlink entries as text files, and lets the second of
//! two entries win: such a wheel is refused here, with the reason. A wheel that uv fetched itself is not seen by us
//! before it is installed; of it, only what ends up in the staging venv can be judged (`stage`): files that nobody
//! owns and changes of the venv itself are refused, entries that uv dropped leave no trace.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use zip::ZipArchive;

use super::limits::{DISTRIBUTION_MAX, FILE_MAX, FILES_MAX, RATIO_MAX};
use crate::error::{Error, IoContext, Kind, Result};

/// Fails when the wheel at `path` has anything that no honest wheel has.
pub(super) fn inspect(path: &Path) -> Result<()> {
    let mut file = File::open(path).at("opening", path)?;
    let size = file.metadata().at("reading", path)?.len();
    let refused = |why: String| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Error::new(Kind::Invalid, format!("wheel {name} is refused: {why}"))
            .hint("get the wheel from a place you trust, or build it anew")
    };
    let counted = central_entries(&mut file, size).at("reading", path)?;
    file.rewind().at("reading", path)?;
    let mut archive = ZipArchive::new(file).map_err(|e| refused(format!("it is no readable zip file ({e})")))?;
    if counted.is_some_and(|n| n != archive.len() as u64) {
        return Err(refused("it has two entries of one name".into()));
    }
    if archive.len() > FILES_MAX {
        return Err(refused(format!("it has {} entries, and {FILES_MAX} are allowed", archive.len())));
    }
    let mut seen = HashSet::new();
    let mut total = 0u64;
    for number in 0..archive.len() {
        let entry = archive.by_index_raw(number).map_err(|e| refused(format!("entry {number} is unreadable ({e})")))?;
        let raw = entry.name_raw().to_vec();
        let name = String::from_utf8_lossy(&raw).into_owned();
        let say = |why: &str| refused(format!("entry {name:?} {why}"));
        if raw.starts_with(b"/") {
            return Err(say("has an absolute path"));
        }
        if raw.contains(&b'\\') {
            return Err(say("has a backslash in its path"));
        }
        let path = raw.strip_suffix(b"/").unwrap_or(&raw);
        for part in path.split(|b| *b == b'/') {
            if part == b".." {
                return Err(say("leaves the environment (..)"));
            }
            if part.is_empty() || part == b"." || part.len() > 255 || part.contains(&0) {
                return Err(say("is no acceptable path"));
            }
        }
        if entry.is_symlink() {
            return Err(say("is a symbolic link"));
        }
        if entry.size() > FILE_MAX {
            return Err(say(&format!("has {} bytes, and {FILE_MAX} are allowed", entry.size())));
        }
        total = total.saturating_add(entry.size());
        if !seen.insert(path.to_vec()) {
            return Err(say("is there twice"));
        }
    }
    if total > DISTRIBUTION_MAX || (total > 1 << 30 && total / size.max(1) > RATIO_MAX) {
        return Err(refused(format!("it unpacks to {total} bytes")));
    }
    Ok(())
}

/// How many entries the zip file says that it has; the `zip` crate shows only one of two with the same name.
/// None when the end record is not found (then the crate will not open it either) or is in its 64-bit form.
fn central_entries(file: &mut File, size: u64) -> std::io::Result<Option<u64>> {
    let tail = size.min(65_557);
    file.seek(SeekFrom::Start(size - tail))?;
    let mut bytes = Vec::new();
    file.take(tail).read_to_end(&mut bytes)?;
    let found = (0..bytes.len().saturating_sub(21)).rev().find(|at| bytes[*at..].starts_with(b"PK\x05\x06"));
    let count = found.map(|at| u64::from(u16::from_le_bytes([bytes[at + 10], bytes[at + 11]])));
    Ok(count.filter(|n| *n != 0xffff))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn wheel(dir: &Path, entries: &[&str], symlink: Option<&str>) -> std::path::PathBuf {
        let path = dir.join("x-1.0-py3-none-any.whl");
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        for name in entries {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(b"x").unwrap();
        }
        if let Some(name) = symlink {
            zip.add_symlink(name, "/etc/passwd", SimpleFileOptions::default()).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    #[test]
    fn hostile_wheels_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        inspect(&wheel(dir.path(), &["x/__init__.py", "x-1.0.dist-info/RECORD", "x/y\u{e9}.txt"], None)).unwrap();
        for (entry, why) in [
            ("../evil", ".."),
            ("x/../../evil", ".."),
            ("/etc/evil", "absolute"),
            ("x\\evil", "backslash"),
            ("x//y", "no acceptable path"),
        ] {
            let error = inspect(&wheel(dir.path(), &["ok", entry], None)).unwrap_err();
            assert!(error.chain().contains(why), "{entry}: {error:?}");
            assert!(error.chain().contains("x-1.0-py3-none-any.whl"));
        }
        let error = inspect(&wheel(dir.path(), &[], Some("link"))).unwrap_err();
        assert!(error.chain().contains("symbolic link"), "{error:?}");
        // Two entries of one name: the writer refuses to make them, so the second is renamed in the bytes.
        let path = wheel(dir.path(), &["aaaa", "aaab"], None);
        let bytes = std::fs::read(&path).unwrap();
        let text: Vec<u8> = bytes.windows(4).enumerate().fold(bytes.clone(), |mut out, (at, w)| {
            if w == b"aaab" {
                out[at + 3] = b'a';
            }
            out
        });
        std::fs::write(&path, text).unwrap();
        assert!(inspect(&path).unwrap_err().chain().contains("two entries of one name"));
    }
}
