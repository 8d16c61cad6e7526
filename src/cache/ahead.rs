//! How much is under way that nobody waits for yet.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock;

/// Counts requests ahead of readers.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    under_way: Mutex<usize>,
    ended: Condvar,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct UnderWay(Arc<Ahead>);

impl Ahead {
    pub(super) fn begin(self: &Arc<Self>) -> UnderWay {
        *lock(&self.under_way) += 1;
        UnderWay(self.clone())
    }

    /// Waits until fewer than `most` are under way; false when none has ended within `patience`.
    pub(super) fn wait_for_less_than(&self, most: usize, patience: Duration) -> bool {
        let mut under_way = lock(&self.under_way);
        while *under_way >= most {
            let waited = self.ended.wait_timeout(under_way, patience).unwrap_or_else(PoisonError::into_inner);
            under_way = waited.0;
            if waited.1.timed_out() && *under_way >= most {
                return false;
            }
        }
        true
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        *lock(&self.0.under_way) -= 1;
        self.0.ended.notify_all();
    }
}
