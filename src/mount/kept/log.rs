//! A log of slots in the file that is kept.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{Flock, FlockArg};

use super::{Kept, LOG_MAX, Number};
use crate::error::{Error, IoContext, Kind, Result};
use crate::view::Log;

/// Bytes that are written become a record with the store of the log's new length.
#[derive(Debug)]
pub(super) struct SharedLog {
    kept: Arc<Kept>,
    number: u64,
    /// Opened by this process, so that its lock goes when the process does.
    own: Mutex<File>,
}

impl SharedLog {
    pub(super) fn open(kept: Arc<Kept>, number: u64) -> Result<SharedLog> {
        let path = format!("/proc/self/fd/{}", kept.file().as_raw_fd());
        let own = File::options().read(true).write(true).open(&path).at("opening", &path)?;
        Ok(SharedLog { kept, number, own: Mutex::new(own) })
    }

    fn length(&self) -> &AtomicU64 {
        &self.kept.words.get()[Number::Logs as usize + self.number as usize]
    }

    fn begin(&self) -> u64 {
        (self.number + 1) * LOG_MAX
    }
}

impl Log for SharedLog {
    fn read(&self, from: u64) -> Result<Vec<u8>> {
        let length = self.length().load(Ordering::Acquire).min(LOG_MAX);
        let mut bytes = vec![0; usize::try_from(length.saturating_sub(from)).unwrap_or(0)];
        self.kept.file().read_exact_at(&mut bytes, self.begin() + from).at("reading", "what is kept of a mount")?;
        Ok(bytes)
    }

    fn append(&self, length: u64, record: &[u8]) -> Result<bool> {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let again = own.try_clone().at("opening", "what is kept of a mount")?;
        let locked = Flock::lock(again, FlockArg::LockExclusive);
        let locked =
            locked.map_err(|(_, errno)| std::io::Error::from(errno)).at("locking", "what is kept of a mount")?;
        let fits = self.length().load(Ordering::Acquire) == length;
        if fits {
            let end = length + record.len() as u64;
            if end > LOG_MAX {
                return Err(Error::new(Kind::Unsupported, "this mount has shown too many names")
                    .hint("unmount and mount again"));
            }
            locked.write_all_at(record, self.begin() + length).at("writing", "what is kept of a mount")?;
            self.length().store(end, Ordering::Release);
        }
        Ok(fits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_appended_behind_what_others_have_written_or_not_at_all() {
        let kept = Arc::new(Kept::new().unwrap());
        let (a, b) = (SharedLog::open(kept.clone(), 0).unwrap(), SharedLog::open(kept.clone(), 0).unwrap());
        let other = SharedLog::open(kept, 1).unwrap();
        assert!(a.append(0, b"one").unwrap() && !b.append(0, b"two").unwrap() && b.append(3, b"two").unwrap());
        assert_eq!(
            (a.read(0).unwrap(), a.read(3).unwrap(), b.read(6).unwrap()),
            (b"onetwo".into(), b"two".into(), vec![])
        );
        assert_eq!(other.read(0).unwrap(), b"");
        // From many threads and descriptors at once, all is there, once.
        std::thread::scope(|scope| {
            for n in 0..4u8 {
                let log = if n % 2 == 0 { &a } else { &b };
                scope.spawn(move || {
                    for _ in 0..200 {
                        while !log.append(log.read(0).unwrap().len() as u64, &[n; 5]).unwrap() {}
                    }
                });
            }
        });
        let all = a.read(6).unwrap();
        assert_eq!(all.len(), 4 * 200 * 5);
        assert!(all.chunks(5).all(|record| record.iter().all(|byte| *byte == record[0])));
    }
}
