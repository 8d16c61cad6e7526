//! INIT, which the kernel sends once in the life of a connection, and a few other packets of the FUSE protocol
//! (include/uapi/linux/fuse.h, version 7.41).
//!
//! The supervisor reads INIT from the kernel, hands it to the first worker, and keeps both it and the reply. Each later
//! worker is given the same request, on a socket, and must give the same reply.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv, send};

use super::wire::wait_for;
use crate::error::{Error, IoContext, Kind, Result};

const INIT: u32 = 26;
const GETATTR: u32 = 3;
const FORGET: u32 = 2;
const DESTROY: u32 = 38;
/// Bytes of the header of a request, and of a reply.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// The code of the notice that asks for requests to be sent again.
const NOTIFY_RESEND: i32 = 7;
/// The kernel reads no request into less. (FUSE_MIN_READ_BUFFER)
const READ_MIN: usize = 8192;
/// Numbers of requests that no kernel has sent.
const OWN: u64 = 1 << 62;

/// Flags of INIT, those above 32 in a word of their own.
const INIT_EXT: u64 = 1 << 30;
const PASSTHROUGH: u64 = 1 << 37;
const HAS_RESEND: u64 = 1 << 39;

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, |word| u64::from(u32::from_le_bytes(word)))
}

/// The flags of an INIT request or reply whose header is `header` bytes: the low word is at `flags` behind it, the high
/// word at `more`.
fn flags(packet: &[u8], header: usize, flags: usize, more: usize) -> u64 {
    let low = word(packet, header + flags);
    if low & INIT_EXT == 0 { low } else { low | word(packet, header + more) << 32 }
}

/// True when the kernel sends requests again on this connection.
pub(super) fn has_resend(reply: &[u8]) -> bool {
    flags(reply, OUT_HEADER, 12, 32) & HAS_RESEND != 0
}

/// True when the connection has passthrough.
pub(super) fn has_passthrough(reply: &[u8]) -> bool {
    flags(reply, OUT_HEADER, 12, 32) & PASSTHROUGH != 0
}

/// The INIT request of a connection that was just made.
pub(super) fn read_init(device: &OwnedFd) -> Result<Vec<u8>> {
    let mut packet = vec![0; READ_MIN.max(64 << 10)];
    let mut device = File::from(device.try_clone().at("reading from", "/dev/fuse")?);
    let length = device.read(&mut packet).at("reading from", "/dev/fuse")?;
    packet.truncate(length);
    if length < IN_HEADER || word(&packet, 4) != u64::from(INIT) {
        return Err(Error::new(Kind::Unsupported, "the kernel did not begin with INIT")
            .hint("this is no Linux that envfabric knows: tell its version"));
    }
    Ok(packet)
}

/// Answers the kernel.
pub(super) fn write_reply(device: &OwnedFd, reply: &[u8]) -> Result<()> {
    let mut device = File::from(device.try_clone().at("writing to", "/dev/fuse")?);
    device.write_all(reply).at("writing to", "/dev/fuse")
}

/// Asks the kernel to send everything again that was read and not answered.
pub(super) fn resend(device: &OwnedFd) -> io::Result<()> {
    let mut notice = Vec::with_capacity(OUT_HEADER);
    notice.extend_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    notice.extend_from_slice(&NOTIFY_RESEND.to_le_bytes());
    notice.extend_from_slice(&0u64.to_le_bytes());
    File::from(device.try_clone()?).write_all(&notice)
}

/// A request of our own with what follows its header.
fn request(opcode: u32, unique: u64, node: u64, rest: &[u8]) -> Vec<u8> {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let mut packet = Vec::with_capacity(IN_HEADER + rest.len());
    packet.extend_from_slice(&((IN_HEADER + rest.len()) as u32).to_le_bytes());
    packet.extend_from_slice(&opcode.to_le_bytes());
    packet.extend_from_slice(&unique.to_le_bytes());
    packet.extend_from_slice(&node.to_le_bytes());
    for number in [uid, gid, std::process::id(), 0] {
        packet.extend_from_slice(&number.to_le_bytes());
    }
    packet.extend_from_slice(rest);
    packet
}

/// The supervisor's end of a socket on which a worker believes to hear the kernel.
#[derive(Debug)]
pub(super) struct Stage(OwnedFd);

impl Stage {
    pub(super) fn new(end: OwnedFd) -> Self {
        Stage(end)
    }

