//! Asks a mount to bring a version to its node ahead of use.
//!
//! As for [`super::stats`], the mount is asked through extended attributes: reading `user.envfabric.warm` of a version's
//! directory begins, reading `user.envfabric.warming` tells how far it is; with `.all` for all files and not only those
//! that starts touch.

use std::ffi::CStr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Kind, Result};
use crate::sys;
use crate::view::{Ino, Tree};

const BEGIN: [&CStr; 2] = [c"user.envfabric.warm", c"user.envfabric.warm.all"];
const ASK: [&CStr; 2] = [c"user.envfabric.warming", c"user.envfabric.warming.all"];
/// An answer is short, in bytes.
const ANSWER_MAX: usize = 4096;
/// How long a mount may take to answer.
const ANSWERS: Duration = Duration::from_secs(10);

/// How far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warmed {
    /// Bytes to bring, as soon as that is known.
    pub total: u64,
    /// Bytes that are here.
    pub done: u64,
    /// It is over.
    pub ended: bool,
    /// Why it did not succeed.
    pub failed: Option<String>,
}

/// The answer to attribute `name` of `dir` as JSON; none when it is no attribute of this sort.
pub(super) fn answer(tree: &Tree, dir: Ino, name: &[u8]) -> Option<Result<Vec<u8>>> {
    let which = |names: [&CStr; 2]| names.iter().position(|known| known.to_bytes() == name);
    let warming = match (which(BEGIN), which(ASK)) {
        (Some(all), _) => tree.warm(dir, all == 1).map(Some),
        (_, Some(all)) => tree.warming(dir, all == 1),
        _ => return None,
    };
    let told = warming.map(|warming| {
        let warmed = warming.map_or_else(Warmed::default, |warming| Warmed {
            // Ended first: what is read later is not less.
            ended: warming.has_ended(),
            failed: warming.failure(),
            total: warming.total.load(Ordering::Relaxed),
            done: warming.done.load(Ordering::Relaxed),
        });
        serde_json::to_vec(&warmed).unwrap_or_default()
    });
    Some(told)
}

/// Asks the mount that shows the version's directory `dir` to bring it, or how far that is.
///
/// # Errors
/// [`Kind::Unsupported`] when the mount is of an older program; [`Kind::Failed`] when it does not answer.
pub fn warm(dir: &Path, all: bool, begin: bool) -> Result<Warmed> {
    let name = if begin { BEGIN } else { ASK }[usize::from(all)];
    let opened = nix::fcntl::open(dir, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).at("opening", dir)?;
    let unanswered = || {
        Error::new(Kind::Failed, format!("the mount that shows {} does not answer", dir.display()))
            .hint("is the store reachable? `envfabric stats` tells whether the mount is alive")
    };
    let older = || {
        Error::new(Kind::Unsupported, format!("the mount that shows {} cannot be asked to bring it", dir.display()))
            .hint("an older envfabric serves it: unmount and mount again")
    };
    match sys::xattr_apart::<ANSWER_MAX>(&opened, name, None, ANSWERS) {
        Ok(Some(text)) => serde_json::from_slice(&text).map_err(|source| older().with_source(source)),
        Ok(None) => Err(unanswered()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => Err(older()),
        Err(error) => Err(Error::io("asking the mount at", dir, error)),
    }
}
