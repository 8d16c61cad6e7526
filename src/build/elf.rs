//! Library search paths inside ELF files, made relative to the file (`$ORIGIN`).

use goblin::elf::Elf;
use goblin::elf::dynamic::{DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_SONAME};
use goblin::elf::program_header::PT_LOAD;

use crate::error::{Error, Kind, Result};

/// What to do with the search path of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule<'a> {
    /// Names of the prefix that the build was made for; entries at or below it become relative.
    pub(super) prefixes: [&'a str; 2],
    /// Way from the file's directory up to the new root: `..` for `bin/python3`.
    pub(super) up: &'a str,
    /// A library that must be found in `<root>/lib`, even if the file names no search path.
    pub(super) library: Option<&'a str>,
}

/// The bytes of an ELF file with a position-independent search path; none when they can stay as they are.
///
/// The string is replaced in place when it fits and nothing else of the file points into it (linkers merge tails of
/// strings); else the file is laid out anew.
pub(super) fn relocate(bytes: &[u8], rule: &Rule<'_>) -> Result<Option<Vec<u8>>> {
    if !bytes.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    let bad = |what: String| Error::new(Kind::Invalid, format!("an ELF file cannot be made relocatable: {what}"));
    let elf = Elf::parse(bytes).map_err(|e| bad(e.to_string()))?;
    let Some(dynamic) = &elf.dynamic else { return Ok(None) };
    let tag = dynamic.dyns.iter().find(|d| d.d_tag == DT_RUNPATH || d.d_tag == DT_RPATH);
    let old = match tag {
        Some(tag) => {
            elf.dynstrtab.get_at(tag.d_val as usize).ok_or_else(|| bad("its path is outside its strings".into()))?
        }
        None => "",
    };
    let mut entries: Vec<String> = old.split(':').filter(|e| !e.is_empty()).map(|e| entry(e, rule)).collect();
    if rule.library.is_some_and(|library| elf.libraries.contains(&library)) {
        let lib = format!("$ORIGIN/{}/lib", rule.up);
        if !entries.contains(&lib) {
            entries.insert(0, lib);
        }
    }
    entries.dedup();
    let new = entries.join(":");
    if new == old {
        return Ok(None);
    }
    if let Some(tag) = tag
        && let Some(at) = room(&elf, tag.d_val, old, &new)
    {
        let mut patched = bytes.to_vec();
        let place =
            patched.get_mut(at..at + old.len()).ok_or_else(|| bad("its strings lie outside the file".into()))?;
        place.fill(0);
        place[..new.len()].copy_from_slice(new.as_bytes());
        return Ok(Some(patched));
    }
    let mut rewriter = object_rewrite::Rewriter::read(bytes).map_err(|e| bad(e.to_string()))?;
    rewriter.elf_set_runpath(new.into_bytes()).map_err(|e| bad(e.to_string()))?;
    let mut out = Vec::new();
    rewriter.write(&mut out).map_err(|e| bad(e.to_string()))?;
    Ok(Some(out))
}

/// One entry of a search path, relative to the file where it was below the old prefix.
fn entry(entry: &str, rule: &Rule<'_>) -> String {
    let below = |prefix: &&str| entry.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match rule.prefixes.iter().find_map(below) {
        Some(rest) => format!("$ORIGIN/{}{}", rule.up, rest.trim_end_matches('/')),
        None => entry.to_string(),
    }
}

/// Where in the file the old string lies, when the new one may take its place.
fn room(elf: &Elf<'_>, offset: u64, old: &str, new: &str) -> Option<usize> {
    if new.len() > old.len() || new.is_empty() {
        return None;
    }
    let dynamic = elf.dynamic.as_ref()?;
    let start = offset as usize;
    let inside = |at: usize| at >= start && at < start + old.len();
    let mut shared = elf.dynsyms.iter().any(|symbol| inside(symbol.st_name));
    let named = |tag| tag == DT_NEEDED || tag == DT_SONAME;
    shared |= dynamic.dyns.iter().any(|d| named(d.d_tag) && inside(d.d_val as usize));
    if let Some(needs) = &elf.verneed {
        shared |= needs.iter().any(|n| inside(n.vn_file) || n.iter().any(|a| inside(a.vna_name)));
    }
    if let Some(definitions) = &elf.verdef {
        shared |= definitions.iter().any(|d| d.iter().any(|a| inside(a.vda_name)));
    }
    if shared {
        return None;
    }
    let address = dynamic.info.strtab as u64;
    let segment = elf
        .program_headers
        .iter()
        .find(|p| p.p_type == PT_LOAD && p.p_vaddr <= address && address - p.p_vaddr < p.p_filesz)?;
    usize::try_from((address - segment.p_vaddr).checked_add(segment.p_offset)?.checked_add(offset)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_below_the_prefix_become_relative_and_others_stay() {
        let rule = Rule { prefixes: ["/opt/py", "/link/py"], up: "../..", library: None };
        for (old, new) in [
            ("/opt/py/lib", "$ORIGIN/../../lib"),
            ("/opt/py", "$ORIGIN/../.."),
            ("/link/py/lib/", "$ORIGIN/../../lib"),
            ("/opt/python/lib", "/opt/python/lib"),
            ("$ORIGIN/x", "$ORIGIN/x"),
        ] {
            assert_eq!(entry(old, &rule), new);
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let rule = Rule { prefixes: ["/opt/py", "/opt/py"], up: "..", library: Some("libpython3.11.so.1.0") };
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(relocate(b"#!/bin/sh", &rule).unwrap().is_none());
        for cut in [4, 5, 16, 63, 64, 100, 1000, 5000] {
            let _ = relocate(&own[..cut], &rule);
        }
    }
}
