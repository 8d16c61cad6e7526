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
use std::process::Command;
use std::time::{Duration, Instant};

use common::*;
use envfabric::mount::umount;
use envfabric::store::Codec;
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
    // Files read in place; and through a cache, by threads that may wait.
    for codec in [Codec::Raw, Codec::Zstd] {
        use_while_workers_are_killed(&Fixture::with(codec), kills);
    }
}

fn use_while_workers_are_killed(fixture: &Fixture, kills: u64) {
    let load = Load::publish(fixture);
    let mount = Supervised::start(fixture, "m", &["--threads=4"], &[("ENVFABRIC_FAULTS", SLOW)]);
    let before = mount.status();
    let memory = mount.resident(before.supervisor);
    let begun = Instant::now();
    let (done, longest) = load.run(fixture, &mount, |progress| {
        for turn in 0..kills {
            // Something was done since the last time, by all; then at any moment.
            progress.wait_for_all(2);
            std::thread::sleep(Duration::from_micros(
                noise(2, turn + 1).iter().map(|byte| u64::from(*byte) * 60).sum(),
            ));
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

#[test]
fn a_worker_that_hangs_is_replaced_and_what_it_was_asked_is_answered() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let faults = [("ENVFABRIC_FAULTS", "hang-first=alpha-hangs")];
    let mount = Supervised::start(&fixture, "m", &["--watchdog=2s", "--threads=2"], &faults);
    let site = mount.dir.join("demo/a/.versions/1/.venv").join(SITE);
    let first = mount.status().worker.unwrap();
    // One thread is stuck in it; then the process as a whole is.
    assert_eq!(fs::metadata(site.join("alpha-hangs")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    mount.until_replaced(first);
    let second = mount.status().worker.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(second as i32), Signal::SIGSTOP).unwrap();
    assert_eq!(fs::read(site.join("alpha/data/small.bin")).unwrap(), noise(5_000, 101));
    mount.until_replaced(second);
    let status = mount.status();
    assert_eq!((status.hangs, status.deaths), (2, 2));
    let log = mount.log();
    assert!(log.contains("has not answered") && log.contains("fuser-0"), "the stacks of its threads are told: {log}");
    mount.umount();
}

#[test]
fn a_request_that_ends_three_workers_is_answered_with_an_error_and_others_are_not_disturbed() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let faults = [("ENVFABRIC_FAULTS", "panic=poison")];
    let mount = Supervised::start(&fixture, "m", &[], &faults);
    let site = mount.dir.join("demo/a/.versions/1/.venv").join(SITE);
    let held = fs::File::open(site.join("alpha/data/big.bin")).unwrap();
    for round in 1..=2 {
        let error = fs::metadata(site.join("poison")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let status = mount.status();
        assert_eq!((status.deaths, status.poisoned), (3 * round, round), "{status:?}");
        assert!(status.last_death.unwrap().contains("SIGABRT"));
        let mut bytes = vec![0; 700_000];
        held.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == noise(700_000, 100));
        assert!(fs::read(site.join("beta/data/big.bin")).unwrap() == noise(700_000, 200));
    }
    assert!(mount.log().contains("a request that ended several workers"), "{}", mount.log());
    drop(held);
    mount.umount();
}

#[test]
fn a_mount_that_nobody_can_serve_is_given_up_with_its_reason() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mount = Supervised::start(&fixture, "m", &["--restarts=2"], &[]);
    let open = fs::File::open(mount.dir.join("demo/a/.versions/1/.venv/bin/activate")).unwrap();
    let away = fixture.dir.path().join("away");
    fs::rename(fixture.store.root(), &away).unwrap();
    let worker = mount.status().worker.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
    assert_eq!(mount.ends().code(), Some(1));
    let log = mount.log();
    assert!(log.contains("is given up: 3 workers in a row have failed") && log.contains("there is no store"), "{log}");
    // Whoever uses it is told, and waits for nobody.
    let error = fs::metadata(&mount.dir).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    assert!(open.metadata().is_err() || open.read_at(&mut [0; 1], 0).is_ok());
    for verb in ["stats", "doctor"] {
        let mut command = mount.command(Path::new(PROGRAM));
        let output = command.arg(verb).env("ENVFABRIC_MOUNT", &mount.dir).output().unwrap();
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(output.status.code() == Some(1) && said.contains("3 workers in a row have failed"), "{verb}: {said}");
    }
    fs::rename(&away, fixture.store.root()).unwrap();
    let output = mount.command(Path::new(PROGRAM)).arg("mount").arg(&mount.dir).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(mount.dir.join("demo/a/.venv/bin/activate").exists());
    let output = mount.command(Path::new(PROGRAM)).arg("umount").arg(&mount.dir).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_replacement_that_cannot_serve_changes_nothing() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let cache = fixture.place("cache");
    let cache = format!("--cache={}", cache.display());
    let mount = Supervised::start(&fixture, "m", &[&cache], &[]);
    let site = mount.dir.join("demo/a/.versions/1/.venv").join(SITE);
    let held = fs::File::open(site.join("alpha/data/big.bin")).unwrap();
    let before = mount.status();
    let other = Fixture::new();
    let fails = |program: &Path, flags: &[&str], why: &str| {
        let output = mount.replace(program, flags);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why) && said.contains("hint: "), "{flags:?}: {said}");
    };
    let broken = fixture.dir.path().join("file");
    fs::write(&broken, "").unwrap();
    // What was agreed with the kernel at the beginning cannot be agreed on anew.
    let mut command = mount.command(Path::new(PROGRAM));
    command.args(["mount", "--replace", &cache]).arg(&mount.dir).env("ENVFABRIC_FAULTS", "disagree=1");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("would agree with the kernel on something else"), "{said}");
    fails(Path::new(PROGRAM), &[&cache, "--no-allow-other"], "who is let into a mount cannot change");
    fails(Path::new(PROGRAM), &[&format!("--cache={}/x", broken.display())], "Not a directory");
    fails(Path::new(PROGRAM), &[&cache, "--store", fixture.place("no store").to_str().unwrap()], "no store");
    fails(Path::new(PROGRAM), &[&cache, "--store", other.store.root().to_str().unwrap()], "another store");
    let after = mount.status();
    assert_eq!((before.worker, after.deaths, after.replacements), (after.worker, 0, 0));
    let mut bytes = vec![0; 700_000];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == noise(700_000, 100));

    // With what changes nothing of what was agreed, it works, and the cache goes along.
    let output = mount.replace(Path::new(PROGRAM), &[&cache, "--no-passthrough", "--threads=7"]);
    assert!(output.status.success(), "{output:?}");
    let stats = envfabric::mount::stats(&mount.dir).unwrap();
    assert_eq!((stats.threads, stats.passthrough.used), (7, false));
    assert!(cache.ends_with(&stats.cache.unwrap().dir));
    assert!(fs::read(site.join("beta/data/big.bin")).unwrap() == noise(700_000, 200));
    drop(held);
    mount.umount();
}

