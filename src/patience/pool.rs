//! Threads for work that may take long: started when there is work, ended when there has been none for a while.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Threads of a mount's requests that wait. More requests queue.
const WAITERS_MAX: usize = 1024;
/// Threads that ask the store: as many calls may hang before others wait for one to end.
const STORE_THREADS_MAX: usize = 128;
/// Threads that bring what nobody waits for yet, and as many that unpack it.
const AHEAD_THREADS: usize = 4;
/// Questions that may queue for those; what comes then is not waited for at all.
const QUEUE_MAX: usize = 4096;
/// Threads of all of these at most.
pub const THREADS_MAX: usize = WAITERS_MAX + 2 * STORE_THREADS_MAX + 2 * AHEAD_THREADS;
/// They have small stacks: what they do is not deep, and there may be many.
const STACK: usize = 512 << 10;
/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(10);

/// Threads for work that may take long.
#[derive(Debug)]
pub struct Pool {
    /// Used for its blocking threads alone and never driven; there until dropped.
    runtime: Option<Runtime>,
}

impl Pool {
    fn new(name: &str, threads: usize, begin: fn()) -> Result<Pool> {
        let mut builder = Builder::new_current_thread();
        builder.on_thread_start(begin);
        builder.max_blocking_threads(threads).thread_stack_size(STACK).thread_keep_alive(IDLE).thread_name(name);
        let runtime = builder.build().map_err(|source| no_threads().with_source(source))?;
        Ok(Pool { runtime: Some(runtime) })
    }

    /// For requests that may wait.
    pub fn of_waiters() -> Result<Pool> {
        Pool::new("waiter", WAITERS_MAX, || ())
    }

    /// Has `work` done by one of the threads, as soon as one is free.
    pub fn run(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.handle().spawn_blocking(work);
        }
    }
}

impl Drop for Pool {
    /// Leaves threads that hang to themselves.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn no_threads() -> Error {
    Error::new(Kind::Failed, "no threads can be started to ask the store")
}

/// Threads that ask the store, with their questions that have not ended.
#[derive(Debug)]
pub(crate) struct StoreThreads {
    name: &'static str,
    most: usize,
    /// What each thread does first.
    begin: fn(),
    pool: OnceLock<Option<Pool>>,
    asked: AtomicUsize,
}

/// For names and documents.
pub(crate) static NAMES: StoreThreads = StoreThreads::new("store", STORE_THREADS_MAX, || ());

/// For bytes of objects: names that hang do not keep them waiting, nor they names.
pub(crate) static BYTES: StoreThreads = StoreThreads::new("fetch", STORE_THREADS_MAX, || ());

/// For bytes that nobody waits for yet: few, and they give way to all others.
pub(crate) static AHEAD: StoreThreads = StoreThreads::new("fetch-ahead", AHEAD_THREADS, sys::give_way);

/// For bytes that have come and that nobody waits for yet: these never hang, whatever becomes of the store.
pub(crate) static UNPACK: StoreThreads = StoreThreads::new("unpack", AHEAD_THREADS, sys::give_way);

/// Counts a question out, whatever became of it.
struct Asked(&'static StoreThreads);

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StoreThreads {
    const fn new(name: &'static str, most: usize, begin: fn()) -> Self {
        StoreThreads { name, most, begin, pool: OnceLock::new(), asked: AtomicUsize::new(0) }
    }

    /// Has `question` asked by one of the threads.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] when thousands hang already.
    pub(crate) fn ask(&'static self, question: impl FnOnce() + Send + 'static) -> Result<()> {
        let pool = self.pool.get_or_init(|| Pool::new(self.name, self.most, self.begin).ok());
        let pool = pool.as_ref().ok_or_else(no_threads)?;
        let before = self.asked.fetch_add(1, Ordering::Relaxed);
        let asked = Asked(self);
        if before >= self.most + QUEUE_MAX {
            return Err(Error::new(Kind::TimedOut, "too many questions to the store are without an answer"));
        }
        pool.run(move || {
            let _asked = asked;
            question();
        });
        Ok(())
    }
}