    fn ask(&self, packet: &[u8], end: Instant) -> Result<Vec<u8>> {
        let what = "the worker's end of a socket";
        send(self.0.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).map_err(io::Error::from).at("writing to", what)?;
        let late = || Error::new(Kind::TimedOut, "a worker does not answer the requests that it must answer first");
        loop {
            if wait_for(&[self.0.as_fd()], Some(end)).at("waiting for", what)?.first() != Some(&true) {
                if Instant::now() >= end {
                    return Err(late());
                }
                continue;
            }
            let mut reply = vec![0; 64 << 10];
            let length = recv(self.0.as_raw_fd(), &mut reply, MsgFlags::empty());
            reply.truncate(length.map_err(io::Error::from).at("reading from", what)?);
            return if reply.is_empty() { Err(late()) } else { Ok(reply) };
        }
    }

    /// The worker's reply to INIT.
    pub(super) fn init(&self, request: &[u8], end: Instant) -> Result<Vec<u8>> {
        let reply = self.ask(request, end)?;
        match word(&reply, 4) {
            0 if reply.len() > OUT_HEADER => Ok(reply),
            _ => Err(Error::new(Kind::Failed, "a worker refuses to begin")),
        }
    }

    /// Sees that the worker answers questions about the root.
    pub(super) fn probe(&self, end: Instant) -> Result<()> {
        let reply = self.ask(&request(GETATTR, OWN, 1, &[0; 16]), end)?;
        match word(&reply, 4) as u32 as i32 {
            0 if reply.len() > OUT_HEADER => Ok(()),
            errno => {
                let error = io::Error::from_raw_os_error(errno.wrapping_neg());
                Err(Error::new(Kind::Failed, "a worker cannot show the root of the mount").with_source(error))
            }
        }
    }

    /// Wakes `threads` threads that wait here for a request, so that they see what has taken the place of the socket.
    pub(super) fn wake(&self, threads: usize) {
        // To forget an inode that is none needs no reply.
        self.tell(threads, &request(FORGET, OWN, 0, &0u64.to_le_bytes()));
    }

    /// Ends `threads` threads that wait here for a request.
    pub(super) fn end(&self, threads: usize) {
        self.tell(threads, &request(DESTROY, OWN, 0, &[]));
    }

    fn tell(&self, times: usize, packet: &[u8]) {
        for _ in 0..times {
            if send(self.0.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT).is_err() {
                return;
            }
        }
    }
}

/// What keeps a worker that has replied with `new` from going on with a connection for which `old` was agreed.
pub(super) fn differs(old: &[u8], new: &[u8]) -> Option<Error> {
    if old == new {
        return None;
    }
    let of = |reply: &[u8]| flags(reply, OUT_HEADER, 12, 32);
    let (old_flags, new_flags) = (of(old), of(new));
    let detail = match old_flags == new_flags {
        false => format!("agreed flags {old_flags:#x}, offered flags {new_flags:#x}"),
        true => "sizes or versions differ".into(),
    };
    let what = "the new worker would agree with the kernel on something else than what the mount was made with";
    Some(Error::new(Kind::Unsupported, what).detail(detail).hint("unmount and mount again to change to it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_from_both_words() {
        let mut reply = vec![0; 80];
        reply[OUT_HEADER + 12..][..4].copy_from_slice(&(INIT_EXT as u32 | 1).to_le_bytes());
        reply[OUT_HEADER + 32..][..4].copy_from_slice(&((HAS_RESEND >> 32) as u32).to_le_bytes());
        assert!(has_resend(&reply) && !has_passthrough(&reply));
        // Without the word that announces them, the others mean something else.
        reply[OUT_HEADER + 12..][..4].copy_from_slice(&1u32.to_le_bytes());
        assert!(!has_resend(&reply));
        for short in [&b""[..], b"x", &[0xff; 20], &[0xff; 44]] {
            let _ = (has_resend(short), has_passthrough(short));
        }
    }

    #[test]
    fn who_would_agree_on_something_else_is_refused() {
        let reply = vec![7; 80];
        assert!(differs(&reply, &reply).is_none());
        let mut other = reply.clone();
        other[OUT_HEADER + 12] ^= 1;
        let error = differs(&reply, &other).unwrap();
        assert!(error.kind() == Kind::Unsupported && error.detail_text().unwrap().contains("flags 0x"), "{error:?}");
        other = reply.clone();
        other[OUT_HEADER + 20] ^= 1;
        assert!(differs(&reply, &other).unwrap().detail_text().unwrap().contains("sizes"));
    }
}
