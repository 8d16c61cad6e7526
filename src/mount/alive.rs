//! Whether somebody serves a mount, asked without ever hanging.

use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::sys;

/// A question that every mount of ours answers from memory, and no file system from the kernel's.
const PING: &std::ffi::CStr = c"user.envfabric.ping";

/// What became of a question to what is mounted somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alive {
    /// It was answered, or nothing is mounted there that could hang.
    Answers,
    /// The process that served is gone.
    Dead,
    /// Nobody has answered in time: the process is stopped, or another is being started.
    Silent,
}

/// Asks what is mounted at `dir`, and waits at most `patience`. Attributes may come from the kernel's memory for a while
/// after the end of a server; this is always asked of it.
pub fn alive(dir: &Path, patience: Duration) -> Alive {
    let Ok(root) = nix::fcntl::open(dir, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) else {
        return Alive::Answers;
    };
    match sys::xattr_apart::<64>(&root, PING, None, patience) {
        Ok(None) => Alive::Silent,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)) => Alive::Dead,
        Ok(Some(_)) | Err(_) => Alive::Answers,
    }
}
