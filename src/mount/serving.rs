//! What every thread that answers the kernel needs, and the answers that take more than a question to the tree.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fuser::{Errno, FileHandle, FopenFlags, INodeNo, ReplyOpen};

use super::passthrough::{Mode, Passthrough};
use super::refresh::Refresher;
use super::replies::{Shown, Space, errno_of, ino, is_inside_version};
use super::shift::Shift;
use super::stats::{Counters, How};
use crate::error::{Error, IoContext, Kind, Result};
use crate::patience::{Flights, Pool};
use crate::sys;
use crate::view::{Opened, Tree};

/// How long the store may take to say how full it is; whoever asks that often asks it of every mount.
const SPACE: Duration = Duration::from_secs(1);

/// What every thread that answers needs.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) tree: Arc<Tree>,
    pub(super) refresher: Arc<Refresher>,
    pub(super) shown: Shown,
    /// Ask the kernel for passthrough.
    pub(super) try_passthrough: bool,
    pub(super) passthrough: Passthrough,
    pub(super) counters: Counters,
    /// Threads that answer.
    pub(super) threads: usize,
    /// Threads that may wait, where the store is distant.
    pub(super) waiters: Option<Pool>,
    pub(super) space: Spaces,
    pub(super) agreed: Agreed,
    pub(super) shift: Shift,
}

/// What a connection has, or is to have.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Agreed {
    /// Ask that requests be sent again when a worker has died, where the kernel can.
    pub(super) resend: bool,
    /// Whether it has passthrough; none: as it is wanted.
    pub(super) passthrough: Option<bool>,
}

/// How full a distant store is.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    asked: Flights<(), Space>,
    last: Mutex<Option<Space>>,
}

impl Serving {
    /// The errno of a failure, which is logged.
    pub(super) fn errno(&self, error: &Error) -> Errno {
        self.tree.tell(error);
        Errno::from_i32(errno_of(error))
    }

    pub(super) fn note_asked(&self, number: INodeNo) {
        if !is_inside_version(number) {
            self.refresher.note_asked();
        }
    }

    /// Answers an open, which the kernel calls `unique`.
    pub(super) fn opened(&self, number: INodeNo, unique: u64, opened: Opened, reply: ReplyOpen) {
        let kept = FopenFlags::FOPEN_KEEP_CACHE;
        match opened {
            Opened::ByReader => {
                self.counters.opened(How::Direct);
                reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
            }
            Opened::Lasting => {
                self.counters.opened(How::Cached);
                reply.opened(FileHandle(0), kept);
            }
            // Counted, because a passthrough handle must not be given beside another; and it stays in the cache meanwhile.
            Opened::Whole { file, size, held } => {
                let file = file.as_deref().filter(|_| self.try_passthrough).map(|file| (file, size));
                match self.passthrough.open(ino(number), file, held, unique) {
                    Mode::Cached(handle) => {
                        self.counters.opened(How::Cached);
                        reply.opened(handle, kept);
                    }
                    Mode::Passed(handle, backing) => {
                        self.counters.opened(How::Passthrough);
                        sys::reply_passthrough(reply, handle, backing);
                    }
                    Mode::None => reply.error(Errno::ENFILE),
                }
            }
        }
    }

    /// How full the store is; of a distant one that does not answer, what it said last.
    pub(super) fn space(&self) -> Result<Space> {
        let root = self.tree.store().root().to_path_buf();
        let ask = move || nix::sys::statvfs::statvfs(&root).at("looking at", &root).map(Space::from);
        if self.waiters.is_none() {
            return ask();
        }
        let last = || self.space.last.lock().unwrap_or_else(PoisonError::into_inner);
        if (self.space.asked.is_late(&()) || self.tree.is_cut_off())
            && let Some(space) = *last()
        {
            return Ok(space);
        }
        match self.space.asked.ask(&(), SPACE, ask) {
            Ok(now) => Ok(*last().insert(now.answer)),
            Err(error) if error.kind() == Kind::TimedOut => Ok(last().unwrap_or_default()),
            Err(error) => Err(error),
        }
    }
}