#[test]
fn where_nothing_is_sent_again_what_was_in_flight_fails_and_the_rest_works() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let faults = [("ENVFABRIC_FAULTS", "hang-first=stuck")];
    let mount = Supervised::start(&fixture, "m", &["--no-resend", "--threads=2"], &faults);
    let site = mount.dir.join("demo/a/.versions/1/.venv").join(SITE);
    let held = fs::File::open(site.join("alpha/data/big.bin")).unwrap();
    // By the directory itself, so that nothing else is looked up on the way.
    let inside = fs::File::open(&site).unwrap();
    let requests = || envfabric::mount::stats(&mount.dir).unwrap().requests["LOOKUP"];
    let before = requests();
    let stuck = format!("/proc/self/fd/{}/stuck", std::os::fd::AsRawFd::as_raw_fd(&inside));
    let waits = std::thread::spawn(move || fs::metadata(stuck).unwrap_err().raw_os_error());
    until("it is asked", || requests() > before);
    mount.kill_worker(Signal::SIGKILL);
    assert_eq!(waits.join().unwrap(), Some(libc::ECONNABORTED));
    let status = mount.status();
    assert_eq!((status.deaths, status.in_flight, status.resend), (1, 1, false));
    let mut bytes = vec![0; 700_000];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == noise(700_000, 100));
    assert!(fs::read(site.join("beta/data/big.bin")).unwrap() == noise(700_000, 200));
    drop((held, inside));
    mount.umount();
}

