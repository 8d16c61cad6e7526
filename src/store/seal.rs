//! Sealed documents: JSON whose last member is the digest of all before it.
//!
//! ```text
//! {"format":1,"name":"x","seal":"<sha256 of everything up to the comma before it>"}
//! ```
//!
//! A document of the store names objects by digest, but nothing names the document by one: a bit that flips in a date or
//! a name would be believed. The seal tells. It keeps nobody from writing another document with another seal.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::environment::Digest;
use crate::error::{Error, Kind, Result};

const BEFORE: &[u8] = b",\"seal\":\"";
const AFTER: &[u8] = b"\"}\n";
const DIGITS: usize = 64;

/// The bytes of a document of the store: `value`, which serializes as a JSON object with at least one member, with its
/// seal.
pub fn write<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    write_with(value, |_| Vec::new())
}

/// The same with more members, `,"name":...`, which `more` makes of all bytes before them.
pub(super) fn write_with<T: Serialize>(value: &T, more: impl FnOnce(&[u8]) -> Vec<u8>) -> Result<Vec<u8>> {
    let unwritable = || Error::new(Kind::Failed, "a document cannot be written as JSON");
    let mut bytes = serde_json::to_vec(value).map_err(|source| unwritable().with_source(source))?;
    bytes.pop_if(|last| *last == b'}').ok_or_else(unwritable)?;
    let more = more(&bytes);
    bytes.extend(more);
    let seal = Digest::of(&bytes).to_string();
    bytes.extend([BEFORE, seal.as_bytes(), AFTER].concat());
    Ok(bytes)
}

/// True when `bytes` are as they were written.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    sealed(bytes).is_some()
}

/// The bytes before the seal of a document that is as it was written.
pub(super) fn sealed(bytes: &[u8]) -> Option<&[u8]> {
    let start = bytes.len().checked_sub(BEFORE.len() + DIGITS + AFTER.len())?;
    let (text, seal) = bytes.split_at(start);
    (seal == [BEFORE, Digest::of(text).to_string().as_bytes(), AFTER].concat()).then_some(text)
}

/// Why a document cannot be read.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// Its bytes are not those that were written.
    Broken,
    /// It says something else than it should.
    Other(serde_json::Error),
}

/// The value of a sealed document.
pub(super) fn read<T: DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, Unreadable> {
    if !is_whole(bytes) {
        return Err(Unreadable::Broken);
    }
    serde_json::from_slice(bytes).map_err(Unreadable::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_document_is_told() {
        let value = serde_json::json!({ "format": 1, "name": "x", "at": "2026-01-01T00:00:00Z" });
        let bytes = write(&value).unwrap();
        let read_back: serde_json::Value = read(&bytes).unwrap();
        assert_eq!(read_back["name"], "x");
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_whole(&flipped), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(!is_whole(&bytes[..length]));
        }
    }
}
