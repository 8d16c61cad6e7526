//! What the loader of a library touches for sure.
//!
//! A dynamic loader goes through the tables at a library's beginning, and changes what lies behind them wherever that has
//! to be relocated, before any of the library's code runs. All of that is told by the first few hundred bytes, so it can
//! be asked for while the loader still looks at these.

use std::ops::Range;

use goblin::container::{Container, Ctx};
use goblin::elf::header::header64::Header;
use goblin::elf::header::{EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFMAG, SELFMAG};
use goblin::elf::program_header::{PF_W, PF_X, PT_DYNAMIC, PT_GNU_RELRO, PT_LOAD, ProgramHeader};

/// Of each range, no more bytes than this: what is larger is seldom touched from end to end.
const MOST: u64 = 8 << 20;

/// Ranges of bytes of the library that begins with `bytes`; none when it is no library, or not one of this sort of machine.
pub(super) fn ranges(bytes: &[u8]) -> Vec<Range<u64>> {
    headers(bytes).unwrap_or_default().iter().filter_map(range).collect()
}

fn headers(bytes: &[u8]) -> Option<Vec<ProgramHeader>> {
    let first = bytes.first_chunk::<{ size_of::<Header>() }>()?;
    let is_known = &first[..SELFMAG] == ELFMAG && first[EI_CLASS] == ELFCLASS64 && first[EI_DATA] == ELFDATA2LSB;
    let header = is_known.then(|| Header::from_bytes(first))?;
    let context = Ctx::new(Container::Big, goblin::container::Endian::Little);
    let count = usize::from(header.e_phnum);
    ProgramHeader::parse(bytes, usize::try_from(header.e_phoff).ok()?, count, context).ok()
}

fn range(header: &ProgramHeader) -> Option<Range<u64>> {
    let is_tables = header.p_type == PT_LOAD && header.p_offset == 0 && header.p_flags & (PF_W | PF_X) == 0;
    let is_touched = is_tables || matches!(header.p_type, PT_DYNAMIC | PT_GNU_RELRO);
    let length = header.p_filesz.min(MOST);
    let end = header.p_offset.checked_add(length)?;
    (is_touched && length > 0).then_some(header.p_offset..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_tells_what_its_loader_touches() {
        // This program is one.
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let found = ranges(&program[..4096]);
        let elf = goblin::elf::Elf::parse(&program).unwrap();
        let dynamic = elf.program_headers.iter().find(|header| header.p_type == PT_DYNAMIC).unwrap();
        assert!(found.iter().any(|range| range.contains(&dynamic.p_offset)), "{found:?}");
        assert!(found.iter().all(|range| range.end <= program.len() as u64 && range.end - range.start <= MOST));
    }

    #[test]
    fn what_is_no_library_tells_nothing() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for length in [0, 4, 63, 64, 100] {
            assert_eq!(ranges(&program[..length]), []);
        }
        assert_eq!(ranges(b"#!/bin/sh\n"), []);
        let mut hostile = program[..4096].to_vec();
        hostile[32..40].fill(0xff); // where its headers are
        assert_eq!(ranges(&hostile), []);
        hostile.copy_from_slice(&program[..4096]);
        hostile[64..].fill(0xff);
        assert_eq!(ranges(&hostile), []);
    }
}