#[test]
fn a_signal_to_the_supervisor_or_the_worker_unmounts_and_who_uses_it_is_served_to_the_end() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    for (to_worker, signal) in [(false, Signal::SIGTERM), (false, Signal::SIGINT), (true, Signal::SIGTERM)] {
        let mount = Supervised::start(&fixture, "m", &[], &[]);
        let inside = fs::File::open(mount.dir.join("demo/a/.versions/1/.venv").join(SITE)).unwrap();
        let worker = mount.status().worker.unwrap();
        match to_worker {
            false => mount.signal(signal),
            true => nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), signal).unwrap(),
        }
        until("its name is taken away", || envfabric::mount::find(&mount.dir).unwrap().is_none());
        // Also when the worker ends meanwhile.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(worker as i32), Signal::SIGKILL).unwrap();
        let below = format!("/proc/self/fd/{}/gamma/data/small.bin", std::os::fd::AsRawFd::as_raw_fd(&inside));
        assert_eq!(fs::read(below).unwrap(), noise(5_000, 301));
        assert!(mount.child.lock().unwrap().try_wait().unwrap().is_none());
        drop(inside);
        assert!(mount.ends().success());
    }
    let mount = Supervised::start(&fixture, "m", &[], &[]);
    let inside = fs::File::open(mount.dir.join("demo")).unwrap();
    mount.signal(Signal::SIGTERM);
    until("its name is taken away", || envfabric::mount::find(&mount.dir).unwrap().is_none());
    mount.signal(Signal::SIGTERM);
    assert_eq!(mount.ends().code(), Some(130));
    drop(inside);
}

#[test]
fn a_mount_that_has_the_number_of_one_that_is_gone_is_asked_itself_as_soon_as_the_other_has_noticed() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    for _ in 0..50 {
        let first = Supervised::start(&fixture, "first", &[], &[]);
        let number = fs::metadata(&first.dir).unwrap().dev();
        // Its supervisor does not notice that it is gone, and still has the name of the number.
        first.signal(Signal::SIGSTOP);
        until("nobody uses it", || umount(&first.dir, false).is_ok());
        let second = Supervised::begin(&fixture, "second", &[], &[]);
        until("the second is ready", || second.log().contains("mounted at"));
        // Other tests mount too.
        if fs::metadata(&second.dir).unwrap().dev() != number {
            continue;
        }
        assert!(second.log().contains("another process has the socket"), "{}", second.log());
        first.signal(Signal::SIGCONT);
        let pid = second.child.lock().unwrap().id();
        until("the second is asked", || second.try_status().is_some_and(|status| status.supervisor == pid));
        assert!(first.ends().success(), "{}", first.log());
        let replaced = second.replace(Path::new(PROGRAM), &[]);
        assert!(replaced.status.success(), "{}", String::from_utf8_lossy(&replaced.stderr));
        return second.umount();
    }
    panic!("no mount has got the number of the one before");
}

#[test]
fn a_file_that_was_passed_through_is_let_go_of_by_whoever_serves_then() {
    needs_mounts!();
    let fixture = Fixture::new();
    // A file system of its own, on which can be seen whether something holds a file that has no name any more.
    let small = fixture.place("small");
    let made = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&small).status().unwrap();
    assert!(made.success());
    let _small = Unmounted(small.clone());
    let cache = format!("--cache={}", small.display());
    let content = noise(9_000_000, 42);
    fixture.publish("demo/a", vec![fixture.layer("big", vec![file(format!("{SITE}/big.so"), content.clone())])]);
    let mount = Supervised::start(&fixture, "m", &[&cache, "--cache-free=0B"], &[]);
    let path = mount.dir.join("demo/a/.versions/1/.venv").join(SITE).join("big.so");
    let passed = || envfabric::mount::stats(&mount.dir).unwrap().opens.passthrough;
    // Read once, so that all of it is there.
    until("it is all here", || {
        assert!(fs::read(&path).unwrap() == content);
        passed() > 0 || !envfabric::mount::stats(&mount.dir).unwrap().passthrough.used
    });
    if passed() == 0 {
        eprintln!("skipped: no passthrough here");
        return;
    }
    let mut held: Vec<fs::File> = Vec::new();
    for _ in 0..6 {
        held.extend((0..3).map(|_| fs::File::open(&path).unwrap()));
        mount.kill_worker(Signal::SIGKILL);
        held.truncate(held.len() - 2);
        for file in &held {
            let mut part = vec![0; 5000];
            file.read_exact_at(&mut part, 8_000_000).unwrap();
            assert!(part == content[8_000_000..8_005_000]);
        }
    }
    let used =
        || nix::sys::statvfs::statvfs(&small).map(|s| (s.blocks() - s.blocks_free()) * s.fragment_size()).unwrap();
    let full = used();
    for entry in walk(&small) {
        if entry.metadata().unwrap().len() >= 9_000_000 {
            fs::remove_file(entry).unwrap();
        }
    }
    mount.kill_worker(Signal::SIGKILL);
    assert!(full - used() < 8_000_000, "who has it open keeps it");
    drop(held);
    until("nobody has it any more", || {
        // The worker itself has opened it for nobody.
        full - used() >= 9_000_000
    });
    mount.umount();
}

