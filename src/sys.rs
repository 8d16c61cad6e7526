//! The only `unsafe` of the program: what must be done between `fork` and `exec` of a child, taking ownership of a
//! descriptor, asking a file system that may never answer, settings of memory, memory that processes share, and calls
//! to the FUSE device that `fuser` does not offer.
//!
//! The closure given to `pre_exec` runs in a copy of a process that may have had many threads, so it may only make
//! system calls: everything it needs (C strings, texts) is prepared before.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use fuser::{FileHandle, FopenFlags, ReplyOpen};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The version of the glibc that this process runs with, `2.36`; none for a build without glibc, which cannot tell what
/// the machine has.
pub fn glibc_version() -> Option<&'static str> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: glibc returns a NUL-terminated string that lives and stays the same as long as the process.
        let version = unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) };
        version.to_str().ok()
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

/// Lets SQLite take memory for a connection as it needs it, instead of about 130 KB in advance; a mount keeps hundreds of
/// catalogs open. Must come before the first connection of the process; later it changes nothing.
pub(crate) fn lean_databases() {
    use rusqlite::ffi;
    // A quarter of the usual, which holds what one answer needs for a moment.
    let (slot, slots): (libc::c_int, libc::c_int) = (1200, 10);
    // SAFETY: the arguments are of the types that these two options take (sqlite.org/c3ref/c_config_getmalloc.html),
    // and SQLite itself refuses the call once it has begun to work.
    unsafe {
        ffi::sqlite3_config(ffi::SQLITE_CONFIG_LOOKASIDE, slot, slots);
        let none = std::ptr::null_mut::<libc::c_void>();
        let no_size: libc::c_int = 0;
        ffi::sqlite3_config(ffi::SQLITE_CONFIG_PAGECACHE, none, no_size, no_size);
    }
}

/// Limits glibc to `arenas` heaps: each thread that has its own keeps what it once needed.
pub(crate) fn few_heaps(arenas: i32) {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt may be called at any time, from any thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = arenas;
}

/// Lets this thread run when others have little to do. Where the system does not allow it, it runs as before.
pub(crate) fn give_way() {
    // SAFETY: of numbers alone; 0 is the calling thread (Linux counts niceness by thread).
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 10);
    }
}

/// Takes ownership of a descriptor that was just received, through a socket or from who started this program, and is
/// known to nobody else.
pub(crate) fn own(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: SCM_RIGHTS, accept or a service manager made the descriptor for this process; callers pass it on once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The value of extended attribute `name` of `dir`, of at most `MOST` bytes; none when it does not come within `wait`.
/// Where `user` names a user and a group, they ask; only root can ask in another's name.
///
/// A call that a FUSE server has read cannot be interrupted, not even by SIGKILL, and a process with such a thread does
/// not end. So a child asks, which shares nothing with its parent but a pipe, and is left behind if need be.
pub(crate) fn xattr_apart<const MOST: usize>(
    dir: &OwnedFd,
    name: &CStr,
    user: Option<(u32, u32)>,
    wait: Duration,
) -> io::Result<Option<Vec<u8>>> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // SAFETY: the child makes system calls only and never returns; see `ask`.
    let child = match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => unsafe { ask::<MOST>(dir, &theirs, name, user) },
        nix::unistd::ForkResult::Parent { child } => child,
    };
    drop(theirs);
    let end = Instant::now() + wait;
    let mut answer = Vec::new();
    let mut ours = std::fs::File::from(ours);
    let whole = loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis().min(i32::MAX as u128) as i32;
        let mut polled = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let mut part = [0u8; 4096];
        match ours.read(&mut part)? {
            0 => break true,
            length => answer.extend_from_slice(&part[..length]),
        }
    };
    if !whole {
        let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(child, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
        return Ok(None);
    }
    let _ = nix::sys::wait::waitpid(child, None);
    // The errno comes first, 0 for none.
    let Some((errno, value)) = answer.split_first_chunk::<4>() else { return Err(io::ErrorKind::UnexpectedEof.into()) };
    match i32::from_ne_bytes(*errno) {
        0 => Ok(Some(value.to_vec())),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The child of [`xattr_apart`].
///
/// # Safety
/// Only called in a child right after `fork`: closes all descriptors and does not return.
unsafe fn ask<const MOST: usize>(dir: &OwnedFd, pipe: &OwnedFd, name: &CStr, user: Option<(u32, u32)>) -> ! {
    let mut value = [0u8; MOST];
    // SAFETY: system calls on numbers and on memory of this frame, with its length; names are NUL-terminated. The two
    // descriptors are moved out of each other's way before they get the numbers 0 and 1.
    unsafe {
        let dir = libc::fcntl(dir.as_raw_fd(), libc::F_DUPFD, 2);
        let pipe = libc::fcntl(pipe.as_raw_fd(), libc::F_DUPFD, 2);
        libc::dup2(dir, 0);
        libc::dup2(pipe, 1);
        // Whoever waits for the end of a pipe that the parent has must not wait for this child.
        libc::syscall(libc::SYS_close_range, 2, libc::c_uint::MAX, 0);
        let mut failed = 0;
        if let Some((user, group)) = user {
            let (user, group) = (libc::c_long::from(user), libc::c_long::from(group));
            if libc::syscall(libc::SYS_setresgid, group, group, group) < 0
                || libc::syscall(libc::SYS_setresuid, user, user, user) < 0
            {
                failed = *libc::__errno_location();
            }
        }
        let mut length = 0;
        if failed == 0 {
            let path = c"/proc/self/fd/0";
            length = libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), MOST);
            if length < 0 {
                failed = *libc::__errno_location();
            }
        }
        libc::write(1, (&raw const failed).cast(), 4);
        let mut written = 0;
        while written < length {
            let wrote = libc::write(1, value.as_ptr().add(written as usize).cast(), (length - written) as usize);
            if wrote <= 0 {
                break;
            }
            written += wrote;
        }
        libc::_exit(0)
    }
}

