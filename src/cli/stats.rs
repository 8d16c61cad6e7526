//! `envfabric stats`

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use super::Context;
use super::output::{bytes, table};
use crate::error::Result;
use crate::mount;

/// Tell what a running mount has done
///
/// The mount is asked itself: requests by kind, files opened, bytes read, whether passthrough is used and if not why,
/// memory, and how full its memories are. Requests are what the kernel could not answer from its own memory.
#[derive(Debug, clap::Args)]
pub(crate) struct Stats {
    /// Mount point [default: as `mount`]
    dir: Option<PathBuf>,
}

impl Stats {
    pub(crate) fn run(&self, context: &Context) -> Result<ExitCode> {
        let stats = mount::stats(self.dir.as_deref().unwrap_or(&context.settings.mount))?;
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
        ("memory", format!("{}, {} open files", bytes(stats.resident_bytes), stats.open_files)),
        ("session", format!("{} threads, FUSE protocol {}", stats.threads, stats.protocol)),
    ];
    write!(w, "{}", table(&["SERVED", ""], facts.map(|(name, text)| vec![name.into(), text]).into(), &[]))?;

    let mut requests: Vec<_> = stats.requests.iter().filter(|(_, n)| **n > 0).collect();
    requests.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    let requests = requests.into_iter().map(|(name, n)| vec![name.clone(), n.to_string()]).collect();
    write!(w, "\n{}", table(&["REQUEST", "COUNT"], requests, &[1]))?;

    let opens = &stats.opens;
    let opens = [
        ("passthrough", opens.passthrough, "read straight from the store"),
        ("cached", opens.cached, "read through the process, kept by the kernel"),
        ("direct", opens.direct, "read through the process each time"),
    ];
    let opens = opens.map(|(name, n, what)| vec![name.into(), n.to_string(), what.into()]);
    write!(w, "\n{}", table(&["OPENED", "COUNT", ""], opens.into(), &[1]))?;
    writeln!(w, "{} read through the process", bytes(stats.bytes_read))?;

    let memories = stats.memories.iter();
    let memories = memories.map(|(name, m)| vec![name.clone(), m.held.to_string(), m.most.to_string()]).collect();
    write!(w, "\n{}", table(&["KEPT", "NOW", "AT MOST"], memories, &[1, 2]))
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
}
