//! Makes a mount and takes it away: the system calls, or `fusermount3` for an ordinary user.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::alive::{Alive, alive};
use super::table::{self, FS_TYPE, MountInfo};
use crate::error::{Error, IoContext, Kind, Result};

const DEVICE: &str = "/dev/fuse";
/// How long what is mounted may take to answer; another worker may just be starting.
const ANSWERS: Duration = Duration::from_secs(5);

/// True when this process mounts by itself.
pub(super) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Checks that a mount at `dir` can be made and is wanted; makes the directory where it is missing.
/// Returns it as the kernel will list it.
pub fn preflight(dir: &Path) -> Result<PathBuf> {
    if !Path::new(DEVICE).exists() {
        return Err(Error::new(Kind::Unsupported, format!("{DEVICE} is missing: this machine cannot mount FUSE"))
            .hint("run `modprobe fuse` as root; in a container give it --device /dev/fuse --cap-add SYS_ADMIN"));
    }
    if !is_root() {
        need_fusermount()?;
        // fusermount3 opens it as the user it works for.
        OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|error| {
            Error::io("opening", Path::new(DEVICE), error)
                .hint(format!("have root run `chmod 666 {DEVICE}` (udev usually does), or mount as root"))
        })?;
    }
    let shown = dir.display();
    let here = table::absolute(dir)?;
    // `pyvenv.cfg` names a directory below it on one line of UTF-8.
    if here.to_str().is_none_or(|path| path.contains(['\n', '\r'])) {
        return Err(Error::new(Kind::Invalid, format!("{:?} cannot be a mount point", here))
            .hint("no Python could start there: name a directory without line breaks, in UTF-8"));
    }
    if let Some(line) = table::on_top(&here)? {
        let ours = table::of_this_program(&line);
        let alive = if ours.is_some() { alive(&here, ANSWERS) } else { Alive::Answers };
        if alive == Alive::Silent {
            return Err(Error::new(Kind::Busy, format!("what is mounted at {shown} does not answer"))
                .hint("its process is stopped, or its store hangs; `envfabric doctor` tells more"));
        }
        if alive == Alive::Dead {
            return Err(Error::new(Kind::Busy, format!("the mount at {shown} is stale: its server is gone"))
                .hint(format!("run `envfabric umount {shown}` and mount again")));
        }
        return Err(match ours {
            Some(mount) => {
                Error::new(Kind::Busy, format!("{shown} is already mounted, with store {}", mount.store.display()))
                    .hint(format!("use it, or run `envfabric umount {shown}` first"))
            }
            None => Error::new(Kind::Busy, format!("another file system ({}) is mounted at {shown}", line.fs_type))
                .hint("name another directory"),
        });
    }
    match fs::metadata(&here) {
        Ok(meta) if !meta.is_dir() => {
            return Err(Error::new(Kind::Usage, format!("{shown} is not a directory")).hint("name a directory"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(&here).at("creating", &here)?,
        Err(error) => return Err(Error::io("looking at", &here, error)),
    }
    if let Some(entry) = fs::read_dir(&here).at("reading", &here)?.flatten().next() {
        let name = entry.file_name();
        return Err(Error::new(Kind::Usage, format!("{shown} is not empty: it has {name:?}"))
            .hint("name an empty directory: what is in it would be hidden by the mount"));
    }
    here.canonicalize().at("finding", &here)
}

/// Mounts at `dir`, which [`preflight`] has seen, and returns the connection to the kernel.
///
/// The kernel lists `source` (one of [`table`]) and the path of `store` as where it comes from.
pub(super) fn attach(dir: &Path, source: &str, store: &Path, allow_other: bool) -> Result<OwnedFd> {
    let mut source = OsString::from(source);
    source.push(store);
    if is_root() { attach_as_root(dir, &source, allow_other) } else { attach_as_user(dir, &source, allow_other) }
}

fn attach_as_root(dir: &Path, source: &OsStr, allow_other: bool) -> Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE).at("opening", DEVICE)?;
    let mut data = format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", device.as_raw_fd());
    if allow_other {
        data.push_str(",allow_other");
    }
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some(source), dir, Some(FS_TYPE), flags, Some(data.as_str())).map_err(|errno| {
        let error = Error::io("mounting at", dir, errno.into());
        match errno {
            nix::Error::EPERM => error.hint("a container needs --cap-add SYS_ADMIN and --device /dev/fuse to mount"),
            nix::Error::ENODEV => error.hint("this kernel has no FUSE: run `modprobe fuse`"),
            _ => error,
        }
    })?;
    Ok(device.into())
}

