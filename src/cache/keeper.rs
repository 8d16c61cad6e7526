//! A thread that writes down every few seconds what is known of the cache's files.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::{Inner, lock};
use crate::error::{IoContext, Result};

const EVERY: Duration = Duration::from_secs(5);

/// Ends the thread.
#[derive(Debug)]
pub(super) struct Keeper(Arc<(Mutex<bool>, Condvar)>);

impl Keeper {
    pub(super) fn start(inner: &Arc<Inner>) -> Result<Keeper> {
        let ended: Arc<(Mutex<bool>, Condvar)> = Arc::default();
        let (weak, told) = (Arc::downgrade(inner), ended.clone());
        let run = move || {
            while !wait(&told) {
                let Some(inner) = Weak::upgrade(&weak) else { return };
                inner.settle();
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
