//! Threads for work that may take long: started when there is work, ended when there has been none for a while.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Kind, Result};

/// Threads of a mount's requests that wait. More requests queue.
const WAITERS_MAX: usize = 1024;
/// Threads that ask the store: as many calls may hang before others wait for one to end.
const STORE_THREADS_MAX: usize = 128;
/// Questions that may queue for those; what comes then is not waited for at all.
const QUEUE_MAX: usize = 4096;
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
    fn new(name: &str, threads: usize) -> Result<Pool> {
        let mut builder = Builder::new_current_thread();
        builder.max_blocking_threads(threads).thread_stack_size(STACK).thread_keep_alive(IDLE).thread_name(name);
        let runtime = builder.build().map_err(|source| no_threads().with_source(source))?;
        Ok(Pool { runtime: Some(runtime) })
    }

    /// For requests that may wait.
    pub fn of_waiters() -> Result<Pool> {
        Pool::new("waiter", WAITERS_MAX)
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

/// Questions to the store that have not ended.
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// Counts one out, whatever became of it.
struct Asked;

impl Drop for Asked {
    fn drop(&mut self) {
        ASKED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Has `question` asked by one of the store threads of the process.
///
/// # Errors
/// [`Kind::TimedOut`] when thousands hang already.
pub(super) fn ask_store(question: impl FnOnce() + Send + 'static) -> Result<()> {
    static POOL: OnceLock<Option<Pool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| Pool::new("store", STORE_THREADS_MAX).ok()).as_ref().ok_or_else(no_threads)?;
    let before = ASKED.fetch_add(1, Ordering::Relaxed);
    let asked = Asked;
    if before >= STORE_THREADS_MAX + QUEUE_MAX {
        return Err(Error::new(Kind::TimedOut, "too many questions to the store are without an answer"));
    }
    pool.run(move || {
        let _asked = asked;
        question();
    });
    Ok(())
}
