//! What a cache has done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Upper bounds of the histogram's steps, in microseconds; the last step has none.
const STEPS: [u64; 12] = [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 250_000, 1_000_000, 4_000_000];

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counted since the cache was opened; one relaxed addition each.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
            latency: [AtomicU64; STEPS.len() + 1],
        }

        /// What a cache holds, and what it has done since it was opened.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct CacheStats {
            /// Its directory.
            pub dir: String,
            /// Bytes that it holds.
            pub held: u64,
            /// Bytes that it may hold.
            pub limit: u64,
            /// Bytes of the disk that it leaves free.
            pub keep_free: u64,
            /// Objects of which it holds something.
            pub objects: u64,
            $($(#[$doc])* pub $name: u64,)*
            /// How long the store took to answer.
            pub latency: Histogram,
        }

        impl Counters {
            pub(super) fn stats(&self) -> CacheStats {
                CacheStats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    latency: Histogram {
                        up_to_microseconds: STEPS.to_vec(),
                        counts: self.latency.iter().map(|n| n.load(Ordering::Relaxed)).collect(),
                    },
                    ..CacheStats::default()
                }
            }
        }
    };
}

counters! {
    /// Reads that found all their bytes here.
    hits,
    /// Reads that had to ask the store.
    misses,
    /// Bytes handed to readers.
    served_bytes,
    /// Requests to the store for bytes of objects.
    fetches,
    /// Bytes that came from the store, as they lie there.
    fetched_bytes,
    /// The same, unpacked.
    unpacked_bytes,
    /// Bytes compared with their digests.
    verified_bytes,
    /// Requests that were made again after an error, a short answer or wrong bytes.
    retries,
    /// Chunks that the store did not have right.
    corrupt_in_store,
    /// Chunks that lay here with wrong bytes and were fetched again.
    corrupt_in_cache,
    /// Bytes that were read again from the cache's disk and compared.
    scrubbed_bytes,
    /// Readers that were told that the store did not answer in time.
    timeouts,
    /// Chunks asked for before anybody read them.
    ahead,
    /// Of those, how many were read later.
    ahead_used,
    /// Chunks for which there was no room.
    not_kept,
    /// Objects removed to make room.
    evictions,
    /// Bytes freed by that.
    evicted_bytes,
}

impl Counters {
    pub(super) fn answered_after(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let step = STEPS.iter().position(|most| micros <= *most).unwrap_or(STEPS.len());
        self.latency[step].fetch_add(1, Ordering::Relaxed);
    }
}

/// How often something took how long.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper bound of each step but the last, which has none.
    pub up_to_microseconds: Vec<u64>,
    /// How many fell into each step.
    pub counts: Vec<u64>,
}
