//! What every call goes through: counted, perhaps hung, kept waiting, perhaps failed, answered.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use fuser::{INodeNo, Notifier, ReplyData, ReplyWrite};
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};

use crate::Options;
use crate::backing::{Backing, Result};
use crate::calls::{Call, Counts};
use crate::faults::{Faults, Outcome};
use crate::loopback::{LARGEST, refused};
use crate::nodes::{Node, OpenFile, Spot};
use crate::pace::{Pace, sleep_until};
use crate::reads::Reads;

/// What a call is about; its paths are wanted only while faults are set.
#[derive(Debug, Clone)]
pub(crate) enum About {
    Node(Arc<Node>),
    Spot(Spot),
    /// From, to.
    Spots(Spot, Spot),
    /// An inode, and the name that it gets.
    Link(Arc<Node>, Spot),
    File(Arc<OpenFile>),
}

impl About {
    fn paths(&self) -> Vec<String> {
        match self {
            About::Node(node) => vec![node.path()],
            About::Spot(spot) => vec![spot.path()],
            About::Spots(from, to) => vec![from.path(), to.path()],
            About::Link(node, to) => vec![node.path(), to.path()],
            About::File(file) => vec![file.path.to_string()],
        }
    }
}

/// The simulated NAS, without its connection to the kernel.
pub(crate) struct Server {
    pub(crate) backing: Backing,
    pub(crate) pace: Pace,
    pub(crate) faults: Arc<Faults>,
    pub(crate) counts: Counts,
    pub(crate) reads: Reads,
    /// To the kernel; there is one as soon as there is a session.
    pub(crate) notifier: OnceLock<Notifier>,
    /// Used again, the last first: it may still be in the processor's cache.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Server {
    pub(crate) fn new(backing: &Path, descriptors: NonZeroUsize, options: &Options) -> std::io::Result<Self> {
        Ok(Server {
            backing: Backing::open(backing, descriptors)?,
            pace: Pace::new(options.latency, options.bandwidth),
            faults: Arc::default(),
            counts: Counts::default(),
            reads: Reads::default(),
            notifier: OnceLock::new(),
            buffers: Mutex::default(),
        })
    }

    /// Does `work` when the call is due, unless a fault says otherwise, and passes on what came of it.
    pub(crate) fn call<T>(
        self: &Arc<Self>,
        call: Call,
        about: About,
        work: impl FnOnce(&Server) -> Result<T> + Send + 'static,
        answer: impl FnOnce(Result<T>) + Send + 'static,
    ) {
        let arrived = Instant::now();
        self.counts.arrived(call);
        let server = self.clone();
        let finish = move |outcome| {
            let result = match outcome {
                Outcome::Fail(errno) => Err(errno),
                _ => work(&server),
            };
            server.counts.answered();
            answer(result);
        };
        if let Some(place) = self.faults.place(call, || about.paths()) {
            return place.park(finish);
        }
        sleep_until(self.pace.due(arrived, 0));
        if let Some(place) = self.faults.place(call, || about.paths()) {
            return place.park(finish);
        }
        finish(self.faults.outcome(call, || about.paths()));
    }

    pub(crate) fn read(self: &Arc<Self>, file: Arc<OpenFile>, offset: u64, size: u32, reply: ReplyData) {
        let arrived = Instant::now();
        self.counts.arrived(Call::Read);
        let about = About::File(file.clone());
        let hung = |file: Arc<OpenFile>, reply: ReplyData| {
            let server = self.clone();
            move |outcome| {
                let mut buffer = server.take_buffer();
                let got = pread_at(&file, offset, size, &mut buffer);
                sleep_until(server.pace.due(Instant::now(), got.unwrap_or(0)));
                server.answer_read(&file, offset, got, buffer, outcome, reply);
            }
        };
        if let Some(place) = self.faults.place(Call::Read, || about.paths()) {
            return place.park(hung(file, reply));
        }
        // Before the waiting, of which it is a part.
        let mut buffer = self.take_buffer();
        let got = pread_at(&file, offset, size, &mut buffer);
        sleep_until(self.pace.due(arrived, got.unwrap_or(0)));
        if let Some(place) = self.faults.place(Call::Read, || about.paths()) {
            self.give_back(buffer);
            return place.park(hung(file, reply));
        }
        let outcome = self.faults.outcome(Call::Read, || about.paths());
        self.answer_read(&file, offset, got, buffer, outcome, reply);
    }

