//! How long a call takes: a round trip each, which overlap, and one line which all transfers share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Latency and bandwidth, which may be changed while calls are under way.
#[derive(Debug)]
pub(crate) struct Pace {
    latency_ns: AtomicU64,
    /// Bytes a second; 0: unlimited.
    rate: AtomicU64,
    /// When the last byte of all transfers so far has passed the line.
    line_free: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(latency: Duration, rate: u64) -> Self {
        let pace =
            Pace { latency_ns: AtomicU64::new(0), rate: AtomicU64::new(rate), line_free: Mutex::new(Instant::now()) };
        pace.set_latency(latency);
        pace
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        self.latency_ns.store(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes a second; 0: unlimited.
    pub(crate) fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// When a call that came at `arrived` and carries `bytes` is to be answered. Takes its place on the line.
    pub(crate) fn due(&self, arrived: Instant, bytes: usize) -> Instant {
        let latency = Duration::from_nanos(self.latency_ns.load(Ordering::Relaxed));
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 || bytes == 0 {
            return arrived + latency;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut free = self.line_free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = (*free).max(arrived) + takes;
        *free + latency
    }
}

pub(crate) fn sleep_until(due: Instant) {
    let left = due.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

/// Parses `0.5ms`, `20us`, `3s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let scale = match unit {
        "ns" => 1e-9,
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "" if number == 0.0 => 1.0,
        _ => return Err(format!("{text:?} is not a time like 0.5ms, 20us or 3s")),
    };
    Duration::try_from_secs_f64(number * scale).map_err(|error| error.to_string())
}

/// Parses `1GB/s`, `100MiB/s` or `unlimited` to bytes a second; 0 is unlimited.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    if text == "unlimited" {
        return Ok(0);
    }
    let (number, unit) = split(text)?;
    let scale = match unit.strip_suffix("/s") {
        Some("B") => 1.0,
        Some("kB" | "KB") => 1e3,
        Some("MB") => 1e6,
        Some("GB") => 1e9,
        Some("KiB") => 1024.0,
        Some("MiB") => 1024.0 * 1024.0,
        Some("GiB") => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("{text:?} is not a bandwidth like 1GB/s, 100MiB/s or unlimited")),
    };
    match (number * scale) as u64 {
        0 => Err("a bandwidth of less than a byte a second: use `hang`".into()),
        rate => Ok(rate),
    }
}

fn split(text: &str) -> Result<(f64, &str), String> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    number.parse().map(|number| (number, unit)).map_err(|_| format!("{text:?} does not begin with a number"))
}
