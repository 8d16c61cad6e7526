//! A worker without privilege, and what its supervisor does for it.
//!
//! ```text
//! worker (an ordinary user)                          supervisor (root)
//!   a file, opened for reading   -- Help ---------->  looks at it, tells the kernel (CAP_SYS_ADMIN)
//!   its number                   <-- Helped --------
//! ```
//!
//! The worker reads everything that others may have written: stores, catalogs, packs, paths. As root, a fault there would
//! be the machine's. As an ordinary user it is what that user may do, and what can be asked of the supervisor:
//!
//! - that the kernel reads a file of its by itself (passthrough). The kernel opens such a file with the rights of who asked
//!   for it, so the supervisor takes none but regular files that the worker has open for reading, and nothing else of them;
//! - that such a file is let go of; a number is of this connection alone;
//! - the mountinfo of a thread, where `/proc` hides other users' processes (`hidepid`); elsewhere everybody may read it.
//!
//! **Nobody waits for the supervisor for long**: it may be starting another worker. A question that is not answered in
//! time counts as refused, nothing more is asked until its answer has come, and what that gives is given back.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::BackingId;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use super::wire::{FromWorker, Socket};
use crate::error::{Error, IoContext, Kind, Result};
use crate::sys;
use crate::view::mountinfo::Elsewhere;

/// How long a worker waits for its supervisor.
const LIMIT: Duration = Duration::from_secs(1);
/// Files that the kernel may read by itself at a time, for one worker; more than it may have handles.
const BACKINGS_MAX: usize = 1 << 18;

/// What a worker asks of its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::mount) enum Favour {
    /// A number for the file that comes along, under which the kernel reads it by itself.
    OpenBacking,
    /// That the file with this number is let go of.
    CloseBacking(u32),
    /// The mountinfo of this thread, as a file that comes along with the answer.
    Mountinfo(u32),
}

/// What comes of it: a number, where that is asked for, or an errno.
pub(in crate::mount) type Outcome = std::result::Result<u32, i32>;

/// What a supervisor has done for its worker.
#[derive(Debug, Default)]
pub(super) struct Favours {
    /// Files that the kernel reads by itself.
    backings: HashSet<u32>,
}

impl Favours {
    /// Does `favour` on the connection `device`, as far as it may be done.
    pub(super) fn grant(
        &mut self,
        device: &OwnedFd,
        favour: Favour,
        mut with: Vec<OwnedFd>,
    ) -> (Outcome, Option<OwnedFd>) {
        let errno = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        match favour {
            Favour::OpenBacking if self.backings.len() >= BACKINGS_MAX => (Err(libc::ENFILE), None),
            Favour::OpenBacking => {
                let file = with.pop().ok_or(libc::EBADF).and_then(may_be_read);
                let number = file.and_then(|file| BackingId::create_raw(device, file).map_err(errno));
                self.backings.extend(number);
                (number, None)
            }
            Favour::CloseBacking(number) => {
                self.backings.remove(&number);
                (sys::close_backing(device.as_fd(), number).map(|()| 0).map_err(errno), None)
            }
            Favour::Mountinfo(tid) => match File::open(format!("/proc/{tid}/mountinfo")) {
                Ok(file) => (Ok(0), Some(file.into())),
                Err(error) => (Err(errno(error)), None),
            },
        }
    }
}

/// `file`, where it is a regular one, and whoever passed it on may read it and has it for nothing else.
fn may_be_read(file: OwnedFd) -> std::result::Result<OwnedFd, i32> {
    // One that was opened by its path alone needed no permission to read.
    let reads = access(&file).is_ok_and(|access| access == OFlag::O_RDONLY);
    let meta = File::from(file.try_clone().map_err(|_| libc::EMFILE)?).metadata();
    match meta.is_ok_and(|meta| meta.is_file()) && reads {
        true => Ok(file),
        false => Err(libc::EINVAL),
    }
}

/// What `file` is open for.
fn access(file: &impl AsFd) -> nix::Result<OFlag> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    Ok(flags & (OFlag::O_ACCMODE | OFlag::O_PATH))
}