    fn answer_read(
        &self,
        file: &OpenFile,
        offset: u64,
        got: Result<usize>,
        mut buffer: Vec<u8>,
        outcome: Outcome,
        reply: ReplyData,
    ) {
        let got = match outcome {
            Outcome::Fail(errno) => Err(errno),
            Outcome::Truncated => got.map(|length| length / 2),
            Outcome::Flipped => got.inspect(|length| {
                if *length > 0
                    && let Some(byte) = buffer.get_mut(length / 2)
                {
                    *byte ^= 1;
                }
            }),
            Outcome::Well => got,
        };
        if file.cached && matches!(outcome, Outcome::Truncated | Outcome::Flipped) {
            // The kernel puts it into its cache; the next who opens the file gets it read anew.
            file.node.caches(None);
        }
        if let Ok(length) = got {
            self.counts.read(length);
            self.reads.note(&file.path, &file.reads, offset, length);
        }
        self.counts.answered();
        match got.map(|length| buffer.get(..length)) {
            Ok(Some(bytes)) => reply.data(bytes),
            Ok(None) => reply.error(fuser::Errno::EIO),
            Err(errno) => reply.error(refused(errno)),
        }
        self.give_back(buffer);
    }

    pub(crate) fn write(self: &Arc<Self>, file: Arc<OpenFile>, offset: u64, data: &[u8], reply: ReplyWrite) {
        let arrived = Instant::now();
        self.counts.arrived(Call::Write);
        let about = About::File(file.clone());
        let hung = |file: Arc<OpenFile>, reply: ReplyWrite| {
            let (server, data) = (self.clone(), data.to_vec());
            move |outcome| {
                sleep_until(server.pace.due(Instant::now(), data.len()));
                server.answer_write(&file, offset, &data, outcome, reply);
            }
        };
        if let Some(place) = self.faults.place(Call::Write, || about.paths()) {
            return place.park(hung(file, reply));
        }
        sleep_until(self.pace.due(arrived, data.len()));
        if let Some(place) = self.faults.place(Call::Write, || about.paths()) {
            return place.park(hung(file, reply));
        }
        self.answer_write(&file, offset, data, self.faults.outcome(Call::Write, || about.paths()), reply);
    }

    fn answer_write(&self, file: &OpenFile, offset: u64, data: &[u8], outcome: Outcome, reply: ReplyWrite) {
        let result = match outcome {
            Outcome::Fail(errno) => Err(errno),
            _ => i64::try_from(offset).map_err(|_| Errno::EFBIG).and_then(|offset| pwrite(&file.fd, data, offset)),
        };
        if let Ok(written) = result {
            self.counts.written(written);
        }
        self.counts.answered();
        match result {
            Ok(written) => reply.written(written as u32),
            Err(errno) => reply.error(refused(errno)),
        }
    }

    /// Has the kernel ask anew for the attributes of a file that is being opened, which is when an NFS client does.
    pub(crate) fn forget_attributes(&self, node: &Node) {
        if let Some(notifier) = self.notifier.get() {
            // A negative offset leaves the data alone: taking pages away would wait for those who read them.
            let _ = notifier.inval_inode(INodeNo(node.ino), -1, 0);
        }
    }

    /// Forgets what was counted and recorded.
    pub(crate) fn forget_counts(&self) {
        self.counts.reset();
        self.reads.reset();
    }

    /// Those who hang fail.
    pub(crate) fn abandon_hung(&self) {
        self.faults.abandon_hung();
    }

    /// Everybody fails from now on.
    pub(crate) fn close(&self) {
        self.faults.close();
    }

    fn take_buffer(&self) -> Vec<u8> {
        let used = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        used.unwrap_or_else(|| vec![0; LARGEST as usize])
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

fn pread_at(file: &OpenFile, offset: u64, size: u32, buffer: &mut [u8]) -> Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let length = buffer.len().min(size as usize);
    pread(&file.fd, &mut buffer[..length], offset)
}
