//! The only `unsafe` of the program: what must be done between `fork` and `exec` of a child, and taking ownership of a
//! descriptor.
//!
//! The closure given to `pre_exec` runs in a copy of a process that may have had many threads, so it may only make
//! system calls: everything it needs (C strings, texts) is prepared before.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version of the glibc that this process runs with, `2.36`; none for a build without glibc, which cannot tell what
/// the machine has.
pub fn glibc_version() -> Option<&'static str> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: glibc returns a NUL-terminated string that lives and stays the same as long as the process.
        let version = unsafe { std::ffi::CStr::from_ptr(libc::gnu_get_libc_version()) };
        version.to_str().ok()
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

/// Takes ownership of a descriptor that was just received through a socket and is known to nobody else.
pub(crate) fn own(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: SCM_RIGHTS made the descriptor for this process; the only caller passes it on at once and once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// How a child differs from its parent.
#[derive(Debug, Clone, Default)]
pub struct Child {
    /// The largest file that it may write, in bytes.
    pub file_size_max: Option<u64>,
    /// Load everything at the same addresses each time (`ADDR_NO_RANDOMIZE`).
    pub fixed_addresses: bool,
    /// Directories that it sees empty and files that it sees empty and not executable, in a mount namespace of its
    /// own. Needs root or user namespaces; without them `spawn` fails.
    pub hide: Vec<PathBuf>,
}

impl Child {
    /// Prepares `command`: the child dies when this thread ends, makes files with umask 022, and is as told.
    pub fn prepare(&self, command: &mut Command) -> io::Result<()> {
        let parent = std::process::id();
        let limit = self.file_size_max;
        let fixed_addresses = self.fixed_addresses;
        let hide = match self.hide.is_empty() {
            true => None,
            false => Some(Hide::new(&self.hide)?),
        };
        // SAFETY: the closure makes system calls only, on values that were prepared here; it allocates nothing and
        // takes no lock.
        unsafe {
            command.pre_exec(move || {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
                // The parent may have died before the call above.
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                libc::umask(0o022);
                if let Some(bytes) = limit {
                    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                    check(libc::getrlimit(libc::RLIMIT_FSIZE, &mut now))?;
                    now.rlim_cur = bytes.min(now.rlim_max);
                    check(libc::setrlimit(libc::RLIMIT_FSIZE, &now))?;
                }
                if fixed_addresses {
                    // A sandbox may forbid this; then bytecode of old Pythons is a little less reproducible.
                    libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
                }
                match &hide {
                    Some(hide) => hide.enter(),
                    None => Ok(()),
                }
            });
        }
        Ok(())
    }
}

/// The system calls that hide paths, with their arguments.
struct Hide {
    flags: libc::c_int,
    uid_map: Vec<u8>,
    gid_map: Vec<u8>,
    targets: Vec<(CString, bool)>,
}

impl Hide {
    fn new(paths: &[PathBuf]) -> io::Result<Hide> {
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        let mut flags = libc::CLONE_NEWNS;
        if !uid.is_root() {
            flags |= libc::CLONE_NEWUSER;
        }
        let targets = paths
            .iter()
            .map(|path| Ok((c_string(path)?, std::fs::metadata(path)?.is_dir())))
            .collect::<io::Result<_>>()?;
        let map = |id: u32| format!("{id} {id} 1").into_bytes();
        Ok(Hide { flags, uid_map: map(uid.as_raw()), gid_map: map(gid.as_raw()), targets })
    }

    /// Only called between `fork` and `exec`.
    fn enter(&self) -> io::Result<()> {
        // SAFETY: every pointer is to a NUL-terminated string that lives in `self` or the program.
        unsafe {
            check(libc::unshare(self.flags))?;
            if self.flags & libc::CLONE_NEWUSER != 0 {
                write_once(c"/proc/self/setgroups", b"deny")?;
                write_once(c"/proc/self/uid_map", &self.uid_map)?;
                write_once(c"/proc/self/gid_map", &self.gid_map)?;
            }
            let none = std::ptr::null();
            check(libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()))?;
            for (target, is_dir) in &self.targets {
                let done = match is_dir {
                    true => libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, none.cast()),
                    false => libc::mount(c"/dev/null".as_ptr(), target.as_ptr(), none, libc::MS_BIND, none.cast()),
                };
                check(done)?;
            }
        }
        Ok(())
    }
}

/// Writes `bytes` to an existing file with one call.
///
/// # Safety
/// None beyond being called where only system calls are allowed, which this keeps to.
unsafe fn write_once(path: &std::ffi::CStr, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: `path` is NUL-terminated, `bytes` is valid for its length, and the descriptor is closed here.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(fd)?;
        let written = libc::write(fd, bytes.as_ptr().cast(), bytes.len());
        let error = io::Error::last_os_error();
        libc::close(fd);
        if written == bytes.len() as isize { Ok(()) } else { Err(error) }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
