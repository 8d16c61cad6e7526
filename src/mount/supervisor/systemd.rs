//! What a service manager is told, and what it keeps for the next supervisor (sd_notify(3), sd_listen_fds(3)).
//!
//! It keeps the connection and the memory of a mount while the service lives, so that a supervisor which was killed is
//! followed by one that goes on: nothing of the mount is in the process itself.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::fs::MetadataExt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket};
use nix::unistd::Pid;

use super::super::kept::{Kept, Number};
use crate::sys;

/// Variables of a service that are not for its workers.
pub(super) const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"];
/// The first descriptor that a service is given.
const FIRST: RawFd = 3;
/// What is kept, by name.
const DEVICE: &str = "envfabric-device";
const KEPT: &str = "envfabric-kept";
/// How long a worker of an earlier supervisor may take to be gone.
const GOES: Duration = Duration::from_secs(5);

/// Tells the service manager `state`, if there is one.
pub(super) fn tell(state: &str, with: &[BorrowedFd<'_>]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    let told = (|| -> io::Result<()> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => UnixAddr::new_abstract(name)?,
            None => UnixAddr::new(Path::new(&path))?,
        };
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let numbers: Vec<RawFd> = with.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() { &rights[..0] } else { &rights[..] };
        let text = [IoSlice::new(state.as_bytes())];
        sendmsg(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, Some(&address))?;
        Ok(())
    })();
    if let Err(error) = told {
        tracing::warn!(%error, state, "the service manager cannot be told");
    }
}

/// Has the connection and the memory of a mount kept.
pub(super) fn keep(device: &OwnedFd, kept: &Kept) {
    tell(&format!("FDSTORE=1\nFDNAME={DEVICE}"), &[device.as_fd()]);
    tell(&format!("FDSTORE=1\nFDNAME={KEPT}"), &[kept.file().as_fd()]);
}

/// Has nothing kept any more.
pub(super) fn drop_kept() {
    tell(&format!("STOPPING=1\nFDSTOREREMOVE=1\nFDNAME={DEVICE}"), &[]);
    tell(&format!("FDSTOREREMOVE=1\nFDNAME={KEPT}"), &[]);
}

/// What was kept: the connection, and the memory.
pub(super) fn take() -> io::Result<Option<(OwnedFd, OwnedFd)>> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    let count = number("LISTEN_FDS").unwrap_or(0);
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let (mut device, mut kept) = (None, None);
    for (number, name) in (FIRST..).take(count.min(64) as usize).zip(names.split(':')) {
        let descriptor = sys::own(number)?;
        fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        match name {
            DEVICE => device = Some(descriptor),
            KEPT => kept = Some(descriptor),
            _ => {}
        }
    }
    Ok(device.zip(kept))
}

/// Ends the worker that an earlier supervisor has left, if it lives: it has the same memory open.
///
/// Waits until its last thread is gone, and not only what it had open: one that is just leaving the kernel may still take
/// a request along, which nobody would send again.
pub(super) fn end_left(kept: &Kept) {
    let Ok(pid) = i32::try_from(kept.get(Number::Worker)) else { return };
    let Ok(own) = kept.file().metadata() else { return };
    let is_it = || {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut files = open.filter_map(|entry| fs::metadata(entry.path()).ok());
        pid > 1 && files.any(|file| (file.st_dev(), file.st_ino()) == (own.st_dev(), own.st_ino()))
    };
    if !is_it() {
        return;
    }
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let begun = Instant::now();
    while begun.elapsed() < GOES && !is_gone(pid) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// True when process `pid` has no thread left; nobody may have waited for it yet.
fn is_gone(pid: i32) -> bool {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X']))
    })
}
