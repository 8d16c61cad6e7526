//! Messages between a supervisor, its workers and who asks for a replacement: JSON, one a packet, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::privilege::{Favour, Outcome};
use crate::error::{Error, Kind};

/// The longest message, in bytes: what fits the usual buffer of a socket.
const MESSAGE_MAX: usize = 128 << 10;
/// The most descriptors that come with one.
const DESCRIPTORS_MAX: usize = 4;

/// What a supervisor tells a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::mount) enum ToWorker {
    /// Begin as worker `life` of the mount at `mount_point`. Comes with what is kept and a socket for INIT.
    Start {
        life: u64,
        mount_point: String,
        /// Ask to have requests sent again when a worker dies.
        resend: bool,
        /// What the connection has, where it is settled.
        passthrough: Option<bool>,
        /// Another worker serves: show that you could, and wait.
        rehearse: bool,
    },
    /// The rehearsal is over: begin in earnest, with the new socket that comes with it.
    Begin,
    /// Serve what is mounted with this device number. Comes with the connection.
    Serve { dev: (u32, u32) },
    /// Say that you serve: that no thread has been at one request for `stuck` milliseconds.
    Ping { number: u64, stuck: u64 },
    /// Let another worker have what only one can have (the cache).
    LetGo,
    /// Finish what you have read, read no more, and end.
    Drain,
    /// The answer to the request for help of that number.
    Helped { number: u64, outcome: Outcome },
}

/// What a worker tells its supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::mount) enum FromWorker {
    /// Everything is open; the socket for INIT is listened to.
    Prepared { store: String, store_id: String, threads: usize, allow_other: bool, version: String },
    /// It cannot serve, and ends.
    Failed(Failure),
    /// It serves.
    Serving,
    /// The answer to the ping of that number.
    Pong(u64),
    /// What only one can have is free.
    HasLetGo,
    /// It was asked by a signal to end the mount.
    Unmount,
    /// The connection has ended.
    Ended,
    /// Something is asked for that needs the supervisor's privilege.
    Help { number: u64, favour: Favour },
}

/// An error on its way to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::mount) struct Failure {
    message: String,
    detail: Option<String>,
    hint: Option<String>,
    exit_code: u8,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Failure {
            message: error.chain(),
            detail: error.detail_text().map(String::from),
            hint: error.hint_text().map(String::from),
            exit_code: error.kind().exit_code(),
        }
    }
}

impl Failure {
    /// The error, of a kind that ends a program in the same way.
    pub(in crate::mount) fn into_error(self) -> Error {
        let kind = if self.exit_code == Kind::Usage.exit_code() { Kind::Usage } else { Kind::Failed };
        let error = Error::new(kind, self.message);
        let error = self.detail.into_iter().fold(error, Error::detail);
        self.hint.into_iter().fold(error, Error::hint)
    }
}

/// What came.
#[derive(Debug)]
pub(in crate::mount) enum Came<T> {
    Message(T, Vec<OwnedFd>),
    /// The other end is closed.
    Closed,
    /// Nothing within the time, or something else happened.
    Nothing,
}

/// An end of a connection.
#[derive(Debug)]
pub(in crate::mount) struct Socket(OwnedFd);

impl Socket {
    /// Two ends.
    pub(in crate::mount) fn pair() -> io::Result<(Socket, Socket)> {
        let (a, b) = packets()?;
        Ok((Socket(a), Socket(b)))
    }

    /// What is known to be one.
    pub(in crate::mount) fn new(descriptor: OwnedFd) -> Socket {
        Socket(descriptor)
    }

    pub(in crate::mount) fn into_inner(self) -> OwnedFd {
        self.0
    }

    /// Sends `message`, and waits for nobody.
    pub(in crate::mount) fn send(&self, message: &impl Serialize, with: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MESSAGE_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let numbers: Vec<RawFd> = with.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None)?;
        Ok(())
    }

    /// The next message, if there is one now.
    ///
    /// # Errors
    /// Also for one that cannot be understood.
    pub(in crate::mount) fn receive<T: DeserializeOwned>(&self) -> io::Result<Came<T>> {
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(Came::Nothing),
            Err(nix::Error::ECONNRESET | nix::Error::EPIPE) => return Ok(Came::Closed),
            Err(errno) => return Err(errno.into()),
        };
        let mut with = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                for number in numbers {
                    with.push(crate::sys::own(number)?);
                }
            }
        }
        let length = message.bytes;
        match length {
            0 => Ok(Came::Closed),
            _ => Ok(Came::Message(serde_json::from_slice(&bytes[..length])?, with)),
        }
    }

    /// The next message, waited for until `end`, or until something is to be read from `or`.
    pub(in crate::mount) fn wait<T: DeserializeOwned>(
        &self,
        end: Instant,
        or: &[BorrowedFd<'_>],
    ) -> io::Result<Came<T>> {
        loop {
            let here: Vec<_> = std::iter::once(self.0.as_fd()).chain(or.iter().copied()).collect();
            let readable = wait_for(&here, Some(end))?;
            if readable.first() == Some(&true) {
                match self.receive()? {
                    Came::Nothing => {}
                    came => return Ok(came),
                }
            } else if readable.contains(&true) || Instant::now() >= end {
                return Ok(Came::Nothing);
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Two ends of a connection that keeps packets apart.
pub(in crate::mount) fn packets() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Waits until one of `all` can be read, or is broken, or until `end`; which ones.
pub(in crate::mount) fn wait_for(all: &[BorrowedFd<'_>], end: Option<Instant>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = all.iter().map(|one| PollFd::new(*one, PollFlags::POLLIN)).collect();
    let timeout = match end {
        None => PollTimeout::NONE,
        // Rounded up, so that the end is not waited for in vain many times.
        Some(end) => {
            let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut polled, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(polled.iter().map(|one| one.revents().is_some_and(|found| !found.is_empty())).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn messages_come_whole_with_their_descriptors_and_nonsense_is_an_error() {
        let (a, b) = Socket::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        a.send(&ToWorker::Ping { number: 7, stuck: 1 }, &[null.as_fd(), null.as_fd()]).unwrap();
        a.send(&ToWorker::LetGo, &[]).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        let Came::Message(ToWorker::Ping { number: 7, .. }, with) = b.wait(end, &[]).unwrap() else { panic!() };
        assert_eq!(with.len(), 2);
        assert!(matches!(b.receive().unwrap(), Came::Message(ToWorker::LetGo, with) if with.is_empty()));
        assert!(matches!(b.receive::<ToWorker>().unwrap(), Came::Nothing));
        assert!(matches!(b.wait::<ToWorker>(Instant::now(), &[]).unwrap(), Came::Nothing));
        a.send(&"nonsense", &[]).unwrap();
        assert!(b.receive::<ToWorker>().is_err());
        assert!(a.send(&"x".repeat(MESSAGE_MAX), &[]).is_err());
        drop(a);
        assert!(matches!(b.wait::<ToWorker>(end, &[]).unwrap(), Came::Closed));
        assert!(b.send(&"x", &[]).is_err());
    }

    #[test]
    fn an_error_keeps_its_words_on_the_way() {
        let error = Error::new(Kind::Usage, "no").detail("more").hint("do");
        let again = Failure::from(&error).into_error();
        assert_eq!((again.kind(), again.chain()), (Kind::Usage, "no".into()));
        assert_eq!((again.detail_text(), again.hint_text()), (Some("more"), Some("do")));
    }
}