#[test]
fn a_mount_whose_supervisor_was_killed_is_served_and_everybody_who_asks_is_told() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mount = Supervised::start(&fixture, "m", &[], &[]);
    mount.signal(Signal::SIGKILL);
    mount.child.lock().unwrap().wait().unwrap();
    let told = || envfabric::mount::stats(&mount.dir).unwrap().supervised.unwrap().supervisor;
    until("it is written down", || told() == 0);
    let small = mount.dir.join("demo/a/.venv").join(SITE).join("gamma/data/small.bin");
    assert_eq!(fs::read(small).unwrap(), noise(5_000, 301));
    let said = |args: &[&str]| {
        let output = mount.command(Path::new(PROGRAM)).args(args).arg(&mount.dir).output().unwrap();
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat()
    };
    assert!(said(&["stats"]).contains("gone: the mount ends with the process that serves it"));
    let replaced = mount.replace(Path::new(PROGRAM), &[]);
    assert!(!replaced.status.success());
    assert!(String::from_utf8_lossy(&replaced.stderr).contains("it is gone: envfabric umount"), "{replaced:?}");
    let doctor = mount.command(Path::new(PROGRAM)).arg("doctor").env("ENVFABRIC_MOUNT", &mount.dir).output().unwrap();
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("its supervisor is gone"), "{doctor:?}");
    until("nobody uses it", || umount(&mount.dir, false).is_ok());
}

#[test]
fn what_was_removed_stays_for_who_uses_it_when_another_worker_serves() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    fixture.publish("demo/a", vec![]);
    fixture.publish("demo/b", vec![]);
    let mount = Supervised::start(&fixture, "m", &[], &[]);
    let pinned = mount.dir.join("demo/a/.versions/1/.venv").join(SITE);
    let number = fs::metadata(&pinned).unwrap().ino();
    let current = || fs::read_link(mount.dir.join("demo/a/.venv")).unwrap();
    assert_eq!(current(), Path::new(".versions/2/.venv"));
    // Back to a version that was current before.
    let output = mount.command(Path::new(PROGRAM)).args(["rollback", "demo/a", "1"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    until("the link has moved", || current() == Path::new(".versions/1/.venv"));
    fixture.store.remove(&fixture.name("demo/a")).unwrap();
    until("it is not listed", || fs::read_dir(mount.dir.join("demo")).unwrap().count() == 1);
    mount.kill_worker(Signal::SIGKILL);
    assert_eq!(fs::metadata(&pinned).unwrap().ino(), number);
    assert_eq!(current(), Path::new(".versions/1/.venv"));
    assert_eq!(fs::read(pinned.join("gamma/data/small.bin")).unwrap(), noise(5_000, 301));
    mount.umount();
}

#[test]
fn a_service_manager_that_keeps_the_mount_lets_another_supervisor_go_on_with_it() {
    needs_mounts!();
    let fixture = Fixture::new();
    let load = Load::publish(&fixture);
    let manager = Manager::start(&fixture, "m", &["--threads=4"]);
    let mount = &manager.mount;
    let (done, _) = load.run(&fixture, mount, |progress| {
        for round in 1..=3 {
            progress.wait_for_all(2);
            let before = mount.status();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(before.supervisor as i32), Signal::SIGKILL).unwrap();
            until("another supervisor goes on", || {
                mount
                    .try_status()
                    .is_some_and(|status| status.supervisor != before.supervisor && status.worker.is_some())
            });
            let after = mount.status();
            assert_ne!(after.worker, before.worker);
            let old = format!("/proc/{}/cmdline", before.worker.unwrap());
            assert!(!fs::read_to_string(old).is_ok_and(|line| line.contains("--worker")), "only one serves");
            assert_eq!(after.workers, round + 1);
        }
        progress.wait_for_all(5);
    });
    assert!(done > 0);
    let said = manager.said();
    assert_eq!(said.matches("READY=1").count(), 4, "{said}");
    assert!(said.contains("FDNAME=envfabric-device") && said.contains("FDNAME=envfabric-kept"), "{said}");
    until("nobody uses it", || umount(&mount.dir, false).is_ok());
    until("nothing is kept any more", || manager.said().matches("FDSTOREREMOVE=1").count() == 2);
    assert!(mount.ends().success());
}
