//! The unsafe line of the mount; the other calls that need `unsafe` are in `crate::sys`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes ownership of a descriptor that was just received through a socket and is known to nobody else.
#[allow(unsafe_code)]
pub(super) fn own(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: SCM_RIGHTS made the descriptor for this process; the only caller passes it on at once and once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
