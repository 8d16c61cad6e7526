//! Mounts whose server is killed, hangs, is replaced, or cannot begin: nobody who uses them is to notice.
//!
//! `ENVFABRIC_TEST_KILLS` and `ENVFABRIC_TEST_REPLACEMENTS` make the two long tests as long as wanted.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;
mod supervised;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use nix::sys::signal::Signal;
use supervised::*;

fn number(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).ok().map_or(usual, |text| text.parse().expect("a number"))
}

/// Enough requests that something is always asked for and not answered yet.
const SLOW: &str = "delay=6";

#[test]
fn whoever_uses_a_mount_does_not_notice_that_its_worker_is_killed() {
    needs_mounts!();
    let kills = number("ENVFABRIC_TEST_KILLS", 25);
    let fixture = Fixture::new();
    let load = Load::publish(&fixture);
    let mount = Supervised::start(&fixture, "m", &["--threads=4"], &[("ENVFABRIC_FAULTS", SLOW)]);
    let before = mount.status();
    let memory = mount.resident(before.supervisor);
    let begun = Instant::now();
    let (done, longest) = load.run(&fixture, &mount, |progress| {
        for turn in 0..kills {
            // Something was done since the last time, by all; then at any moment.
            progress.wait_for_all(2);
            std::thread::sleep(Duration::from_micros(noise(2, turn + 1).iter().map(|byte| u64::from(*byte) * 60).sum()));
            mount.kill_worker(Signal::SIGKILL);
        }
        progress.wait_for_all(5);
    });
    let after = mount.status();
    eprintln!(
        "{kills} kills in {:.1} s, {done} operations, longest {:.2} s, {} requests in flight at {} kills, {after:?}",
        begun.elapsed().as_secs_f64(),
        longest.as_secs_f64(),
        after.in_flight,
        after.deaths_in_flight,
    );
    assert_eq!((after.deaths, after.hangs, after.poisoned, after.failures), (kills, 0, 0, 0));
    assert!(after.deaths_in_flight > 0, "the kills proved nothing: no request was in flight");
    assert_eq!(after.open_files, before.open_files, "descriptors of the supervisor");
    assert!(mount.resident(after.supervisor) < memory + (4 << 20), "memory of the supervisor");
    let worker = envfabric::mount::stats(&mount.dir).unwrap();
    assert!(worker.open_files < 200, "descriptors of the worker: {}", worker.open_files);
    mount.umount();
}

#[test]
fn other_programs_and_settings_take_turns_and_nobody_notices() {
    needs_mounts!();
    let times = number("ENVFABRIC_TEST_REPLACEMENTS", 8);
    let fixture = Fixture::new();
    let load = Load::publish(&fixture);
    let other = fixture.dir.path().join("envfabric-other");
    fs::copy(PROGRAM, &other).unwrap();
    for resend in [true, false] {
        let flags: &[&str] = if resend { &[] } else { &["--no-resend"] };
        let mount = Supervised::start(&fixture, &format!("m{resend}"), flags, &[("ENVFABRIC_FAULTS", SLOW)]);
        let before = mount.status();
        let (done, longest) = load.run(&fixture, &mount, |progress| {
            for turn in 0..times {
                progress.wait_for_all(2);
                let (program, threads) = if turn % 2 == 0 { (other.as_path(), "2") } else { (Path::new(PROGRAM), "4") };
                let output = mount.replace(program, &["--threads", threads]);
                assert!(output.status.success(), "{output:?}");
                let exe = fs::read_link(format!("/proc/{}/exe", mount.status().worker.unwrap())).unwrap();
                assert_eq!(exe, program.canonicalize().unwrap());
            }
            progress.wait_for_all(5);
        });
        let after = mount.status();
        eprintln!("{times} replacements, {done} operations, longest {:.2} s, {after:?}", longest.as_secs_f64());
        assert_eq!((after.replacements, after.deaths), (times, 0));
        assert_eq!(after.open_files, before.open_files, "descriptors of the supervisor");
        assert_eq!(after.resend, resend);
        mount.umount();
    }
}