/// Words at the beginning of a file in memory, which every process that maps them sees change.
#[derive(Debug)]
pub(crate) struct SharedWords {
    at: NonNull<libc::c_void>,
    words: usize,
}

// SAFETY: the mapping stays as long as the value does, belongs to no thread, and is only reached through atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of `file`, which must be that long and must never be cut.
    pub(crate) fn map(file: &impl AsFd, words: usize) -> io::Result<SharedWords> {
        let length = words * size_of::<AtomicU64>();
        if nix::sys::stat::fstat(file)?.st_size < length as libc::off_t {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (access, number) = (libc::PROT_READ | libc::PROT_WRITE, file.as_fd().as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses; the result is checked.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, number, 0) };
        match NonNull::new(at).filter(|at| at.as_ptr() != libc::MAP_FAILED) {
            Some(at) => Ok(SharedWords { at, words }),
            None => Err(io::Error::last_os_error()),
        }
    }

    /// The words.
    pub(crate) fn get(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned and as long as that; every bit pattern is a word.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast::<AtomicU64>(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and no reference outlives `self`.
        unsafe {
            libc::munmap(self.at.as_ptr(), self.words * size_of::<AtomicU64>());
        }
    }
}

/// Puts what `file` is in the place of the open descriptor `number`, which somebody else owns and goes on using: calls
/// that begin from now on concern `file`.
pub(crate) fn put_in_place(file: &impl AsFd, number: RawFd) -> io::Result<()> {
    // SAFETY: the number stays open and owned by whoever owns it; what it meant before is closed by the kernel.
    check(unsafe { libc::dup3(file.as_fd().as_raw_fd(), number, libc::O_CLOEXEC) })
}

/// Magic number of the ioctls of `/dev/fuse`. (include/uapi/linux/fuse.h)
const FUSE_MAGIC: u8 = 229;

mod ioctls {
    use super::FUSE_MAGIC;
    nix::ioctl_read!(fuse_clone, FUSE_MAGIC, 0, u32);
    nix::ioctl_write_ptr!(fuse_backing_close, FUSE_MAGIC, 2, u32);
}

/// A descriptor of its own for the connection of `device`: requests that were read through it end with it.
pub(crate) fn clone_fuse_device(device: &impl AsFd) -> io::Result<OwnedFd> {
    let clone = std::fs::File::options().read(true).write(true).open("/dev/fuse")?;
    let mut number = device.as_fd().as_raw_fd() as u32;
    // SAFETY: both are open, and the ioctl reads one word.
    unsafe { ioctls::fuse_clone(clone.as_raw_fd(), &mut number) }?;
    Ok(clone.into())
}

/// Lets go of a file that the kernel reads by itself under number `id`. One that it does not have is no error.
pub(crate) fn close_backing(device: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the ioctl reads one word.
    match unsafe { ioctls::fuse_backing_close(device.as_raw_fd(), &id) } {
        Ok(_) | Err(nix::Error::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Answers an open with passthrough to the file that the kernel has under number `id`, and leaves the number open.
pub(crate) fn reply_passthrough(reply: ReplyOpen, handle: FileHandle, id: u32) {
    // SAFETY: the number is open and of this connection; it is not closed here, because `into_raw` gives it back.
    let backing = unsafe { reply.wrap_backing(id) };
    reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
    let _ = backing.into_raw();
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
    ///
    /// It lets go of FUSE devices before `exec`: what it executes may be in a file system that this process serves, and if
    /// this process is killed just then, the kernel ends the child's question only when nobody has the device any more.
    pub fn prepare(&self, command: &mut Command) -> io::Result<()> {
        let parent = std::process::id();
        let highest = highest_descriptor()?;
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
                close_fuse_devices(highest);
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

/// The highest number of an open descriptor, and some more for those that other threads open meanwhile.
fn highest_descriptor() -> io::Result<RawFd> {
    let open = std::fs::read_dir("/proc/self/fd")?;
    let numbers = open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    Ok(numbers.max().unwrap_or(2) + 64)
}

/// Closes every descriptor of `/dev/fuse` (character device 10:229) up to number `highest`.
///
/// # Safety
/// Only called between `fork` and `exec`, where nobody else uses them.
unsafe fn close_fuse_devices(highest: RawFd) {
    for number in 3..=highest {
        // SAFETY: `about` is as large as the kernel expects; zeros are a valid value of it.
        unsafe {
            let mut about: libc::stat = std::mem::zeroed();
            let is_device = libc::fstat(number, &mut about) == 0 && about.st_mode & libc::S_IFMT == libc::S_IFCHR;
            if is_device && about.st_rdev == libc::makedev(10, 229) {
                libc::close(number);
            }
        }
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
unsafe fn write_once(path: &CStr, bytes: &[u8]) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a child executes may be in a file system that its parent serves. If the parent is killed before `exec`, nobody
    /// but the child itself would keep the kernel from ending its question.
    #[test]
    fn a_child_lets_go_of_fuse_devices_before_it_executes_anything() {
        let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/fuse") else {
            eprintln!("skipped: /dev/fuse cannot be opened here");
            return;
        };
        // One that `exec` would keep.
        let kept = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty());
        nix::fcntl::fcntl(&device, kept).unwrap();
        let open = |command: &mut Command| {
            let output = command.args(["-c", "ls -l /proc/$$/fd"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().contains("/dev/fuse")
        };
        assert!(open(&mut Command::new("sh")), "without it a child has the device");
        let mut command = Command::new("sh");
        Child::default().prepare(&mut command).unwrap();
        assert!(!open(&mut command));
    }
}
