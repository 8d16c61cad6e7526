//! Whose a workflow is, and what others may do in it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// The number that stands for no user and no group. (chown(2))
const NOBODY: u32 = u32::MAX;

/// User, group and permissions of a workflow's directories, as every machine that mounts the store shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User, by number: it must mean the same user on every machine, as on any network file system.
    pub uid: u32,
    /// Group, by number.
    pub gid: u32,
    /// Permissions.
    pub mode: Mode,
}

impl Owner {
    /// Whether it can be shown: no number of it means "unchanged".
    pub fn is_valid(&self) -> bool {
        self.uid != NOBODY && self.gid != NOBODY
    }
}

/// Permissions of a directory, `0750`: nine bits, nothing beyond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(u16);

impl Mode {
    /// For its owner alone.
    pub const PRIVATE: Mode = Mode(0o700);
    /// For its owner and its group.
    pub const GROUP: Mode = Mode(0o750);
    /// For everybody.
    pub const OPEN: Mode = Mode(0o755);

    /// The bits.
    pub fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = !text.is_empty() && text.len() <= 4 && text.bytes().all(|c| (b'0'..=b'7').contains(&c));
        match u16::from_str_radix(text, 8) {
            Ok(bits) if digits && bits <= 0o777 => Ok(Mode(bits)),
            _ => Err(Error::new(Kind::Usage, format!("{text:?} is not a mode"))
                .hint("write three octal digits: 750 lets the owner and the group in, 700 the owner alone")),
        }
    }
}

serde_as_text!(Mode);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_nine_bits_in_octal_digits() {
        for (text, shown) in [("750", "0750"), ("0700", "0700"), ("0", "0000"), ("777", "0777")] {
            assert_eq!(text.parse::<Mode>().unwrap().to_string(), shown);
        }
        for wrong in ["", "1777", "4755", "8", "-1", "+7", "0o750", "rwx", "00750", " 750"] {
            assert_eq!(wrong.parse::<Mode>().unwrap_err().kind(), Kind::Usage, "{wrong}");
        }
        assert!(serde_json::from_str::<Mode>("750").is_err() && serde_json::from_str::<Mode>("\"1750\"").is_err());
    }
}
