//! A thread that writes down every few seconds what is known of the cache's files, and compares some of them again.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::scrub::Scrub;
use super::{Inner, lock};
use crate::error::{IoContext, Result};

const EVERY: Duration = Duration::from_secs(5);

/// Ends the thread.
#[derive(Debug)]
pub(super) struct Keeper(Arc<(Mutex<bool>, Condvar)>);

impl Keeper {
    /// Compares about `scrub` bytes a second.
    pub(super) fn start(inner: &Arc<Inner>, scrub: u64) -> Result<Keeper> {
        let ended: Arc<(Mutex<bool>, Condvar)> = Arc::default();
        let (weak, told) = (Arc::downgrade(inner), ended.clone());
        let run = move || {
            let mut round = Scrub::default();
            while !wait(&told) {
                let Some(inner) = Weak::upgrade(&weak) else { return };
                inner.settle();
                round.go_on(&inner, scrub.saturating_mul(EVERY.as_secs()));
            }
        };
        std::thread::Builder::new().name("cache".into()).spawn(run).at("keeping", &inner.dir)?;
        Ok(Keeper(ended))
    }

    pub(super) fn end(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }
}

/// True when it is over.
fn wait((ended, told): &(Mutex<bool>, Condvar)) -> bool {
    let waited = told.wait_timeout_while(lock(ended), EVERY, |ended| !*ended);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}