/// A worker's way to ask.
#[derive(Debug)]
pub(in crate::mount) struct Helper {
    control: Arc<Socket>,
    /// One asks at a time.
    turn: Mutex<()>,
    asked: Mutex<Asked>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct Asked {
    /// Of the last question.
    number: u64,
    answer: Option<(Outcome, Vec<OwnedFd>)>,
    /// The last question was given up, and has no answer yet.
    late: Option<Favour>,
    /// Files that were opened for nobody.
    strays: Vec<u32>,
    /// Nobody is there any more.
    gone: bool,
}

impl Helper {
    pub(super) fn new(control: Arc<Socket>) -> Helper {
        Helper { control, turn: Mutex::default(), asked: Mutex::default(), answered: Condvar::new() }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and waits for the answer, no longer than [`LIMIT`].
    ///
    /// # Errors
    /// [`is_for_now`] for what may be had later.
    fn ask(&self, favour: Favour, with: Option<&File>) -> io::Result<(u32, Option<OwnedFd>)> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let number = {
            let mut asked = self.asked();
            if asked.gone || asked.late.is_some() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            asked.number += 1;
            asked.answer = None;
            asked.number
        };
        let with: Vec<_> = with.iter().map(|file| file.as_fd()).collect();
        self.control.send(&FromWorker::Help { number, favour }, &with)?;
        let waits = |asked: &mut Asked| asked.answer.is_none() && !asked.gone;
        let waited = self.answered.wait_timeout_while(self.asked(), LIMIT, waits);
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match asked.answer.take() {
            Some((Ok(number), mut with)) => Ok((number, with.pop())),
            Some((Err(errno), _)) => Err(io::Error::from_raw_os_error(errno)),
            None => {
                asked.late = Some(favour);
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    /// Takes an answer in.
    pub(super) fn answer(&self, number: u64, outcome: Outcome, with: Vec<OwnedFd>) {
        let mut asked = self.asked();
        if number != asked.number {
            return;
        }
        match asked.late.take() {
            Some(Favour::OpenBacking) => asked.strays.extend(outcome),
            Some(_) => {}
            None => {
                asked.answer = Some((outcome, with));
                self.answered.notify_all();
            }
        }
    }

    /// The supervisor is gone.
    pub(super) fn is_alone(&self) {
        self.asked().gone = true;
        self.answered.notify_all();
    }

    /// The number under which the kernel reads `file` by itself.
    pub(in crate::mount) fn open_backing(&self, file: &File) -> io::Result<u32> {
        // The cache has its files open to write to them, too, and the supervisor takes none of that sort.
        let again = match access(file)? == OFlag::O_RDONLY {
            true => None,
            false => Some(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?),
        };
        self.ask(Favour::OpenBacking, Some(again.as_ref().unwrap_or(file))).map(|(number, _)| number)
    }

    pub(in crate::mount) fn close_backing(&self, number: u32) -> io::Result<()> {
        self.ask(Favour::CloseBacking(number), None).map(drop)
    }

    /// Files that were opened for nobody, because the answer came too late.
    pub(in crate::mount) fn take_strays(&self) -> Vec<u32> {
        std::mem::take(&mut self.asked().strays)
    }
}

impl Elsewhere for Helper {
    fn mountinfo(&self, tid: u32) -> Option<File> {
        self.ask(Favour::Mountinfo(tid), None).ok().and_then(|(_, file)| file).map(File::from)
    }
}

/// True for a refusal that is none: the supervisor has no time now, or is gone.
pub(in crate::mount) fn is_for_now(error: &io::Error) -> bool {
    let late = [libc::EAGAIN, libc::EPIPE, libc::ECONNRESET, libc::ENOBUFS];
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error().is_some_and(|errno| late.contains(&errno))
}

/// The user called `name`, or of that number, as somebody without privilege.
///
/// # Errors
/// [`Kind::Usage`] when this machine knows none, or when it is root.
pub fn ordinary_user(name: &str) -> Result<User> {
    let found = match name.parse::<u32>() {
        Ok(number) => User::from_uid(Uid::from_raw(number)),
        Err(_) => User::from_name(name),
    };
    match found.at("looking for the user", name)? {
        None => Err(Error::new(Kind::Usage, format!("this machine knows no user {name:?}"))
            .hint("make one for it: useradd --system --no-create-home envfabric")),
        Some(user) if user.uid.is_root() => {
            Err(Error::new(Kind::Usage, "root is no ordinary user")
                .hint("name one, or leave --user out to serve as root"))
        }
        Some(user) => Ok(user),
    }
}

/// Makes this process one of `user`, for ever: with its groups, without capabilities, and whatever it executes stays so.
///
/// The kernel then lets no other process of the same user look into it, because it was root's before.
///
/// # Errors
/// Those of the system; then it must end.
pub fn become_user(user: &User) -> Result<()> {
    let name = CString::new(user.name.as_str()).map_err(|_| Error::new(Kind::Usage, "a user's name has a NUL"))?;
    let become_it = || -> nix::Result<()> {
        nix::unistd::initgroups(&name, user.gid)?;
        nix::unistd::setresgid(user.gid, user.gid, user.gid)?;
        nix::unistd::setresuid(user.uid, user.uid, user.uid)?;
        nix::sys::prctl::set_no_new_privs()
    };
    become_it().at("becoming user", &user.name)?;
    match nix::unistd::setuid(Uid::from_raw(0)) {
        Err(nix::Error::EPERM) => Ok(()),
        _ => Err(Error::new(Kind::Failed, format!("the privilege of root cannot be given up for {}", user.name))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::supervisor::wire::Came;
    use std::time::Instant;

    #[test]
    fn only_a_regular_file_that_is_open_for_reading_alone_is_passed_to_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "x").unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let open = |path: &std::path::Path, flags| {
            may_be_read(nix::fcntl::open(path, flags | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty()).unwrap())
        };
        assert!(open(&path, OFlag::O_RDONLY).is_ok());
        let fifo = dir.path().join("fifo");
        for (path, flags) in [
            (&path, OFlag::O_RDWR),
            (&path, OFlag::O_WRONLY),
            (&path, OFlag::O_PATH),
            (&fifo, OFlag::O_RDONLY | OFlag::O_NONBLOCK),
            (&dir.path().to_path_buf(), OFlag::O_RDONLY),
            (&"/dev/null".into(), OFlag::O_RDONLY),
        ] {
            assert_eq!(open(path, flags).err(), Some(libc::EINVAL), "{}: {flags:?}", path.display());
        }
    }

    #[test]
    fn a_question_that_is_not_answered_keeps_nobody_and_what_comes_too_late_is_given_back() {
        let (ours, theirs) = Socket::pair().unwrap();
        let helper = Helper::new(Arc::new(theirs));
        let file = File::open("/dev/null").unwrap();
        let begun = Instant::now();
        assert!(is_for_now(&helper.open_backing(&file).unwrap_err()));
        assert!(begun.elapsed() >= LIMIT);
        // Nothing more is asked until the answer has come.
        assert!(is_for_now(&helper.close_backing(3).unwrap_err()) && begun.elapsed() < LIMIT * 2);
        let next = || match ours.wait::<FromWorker>(Instant::now(), &[]).unwrap() {
            Came::Message(FromWorker::Help { number, favour }, with) => Some((number, favour, with.len())),
            _ => None,
        };
        assert_eq!((next(), next()), (Some((1, Favour::OpenBacking, 1)), None));
        helper.answer(7, Ok(9), vec![]);
        assert!(helper.take_strays().is_empty());
        helper.answer(1, Ok(5), vec![]);
        assert_eq!((helper.take_strays(), helper.take_strays()), (vec![5], vec![]));
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| helper.open_backing(&file));
            while helper.asked().number < 2 {
                std::thread::yield_now();
            }
            helper.answer(2, Ok(6), vec![]);
            assert_eq!(asks.join().unwrap().unwrap(), 6);
        });
        helper.is_alone();
        assert!(is_for_now(&helper.open_backing(&file).unwrap_err()));
    }

    #[test]
    fn root_is_no_ordinary_user() {
        for (name, says) in [("root", "ordinary"), ("0", "ordinary"), ("nobody-of-that-name", "knows no user")] {
            let error = ordinary_user(name).unwrap_err();
            assert!(error.kind() == Kind::Usage && error.to_string().contains(says), "{error}");
        }
        assert_eq!(ordinary_user("nobody").unwrap().name, "nobody");
    }
}
