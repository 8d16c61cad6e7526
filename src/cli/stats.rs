//! `envfabric stats`

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;
use super::output::{bytes, table};
use crate::cache::{CacheStats, Histogram};
use crate::error::{Kind, Result};
use crate::mount;

/// Tell what a running mount has done
///
/// The mount is asked itself: requests by kind, files opened, bytes read, whether passthrough is used and if not why,
/// memory, how full its memories are, and what its cache holds and has spared the store. Requests are what the kernel
/// could not answer from its own memory.
#[derive(Debug, clap::Args)]
pub(crate) struct Stats {
    /// Mount point [default: as `mount`]
    dir: Option<PathBuf>,
}

impl Stats {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let dir = self.dir.as_deref().unwrap_or(&context.settings.mount);
        let stats = mount::stats(dir).map_err(|error| match super::mount::given_up(context, dir) {
            Some(words) if error.kind() == Kind::Failed => error.detail(words),
            _ => error,
        })?;
        context.out.result(&stats, |w| print(&stats, w))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn print(stats: &mount::Stats, w: &mut dyn Write) -> io::Result<()> {
    let passthrough = match &stats.passthrough.why_not {
        None => "used".to_string(),
        Some(why) => format!("not used: {why}"),
    };
    let facts = [
        ("mount", stats.mount_point.clone()),
        ("store", stats.store.clone()),
        ("passthrough", passthrough),
        ("process", format!("{}, envfabric {}, up {}", stats.pid, stats.envfabric, time(stats.up_seconds))),
        ("processor", format!("{:.2} s", stats.cpu_seconds)),
        (
            "memory",
            format!("{}, {}", bytes(stats.resident_bytes), of("open files", stats.open_files, stats.open_files_most)),
        ),
        (
            "session",
            format!(
                "{} of {}, FUSE protocol {}",
                stats.threads,
                of("threads", stats.process_threads, stats.process_threads_most),
                stats.protocol
            ),
        ),
    ];
    let hangs =
        stats.store_hangs.then(|| ("hangs", "the store does not answer; names are told from memory".to_string()));
    let keys = (!stats.trusted_keys.is_empty()).then(|| ("believes", stats.trusted_keys.join("\n")));
    let supervised = stats.supervised.map(|by| {
        let ended = match (by.deaths, by.poisoned) {
            (0, _) => String::new(),
            (deaths, 0) => format!(", {deaths} ended before"),
            (deaths, poisoned) => format!(", {deaths} ended before, {poisoned} requests given up"),
        };
        let who = match by.supervisor {
            0 => "gone: the mount ends with the process that serves it; unmount it, and mount again".to_string(),
            pid => format!("{pid}, has started {} to serve{ended}", by.workers),
        };
        ("supervisor", who)
    });
    let facts = facts.into_iter().chain(supervised).chain(hangs).chain(keys);
    let facts = facts.map(|(name, text)| vec![name.into(), text]).collect();
    write!(w, "{}", table(&["SERVED", ""], facts, &[]))?;

    let mut requests: Vec<_> = stats.requests.iter().filter(|(_, n)| **n > 0).collect();
    requests.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    let requests = requests.into_iter().map(|(name, n)| vec![name.clone(), n.to_string()]).collect();
    write!(w, "\n{}", table(&["REQUEST", "COUNT"], requests, &[1]))?;

    let opens = &stats.opens;
    let opens = [
        ("passthrough", opens.passthrough, "read straight from the store or the cache"),
        ("cached", opens.cached, "read through the process, kept by the kernel"),
        ("direct", opens.direct, "read through the process each time"),
    ];
    let opens = opens.map(|(name, n, what)| vec![name.into(), n.to_string(), what.into()]);
    write!(w, "\n{}", table(&["OPENED", "COUNT", ""], opens.into(), &[1]))?;
    writeln!(w, "{} read through the process", bytes(stats.bytes_read))?;

    let memories = stats.memories.iter();
    let memories = memories.map(|(name, m)| vec![name.clone(), m.held.to_string(), m.most.to_string()]).collect();
    write!(w, "\n{}", table(&["KEPT", "NOW", "AT MOST"], memories, &[1, 2]))?;

    let Some(cache) = &stats.cache else { return Ok(()) };
    let facts = cache_facts(cache).into_iter().map(|(name, text)| vec![name.into(), text]).collect();
    write!(w, "\n{}", table(&["CACHE", ""], facts, &[]))?;
    write!(w, "\n{}", table(&["STORE ANSWERED", "COUNT", ""], latencies(&cache.latency), &[1]))
}

/// `7 open files (at most 1024)`; what an older program does not tell is left out.
fn of(what: &str, now: u64, most: u64) -> String {
    if most == 0 { format!("{now} {what}") } else { format!("{now} {what} (at most {most})") }
}

fn cache_facts(cache: &CacheStats) -> Vec<(&'static str, String)> {
    let reads = cache.hits + cache.misses;
    let ratio = match reads {
        0 => String::new(),
        // Rounded down: a hundred means all.
        _ => format!(", {} % from here", u128::from(cache.hits) * 100 / u128::from(reads)),
    };
    vec![
        ("directory", cache.dir.clone()),
        ("holds", format!("{} of {}, {} objects", bytes(cache.held), bytes(cache.limit), cache.objects)),
        ("leaves free", bytes(cache.keep_free)),
        ("reads", format!("{} from here, {} asked the store{ratio}", cache.hits, cache.misses)),
        ("fetched", format!("{} in {} requests", bytes(cache.fetched_bytes), cache.fetches)),
        ("unpacked", bytes(cache.unpacked_bytes)),
        (
            "compared",
            format!("{}; read again and compared, {}", bytes(cache.verified_bytes), bytes(cache.scrubbed_bytes)),
        ),
        ("served", bytes(cache.served_bytes)),
        ("asked ahead", format!("{} chunks, {} of them read later", cache.ahead, cache.ahead_used)),
        ("not kept", format!("{} chunks, for which there was no room", cache.not_kept)),
        ("evicted", format!("{} objects, {}", cache.evictions, bytes(cache.evicted_bytes))),
        ("wrong bytes", format!("{} chunks in the store, {} here", cache.corrupt_in_store, cache.corrupt_in_cache)),
        ("store", format!("{} requests made again, {} readers gave up", cache.retries, cache.timeouts)),
    ]
}

/// Characters of the longest bar.
const BAR: u64 = 40;

/// A row for each step, from the first in which something fell to the last.
fn latencies(histogram: &Histogram) -> Vec<Vec<String>> {
    let most = histogram.counts.iter().copied().max().unwrap_or(0).max(1);
    let bounds = histogram.up_to_microseconds.iter().map(|most| format!("within {}", short_time(*most)));
    let bounds = bounds.chain(["later".to_string()]);
    let row = |(bound, count): (String, &u64)| {
        let bar = (u128::from(*count) * u128::from(BAR)).div_ceil(u128::from(most));
        (*count, vec![bound, count.to_string(), "#".repeat(usize::try_from(bar).unwrap_or(0))])
    };
    let rows: Vec<_> = bounds.zip(&histogram.counts).map(row).collect();
    let first = rows.iter().position(|(count, _)| *count > 0).unwrap_or(rows.len());
    let end = rows.iter().rposition(|(count, _)| *count > 0).map_or(first, |last| last + 1);
    rows.into_iter().take(end).skip(first).map(|(_, row)| row).collect()
}

/// Microseconds for people, `0.25 ms`.
fn short_time(micros: u64) -> String {
    match micros {
        1_000_000.. => format!("{} s", micros as f64 / 1e6),
        _ => format!("{} ms", micros as f64 / 1e3),
    }
}

/// A duration for people, in its two largest units.
fn time(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_told_in_two_units() {
        let table = [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3_660, "1 h 1 min"), (90_000, "1 d 1 h")];
        for (seconds, expected) in table {
            assert_eq!(time(seconds), expected);
        }
    }

