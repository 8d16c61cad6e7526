//! A simulated NAS: shows a local directory through FUSE as an NFS client would show an export, and breaks on command.
//!
//! ```text
//! simulated-nas BACKING MOUNT --control SOCKET [--latency 0.5ms] [--bandwidth 1GB/s] [--attr-ttl 3s]
//!
//! kernel -> session threads -> hung? -> latency, bandwidth -> hung? -> faults -> BACKING -> answer
//!                                |  parked: holds no thread, until `resume`
//! SOCKET -> one thread a connection: a command a line, answered by a line of JSON (module `control`)
//! ```
//!
//! What it has of an NFS client: every call costs a round trip, and round trips overlap; all transfers share one line;
//! attributes, names and misses are remembered for `--attr-ttl`; the data of a file stay cached from one open to the
//! next only when its time and size are the same, and opening refreshes its attributes (close-to-open consistency).
//!
//! What it has not: leases, locks that other clients see, calls that a signal interrupts, and `.nfs` files (who has an
//! unlinked file open reads it through the open descriptor). What it has besides: OPENDIR is a call of its own, a listing
//! ends with a call that returns nothing, and the first look at the attributes of a file after a READ costs a GETATTR,
//! because the kernel wants the new access time. The round trip through FUSE comes on top of the latency: 20 to 50 us.
//!
//! It prints `ready` on standard output when the mount answers, and ends when it is unmounted, or with SIGTERM or
//! SIGINT, which unmount it (lazily) and do not wait for anybody. What is then still open fails with ENOTCONN.

mod backing;
mod calls;
mod control;
mod faults;
mod loopback;
mod nodes;
mod pace;
mod reads;
mod server;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use fuser::{Config, Session, SessionACL};
use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::loopback::Loopback;
use crate::server::Server;

type Failure = Box<dyn Error + Send + Sync>;

/// Shows BACKING at MOUNT like an export of a NAS, with faults on command. Needs root.
#[derive(Debug, Parser)]
struct Options {
    /// The directory that plays the export: one file system, without mounts inside.
    backing: PathBuf,
    /// An existing directory.
    mount: PathBuf,
    /// What every call waits before it is answered: 0.5ms, 20us, 1s.
    #[arg(long, default_value = "0ms", value_parser = pace::duration)]
    latency: Duration,
    /// What all transfers share, in bytes a second: 1GB/s, 100MB/s, unlimited.
    #[arg(long, default_value = "unlimited", value_parser = pace::rate)]
    bandwidth: u64,
    /// How long the kernel may remember names, attributes and misses.
    #[arg(long, default_value = "3s", value_parser = pace::duration)]
    attr_ttl: Duration,
    /// Where to listen for commands; made anew.
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// How many latencies may overlap. Hung calls do not count.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// How many inodes are kept open, besides the files of clients. Default: half of what a process may have.
    #[arg(long)]
    descriptors: Option<NonZeroUsize>,
    /// End when standard input does: with the process that holds its other end.
    #[arg(long)]
    until_eof: bool,
    /// It never goes to the background; this says so.
    #[arg(long, default_value = "always", value_parser = ["always"])]
    foreground: String,
}

fn main() {
    let options = Options::parse();
    with_lazy_buffers();
    if let Err(error) = serve(&options) {
        eprintln!("simulated-nas: {error}");
        std::process::exit(1);
    }
}

/// Starts the program again, as the same process, with glibc told to map large blocks.
///
/// Each session thread has a buffer of 16 MiB for requests, of which it touches little. glibc would take most of them
/// from heaps and zero them: 200 MB and a tenth of a second for every NAS. That can only be told to it from outside.
fn with_lazy_buffers() {
    const THRESHOLD: &str = "MALLOC_MMAP_THRESHOLD_";
    if std::env::var_os(THRESHOLD).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        // Where that fails, it serves with more memory.
        let _ = Command::new(program).args(std::env::args_os().skip(1)).env(THRESHOLD, "4194304").exec();
    }
}

fn serve(options: &Options) -> Result<(), Failure> {
    let mount = options.mount.canonicalize().map_err(|error| about(&options.mount, error))?;
    let descriptors = raise_open_files();
    // Threads inherit it. With the usual 50 us, a latency of 500 us would be ten per cent late.
    nix::sys::prctl::set_timerslack(1_000)?;
    // The kernel applies the caller's.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());

    let descriptors = options.descriptors.unwrap_or(descriptors);
    let server = Server::new(&options.backing, descriptors, options).map_err(|error| about(&options.backing, error))?;
    let server = Arc::new(server);
    // Registered before mounting, so that none is lost.
    let signals = Signals::new([SIGTERM, SIGINT])?;
    let _ = fs::remove_file(&options.control);
    let listener = UnixListener::bind(&options.control).map_err(|error| about(&options.control, error))?;

    let device = attach(&mount)?;
    let end = Ending { mount, socket: options.control.clone(), server: server.clone() };
    let started = start(options, &end, device, listener, signals);
    let ended = started.and_then(|session| session.join().map_err(|_| Failure::from("the session panicked"))?);
    end.clean_up();
    ended
}