/// `fusermount3` mounts for us and sends the connection through a socket, which it gets as its standard input: so no
/// descriptor has to survive exec.
fn attach_as_user(dir: &Path, source: &OsStr, allow_other: bool) -> Result<OwnedFd> {
    let program = need_fusermount()?;
    let failed = |what: &str| {
        Error::new(Kind::Failed, format!("{} did not mount at {}: {what}", program.display(), dir.display()))
    };
    let (ours, theirs) = UnixStream::pair().at("making a socket for", &program)?;
    // Commas separate options; a backslash takes their meaning.
    let source = source.to_string_lossy().replace('\\', "\\\\").replace(',', "\\,");
    let mut options = format!("ro,nosuid,nodev,default_permissions,subtype=envfabric,fsname={source}");
    if allow_other {
        options.push_str(",allow_other");
    }
    let child = Command::new(&program)
        .args(["-o", &options, "--"])
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .at("starting", &program)?;
    let device = receive_descriptor(&ours);
    let output = child.wait_with_output().at("waiting for", &program)?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
    match device {
        Ok(Some(device)) if output.status.success() => Ok(device),
        _ if said.contains("user_allow_other") => Err(failed("other users may not be let in")
            .detail(said)
            .hint("leave --allow-other out, or have root put user_allow_other into /etc/fuse.conf")),
        _ => Err(failed(if said.is_empty() { "it said nothing" } else { "see what it said" })
            .detail(said)
            .hint("the directory must be yours; `envfabric doctor` looks for other causes")),
    }
}

fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0u8; 1];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(std::os::fd::RawFd);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part
            && let Some(descriptor) = descriptors.first()
        {
            return crate::sys::own(*descriptor).map(Some);
        }
    }
    Ok(None)
}

/// The set-user-id helper with which an ordinary user mounts: on `PATH`, or where it usually is.
pub fn fusermount() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/bin", "/usr/local/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join("fusermount3")).find(|p| p.is_file())
}

fn need_fusermount() -> Result<PathBuf> {
    fusermount().ok_or_else(|| {
        Error::new(Kind::Unsupported, "fusermount3 is missing: an ordinary user cannot mount without it")
            .hint("have root install it (Debian, Ubuntu: `apt install fuse3`), or mount as root")
    })
}

/// Takes the mount at `dir` away; lazily: at once from the tree of names, in full when nobody uses it any more.
pub(super) fn detach(dir: &Path, lazy: bool) -> nix::Result<()> {
    if is_root() {
        let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        return nix::mount::umount2(dir, flags | MntFlags::UMOUNT_NOFOLLOW);
    }
    let Some(program) = fusermount() else { return Err(nix::Error::ENOENT) };
    let mut command = Command::new(program);
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(dir).stdin(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("busy") => Err(nix::Error::EBUSY),
        Ok(output) => {
            tracing::debug!(said = %String::from_utf8_lossy(&output.stderr).trim(), "fusermount3 -u failed");
            Err(nix::Error::EPERM)
        }
        Err(_) => Err(nix::Error::EPERM),
    }
}

/// Unmounts what this program mounted at `dir`, or a stale mount of it.
///
/// # Errors
/// [`Kind::NotFound`] when nothing is mounted there; [`Kind::Usage`] when it is not a mount of ours; [`Kind::Busy`] when
/// it is in use and `lazy` is false: the message names up to five processes.
pub fn umount(dir: &Path, lazy: bool) -> Result<()> {
    let shown = dir.display();
    let here = table::absolute(dir)?;
    let Some(line) = table::on_top(&here)? else {
        return Err(Error::new(Kind::NotFound, format!("nothing is mounted at {shown}")));
    };
    let Some(mount) = table::of_this_program(&line) else {
        return Err(Error::new(
            Kind::Usage,
            format!("what is mounted at {shown} ({}) is not envfabric's", line.fs_type),
        )
        .hint("use umount(8) if you mean it"));
    };
    match detach(&here, lazy) {
        Ok(()) => Ok(()),
        Err(nix::Error::EBUSY) => Err(busy(&mount)),
        Err(errno) => Err(Error::io("unmounting", &here, errno.into())),
    }
}

/// [`Kind::Busy`] for a mount that is served here.
pub(super) fn busy_at(at: &crate::view::Mountpoint) -> Error {
    let lines = table::lines().unwrap_or_default();
    let line = lines.iter().rfind(|line| line.dev == at.dev && line.mount_point_path() == at.path);
    match line.and_then(table::of_this_program) {
        Some(mount) => busy(&mount),
        None => Error::new(Kind::Busy, format!("{} is in use", at.path.display())),
    }
}

fn busy(mount: &MountInfo) -> Error {
    let at = mount.mount_point.display();
    let users = table::users(mount, 6);
    let named: Vec<String> = users.iter().take(5).map(|user| format!("{} ({})", user.pid, user.command)).collect();
    let who = match (named.len(), users.len() > 5) {
        (0, _) => "something this user may not see, or another mount inside it".to_string(),
        (_, false) => named.join(", "),
        (_, true) => format!("{}, and more", named.join(", ")),
    };
    Error::new(Kind::Busy, format!("{at} is in use by {who}"))
        .hint(format!("end them, or run `envfabric umount --lazy {at}`: they keep what they have open"))
}

/// Raises the soft limit of open files to the hard one: catalogs, packs and blobs are kept open.
pub(super) fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // With the old limit things work, more slowly.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