    #[test]
    fn what_a_cache_has_done_is_told_in_lines_that_fit() {
        let cache = CacheStats {
            held: 3 << 30,
            limit: 20 << 30,
            hits: 1999,
            misses: 1,
            fetches: u64::MAX,
            fetched_bytes: u64::MAX,
            corrupt_in_store: u64::MAX,
            corrupt_in_cache: u64::MAX,
            ..CacheStats::default()
        };
        let facts = cache_facts(&cache);
        let fact = |name: &str| facts.iter().find(|(other, _)| *other == name).unwrap().1.as_str();
        assert_eq!(fact("holds"), "3.22 GB of 21.47 GB, 0 objects");
        assert_eq!(fact("reads"), "1999 from here, 1 asked the store, 99 % from here");
        assert!(facts.iter().all(|(_, text)| text.len() <= 80 - "asked ahead  ".len()), "{facts:?}");
        let reads = |hits, misses| cache_facts(&CacheStats { hits, misses, ..CacheStats::default() })[3].1.clone();
        assert_eq!(reads(0, 0), "0 from here, 0 asked the store");
        assert!(reads(7, 0).ends_with(", 100 % from here"));
    }

    #[test]
    fn how_long_the_store_took_is_a_row_for_each_step_in_use() {
        let histogram =
            |counts: &[u64]| Histogram { up_to_microseconds: vec![250, 2_000, 4_000_000], counts: counts.to_vec() };
        let rows = |counts: &[u64]| latencies(&histogram(counts)).iter().map(|row| row.join(" ")).collect::<Vec<_>>();
        let bar = |n: usize| "#".repeat(n);
        assert_eq!(rows(&[0, 0, 0, 0]), Vec::<String>::new());
        assert_eq!(rows(&[0, 100, 1, 0]), [format!("within 2 ms 100 {}", bar(40)), "within 4 s 1 #".into()]);
        assert_eq!(rows(&[5, 0, 0, 5]).first().unwrap(), &format!("within 0.25 ms 5 {}", bar(40)));
        assert_eq!(rows(&[5, 0, 0, u64::MAX]).last().unwrap(), &format!("later {} {}", u64::MAX, bar(40)));
    }
}