/// Serves the mount by threads, and says `ready` when it answers.
fn start(
    options: &Options,
    end: &Ending,
    device: File,
    listener: UnixListener,
    signals: Signals,
) -> Result<std::thread::JoinHandle<Result<(), Failure>>, Failure> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(usize::from(options.threads));
    config.clone_fd = true;
    let loopback = Loopback::new(end.server.clone(), options.attr_ttl);
    let session = Session::from_fd(loopback, device.into(), SessionACL::All, config)?;
    let _ = end.server.notifier.set(session.notifier());
    let session = std::thread::Builder::new().name("session".into()).spawn(move || match session.run() {
        // A request was just being read when the unmounting ended the connection.
        Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
        ended => Ok(ended?),
    })?;
    end.on_signal(signals)?;
    end.when_unmounted()?;
    if options.until_eof {
        end.on_end_of_input()?;
    }
    let dev = fs::metadata(&end.mount)?.dev();
    read_ahead(dev);
    end.server.forget_counts();
    control::listen(listener, end.server.clone())?;
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    Ok(session)
}

/// What has to be taken away at the end, whoever ends it.
#[derive(Clone)]
struct Ending {
    mount: PathBuf,
    socket: PathBuf,
    server: Arc<Server>,
}

impl Ending {
    fn on_signal(&self, mut signals: Signals) -> Result<(), Failure> {
        let end = self.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            if signals.forever().next().is_some() {
                end.now();
            }
        })?;
        Ok(())
    }

    fn on_end_of_input(&self) -> Result<(), Failure> {
        let end = self.clone();
        std::thread::Builder::new().name("input".into()).spawn(move || {
            let mut input = std::io::stdin();
            while input.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
            end.now();
        })?;
        Ok(())
    }

    /// Lets nobody hang on a mount that has no name any more: the kernel does not tell of a lazy unmount.
    fn when_unmounted(&self) -> Result<(), Failure> {
        let end = self.clone();
        let table = File::open("/proc/self/mountinfo")?;
        std::thread::Builder::new().name("mounts".into()).spawn(move || {
            while is_mounted(&end.mount) {
                // The kernel marks a change of the table as an exceptional condition.
                let mut fds = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
                if nix::poll::poll(&mut fds, PollTimeout::NONE).is_err_and(|error| error != nix::Error::EINTR) {
                    return;
                }
            }
            end.server.abandon_hung();
        })?;
        Ok(())
    }

    /// Ends the process. Depends on no session thread: they may all be waiting.
    fn now(&self) -> ! {
        // Whoever waits is answered first: unmounting may have to write what is mapped, and would wait for them.
        self.server.close();
        self.clean_up();
        std::process::exit(0)
    }

    fn clean_up(&self) {
        if is_mounted(&self.mount) {
            let _ = nix::mount::umount2(&self.mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        let _ = fs::remove_file(&self.socket);
    }
}

const SOURCE: &str = "simulated-nas";

fn attach(mount: &Path) -> Result<File, Failure> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={}",
        device.as_raw_fd(),
        loopback::LARGEST
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some(SOURCE), mount, Some("fuse.nas"), flags, Some(data.as_str()))
        .map_err(|errno| about(mount, errno.into()))?;
    Ok(device)
}

/// Asks the kernel's table, and not the file system, which may hang.
fn is_mounted(mount: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let escaped = mount.to_string_lossy().replace('\\', "\\134").replace(' ', "\\040");
    table.lines().any(|line| {
        line.split(' ').nth(4) == Some(&escaped)
            && line.split(" - ").nth(1).is_some_and(|end| end.split(' ').nth(1) == Some(SOURCE))
    })
}

/// Lets the kernel read ahead by as much as one call carries; INIT can only lower what it offers, which is 128 KiB.
fn read_ahead(dev: u64) {
    let (major, minor) = (nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    let kib = (loopback::LARGEST / 1024).to_string();
    // Without it reads are smaller, and right.
    let _ = fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), kib);
}

/// Raises the limit of open files; returns how many may name inodes: half, the others are for what clients open.
fn raise_open_files() -> NonZeroUsize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    NonZeroUsize::new(usize::try_from(limit / 2).unwrap_or(usize::MAX).min(1 << 16)).unwrap_or(NonZeroUsize::MIN)
}

fn about(path: &Path, error: std::io::Error) -> Failure {
    format!("{}: {error}", path.display()).into()
}
