//! The simulated NAS does what it promises: a test that relies on it proves something.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod nas_client;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nas_client::{Nas, Options, no_nas_because};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Ends a test that cannot run here, and says why.
macro_rules! needs_nas {
    () => {
        if let Some(reason) = no_nas_because() {
            eprintln!("skipped: {reason}");
            return;
        }
    };
}

/// The NAS goes before its backing directory.
struct World {
    nas: Nas,
    backing: TempDir,
}

impl World {
    fn new() -> World {
        World::with(&Options::default())
    }

    fn with(options: &Options) -> World {
        let backing = tempfile::tempdir().unwrap();
        World { nas: Nas::start(backing.path(), options), backing }
    }

    /// A file as clients see it.
    fn at(&self, path: &str) -> PathBuf {
        self.nas.mount().join(path)
    }

    /// A file as the server has it.
    fn behind(&self, path: &str) -> PathBuf {
        self.backing.path().join(path)
    }

    /// Puts a file where no client has seen it.
    fn put(&self, path: &str, content: &[u8]) {
        fs::write(self.behind(path), content).unwrap();
    }
}

/// Bytes that are different everywhere.
fn noise(len: usize) -> Vec<u8> {
    (0u32..).flat_map(|n| n.wrapping_mul(0x9E37_79B9).to_le_bytes()).take(len).collect()
}

/// Reads a file in a thread that nobody has to wait for: a failed test drops the NAS, and it gets an error.
fn reader(path: PathBuf) -> JoinHandle<std::io::Result<Vec<u8>>> {
    thread::spawn(move || fs::read(path))
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn files_directories_and_links_are_those_of_the_backing_directory() {
    needs_nas!();
    let world = World::new();
    let content = noise(5_000_000);
    fs::create_dir_all(world.at("a/b")).unwrap();
    fs::write(world.at("a/b/file"), &content).unwrap();
    assert!(fs::read(world.behind("a/b/file")).unwrap() == content);
    assert!(fs::read(world.at("a/b/file")).unwrap() == content);

    fs::hard_link(world.at("a/b/file"), world.at("a/hard")).unwrap();
    let (file, hard) = (fs::metadata(world.at("a/b/file")).unwrap(), fs::metadata(world.at("a/hard")).unwrap());
    assert_eq!((file.ino(), hard.nlink()), (hard.ino(), 2));
    assert_eq!(file.ino(), fs::metadata(world.behind("a/hard")).unwrap().ino());
    assert_eq!(fs::hard_link(world.at("a/b/file"), world.at("a/hard")).unwrap_err().kind(), ErrorKind::AlreadyExists);

    symlink("hard", world.at("a/soft")).unwrap();
    assert_eq!(fs::read_link(world.at("a/soft")).unwrap(), Path::new("hard"));
    assert_eq!(fs::metadata(world.at("a/soft")).unwrap().ino(), hard.ino());

    assert_eq!(names(&world.at("a")), names(&world.behind("a")));
    for n in 0..1000 {
        world.put(&format!("a/b/{n}"), b"");
    }
    assert_eq!(names(&world.at("a/b")).len(), 1001);

    fs::set_permissions(world.at("a/hard"), fs::Permissions::from_mode(0o640)).unwrap();
    let open = OpenOptions::new().append(true).open(world.at("a/hard")).unwrap();
    open.set_len(10).unwrap();
    (&open).write_all(b"more").unwrap();
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    open.set_modified(then).unwrap();
    open.sync_all().unwrap();
    File::open(world.at("a")).unwrap().sync_all().unwrap();
    let behind = fs::metadata(world.behind("a/b/file")).unwrap();
    assert_eq!((behind.len(), behind.mode() & 0o777, behind.modified().unwrap()), (14, 0o640, then));
    assert_eq!(fs::read(world.behind("a/hard")).unwrap(), [&content[..10], b"more"].concat());

    fs::rename(world.at("a/hard"), world.at("moved")).unwrap();
    fs::rename(world.at("a/b/0"), world.at("a/b/1")).unwrap();
    fs::rename(world.at("a/b"), world.at("c")).unwrap();
    assert_eq!(fs::read(world.at("moved")).unwrap(), fs::read(world.at("c/file")).unwrap());
    assert!(!world.behind("a/b").exists() && !world.behind("c/0").exists() && world.behind("c/1").exists());

    assert_eq!(errno(fs::remove_dir(world.at("c"))), libc::ENOTEMPTY);
    fs::remove_dir_all(world.at("c")).unwrap();
    assert_eq!(names(world.backing.path()), BTreeSet::from(["a".into(), "moved".into()]));
    let kind = nix::sys::statfs::statfs(world.nas.mount()).unwrap().filesystem_type();
    assert_eq!(kind, nix::sys::statfs::FUSE_SUPER_MAGIC);
}

#[test]
fn a_file_is_made_once_when_it_has_to_be_new() {
    needs_nas!();
    let world = World::new();
    let new = || File::create_new(world.at("file"));
    new().unwrap();
    assert_eq!(new().unwrap_err().kind(), ErrorKind::AlreadyExists);
}

#[test]
fn what_is_open_stays_readable_after_unlink_and_rename() {
    needs_nas!();
    let world = World::new();
    let content = noise(300_000);
    world.put("file", &content);
    world.put("other", b"other");
    let mut file = OpenOptions::new().read(true).write(true).open(world.at("file")).unwrap();
    fs::rename(world.at("other"), world.at("file")).unwrap();
    fs::remove_file(world.at("file")).unwrap();
    assert_eq!(names(world.nas.mount()), BTreeSet::new());
    let mut read = vec![];
    file.read_to_end(&mut read).unwrap();
    assert!(read == content);
    file.rewind().unwrap();
    file.write_all(b"new").unwrap();
    file.set_len(3).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 3);
}

#[test]
fn inodes_are_found_again_by_any_name_when_their_descriptor_was_needed_elsewhere() {
    needs_nas!();
    // The kernel remembers all of them.
    let world = World::with(&Options { attr_ttl: "1000s".into(), descriptors: Some(3), ..Options::default() });
    fs::create_dir_all(world.at("a/b/c")).unwrap();
    for n in 0..50 {
        fs::write(world.at(&format!("a/b/c/{n}")), format!("content {n}")).unwrap();
    }
    fs::hard_link(world.at("a/b/c/7"), world.at("seven")).unwrap();
    fs::remove_file(world.at("a/b/c/7")).unwrap();
    fs::rename(world.at("a/b/c/8"), world.at("a/7")).unwrap();
    let mut unlinked = File::open(world.at("a/b/c/9")).unwrap();
    fs::remove_file(world.at("a/b/c/9")).unwrap();
    fs::rename(world.at("a/b"), world.at("moved")).unwrap();
    world.nas.command("reset");
    for n in (0..50).filter(|n| !(7..10).contains(n)) {
        assert_eq!(fs::read_to_string(world.at(&format!("moved/c/{n}"))).unwrap(), format!("content {n}"));
    }
    assert_eq!(fs::read(world.at("seven")).unwrap(), b"content 7");
    assert_eq!(fs::read(world.at("a/7")).unwrap(), b"content 8");
    unlinked.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    let mut read = String::new();
    unlinked.read_to_string(&mut read).unwrap();
    assert_eq!(read, "content 9");
    assert!(world.nas.calls("LOOKUP") < 10, "{}", world.nas.stats());

    // Another client takes it away: ESTALE, for which the kernel looks again.
    fs::remove_dir_all(world.behind("moved")).unwrap();
    assert_eq!(errno(File::open(world.at("moved/c/1"))), libc::ENOENT);
}

#[test]
fn calls_are_counted_and_names_remembered() {
    needs_nas!();
    let world = World::with(&Options { attr_ttl: "1000s".into(), ..Options::default() });
    world.put("file", b"content");
    assert_eq!(world.nas.stat("total"), 0);
    for _ in 0..3 {
        fs::metadata(world.at("file")).unwrap();
        fs::metadata(world.at("missing")).unwrap_err();
    }
    assert_eq!(world.nas.calls("LOOKUP"), 2);
    let file = File::open(world.at("file")).unwrap();
    assert_eq!((world.nas.stat("opens"), world.nas.stat("open_now")), (1, 1));
    file.read_at(&mut [0; 100], 0).unwrap();
    drop(file);
    fs::write(world.at("missing"), b"no more").unwrap();
    // The kernel does not wait for it.
    world.nas.wait_until("released", |stats| stats["open_now"] == 0);
    let stats = world.nas.stats();
    let of = |kind: &str| stats["calls"][kind].as_u64().unwrap();
    assert_eq!([of("OPEN"), of("READ"), of("CREATE"), of("WRITE"), of("RELEASE")], [1, 1, 1, 1, 2]);
    assert_eq!((stats["bytes_read"].as_u64(), stats["bytes_written"].as_u64()), (Some(7), Some(7)));
    let all = stats["calls"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum::<u64>();
    assert_eq!(stats["total"].as_u64().unwrap(), all - of("RELEASE") - of("RELEASEDIR") - of("FORGET"));
    world.nas.command("reset");
    assert_eq!((world.nas.stat("total"), world.nas.stat("bytes_read")), (0, 0));
}

#[test]
fn data_stay_cached_until_the_file_is_opened_after_a_change() {
    needs_nas!();
    let world = World::with(&Options { attr_ttl: "1000s".into(), ..Options::default() });
    world.put("file", b"before");
    assert_eq!(fs::read(world.at("file")).unwrap(), b"before");
    let before = File::open(world.at("file")).unwrap();
    world.nas.command("reset");
    assert_eq!(fs::read(world.at("file")).unwrap(), b"before");
    assert_eq!(world.nas.calls("READ"), 0);
    world.put("file", b"afterwards");
    let read = |file: &File| {
        let mut buffer = [0; 100];
        file.read_at(&mut buffer, 0).map(|length| buffer[..length].to_vec()).unwrap()
    };
    assert_eq!((read(&before), fs::metadata(world.at("file")).unwrap().len()), (b"before".to_vec(), 6));
    assert_eq!(read(&File::open(world.at("file")).unwrap()), b"afterwards");
    assert_eq!(fs::metadata(world.at("file")).unwrap().len(), 10);
}

#[test]
fn fifty_reads_are_in_flight_at_once() {
    needs_nas!();
    let world = World::new();
    for n in 0..50 {
        world.put(&format!("file{n}"), format!("content {n}").as_bytes());
    }
    world.nas.command("hang on READ");
    let readers: Vec<_> = (0..50).map(|n| reader(world.at(&format!("file{n}")))).collect();
    world.nas.wait_until_hung(50);
    assert!(world.nas.stat("in_flight") >= 50);
    world.nas.command("resume");
    for (n, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.join().unwrap().unwrap(), format!("content {n}").as_bytes());
    }
    assert_eq!(world.nas.stat("in_flight"), 0);
}

#[test]
fn who_hangs_by_pattern_leaves_others_alone_however_many_hang() {
    needs_nas!();
    let world = World::new();
    // More than there are threads.
    let stuck = 150;
    fs::create_dir(world.behind("stuck")).unwrap();
    for n in 0..stuck {
        world.put(&format!("stuck/{n}"), b"stuck");
    }
    world.put("free", b"free");
    // Not the directory itself: while its name is looked up, the kernel makes no new names beside it.
    world.nas.command("hang stuck/");
    let readers: Vec<_> = (0..stuck).map(|n| reader(world.at(&format!("stuck/{n}")))).collect();
    world.nas.wait_until_hung(stuck);
    assert_eq!(fs::read(world.at("free")).unwrap(), b"free");
    fs::write(world.at("new"), b"new").unwrap();
    world.nas.command("resume");
    for reader in readers {
        assert_eq!(reader.join().unwrap().unwrap(), b"stuck");
    }
}

#[test]
fn a_hang_catches_calls_that_already_wait_for_their_latency() {
    needs_nas!();
    let world = World::with(&Options { latency: "1s".into(), ..Options::default() });
    world.put("file", b"content");
    let reader = reader(world.at("file"));
    world.nas.wait_until("a call under way", |stats| stats["in_flight"] == 1);
    world.nas.command("hang");
    world.nas.command("set latency 0ms");
    world.nas.wait_until_hung(1);
    world.nas.command("resume");
    assert_eq!(reader.join().unwrap().unwrap(), b"content");
}

#[test]
fn writes_hang_and_arrive_whole() {
    needs_nas!();
    let world = World::new();
    let content = noise(3_000_000);
    let mut file = File::create(world.at("file")).unwrap();
    world.nas.command("hang file on WRITE");
    let writer = {
        let content = content.clone();
        thread::spawn(move || file.write_all(&content))
    };
    world.nas.wait_until_hung(1);
    assert_eq!(fs::metadata(world.behind("file")).unwrap().len(), 0);
    world.nas.command("heal");
    writer.join().unwrap().unwrap();
    assert!(fs::read(world.behind("file")).unwrap() == content);
}

#[test]
fn calls_fail_as_often_as_wanted_with_the_error_that_was_wanted() {
    needs_nas!();
    let world = World::with(&Options { attr_ttl: "0ms".into(), ..Options::default() });
    world.put("file", b"content");
    world.put("other", b"content");
    world.nas.command("fail ESTALE file 2 on OPEN");
    let open = || File::open(world.at("file"));
    // The kernel itself tries a second time after ESTALE.
    assert_eq!(errno(open()), libc::ESTALE);
    open().unwrap();

    world.nas.command("fail EIO file 3 on OPEN");
    fs::read(world.at("other")).unwrap();
    assert_eq!([(); 3].map(|()| errno(open())), [libc::EIO; 3]);
    fs::read(world.at("file")).unwrap();

    world.nas.command("fail EDQUOT");
    for _ in 0..5 {
        assert_eq!(errno(fs::metadata(world.at("other"))), libc::EDQUOT);
    }
    world.nas.command("heal");
    fs::read(world.at("other")).unwrap();
}

#[test]
fn an_enoent_that_was_asked_for_is_not_remembered_as_a_miss() {
    needs_nas!();
    let world = World::with(&Options { attr_ttl: "1000s".into(), ..Options::default() });
    world.put("file", b"content");
    world.nas.command("fail ENOENT file");
    assert_eq!(errno(fs::metadata(world.at("file"))), libc::ENOENT);
    world.nas.command("heal");
    fs::metadata(world.at("file")).unwrap();
}

#[test]
fn a_full_disk_takes_nothing_new() {
    needs_nas!();
    let world = World::new();
    fs::write(world.at("file"), b"content").unwrap();
    let mut open = OpenOptions::new().append(true).open(world.at("file")).unwrap();
    world.nas.command("full");
    assert_eq!(errno(open.write_all(b"more")), libc::ENOSPC);
    assert_eq!(errno(File::create(world.at("new"))), libc::ENOSPC);
    assert_eq!(errno(fs::create_dir(world.at("dir"))), libc::ENOSPC);
    assert_eq!(errno(fs::hard_link(world.at("file"), world.at("link"))), libc::ENOSPC);
    assert_eq!(fs::read(world.at("file")).unwrap(), b"content");
    fs::rename(world.at("file"), world.at("renamed")).unwrap();
    world.nas.command("heal");
    open.write_all(b"more").unwrap();
    assert_eq!(fs::read(world.behind("renamed")).unwrap(), b"contentmore");
}

#[test]
fn a_truncated_read_is_short_before_the_end() {
    needs_nas!();
    let world = World::new();
    let content = noise(10_000);
    world.put("file", &content);
    world.put("other", &content);
    world.nas.command("truncate file 1");
    let file = File::open(world.at("file")).unwrap();
    let mut buffer = [0; 4096];
    assert_eq!(file.read_at(&mut buffer, 0).unwrap(), 2048);
    assert_eq!(buffer[..2048], content[..2048]);
    assert_eq!(file.read_at(&mut buffer, 0).unwrap(), 4096);
    assert!(fs::read(world.at("other")).unwrap() == content);
}

#[test]
fn a_flipped_bit_is_seen_and_does_not_stay_in_the_cache() {
    needs_nas!();
    let world = World::new();
    let content = noise(10_001);
    let mut flipped = content.clone();
    flipped[5_000] ^= 1;
    world.put("before", &content);
    world.put("file", &content);
    // Cached by the kernel, and right.
    assert!(fs::read(world.at("file")).unwrap() == content);
    let before = File::open(world.at("before")).unwrap();
    world.nas.command("flip");
    let whole = |file: &File| {
        let mut read = vec![0; content.len()];
        file.read_exact_at(&mut read, 0).unwrap();
        read
    };
    assert!(whole(&File::open(world.at("file")).unwrap()) == flipped);
    // Opened before: the kernel keeps what it gets.
    assert!(whole(&before) != content);
    world.nas.command("heal");
    assert!(whole(&File::open(world.at("file")).unwrap()) == content);
    assert!(fs::read(world.at("before")).unwrap() == content);
}

#[test]
fn each_byte_that_was_fetched_is_on_record() {
    needs_nas!();
    let world = World::new();
    let content = noise(7_000_000);
    world.put("file", &content);
    world.put("unrecorded", b"content");
    fs::read(world.at("unrecorded")).unwrap();
    world.nas.command("record on");
    assert!(fs::read(world.at("file")).unwrap() == content);
    world.nas.command("record off");
    let reads = world.nas.command("reads");
    let mut fetched: Vec<(u64, u64)> = vec![];
    for read in reads["list"].as_array().unwrap() {
        assert_eq!(read["path"], "file");
        fetched.push((read["offset"].as_u64().unwrap(), read["length"].as_u64().unwrap()));
    }
    fetched.sort_unstable();
    let end = fetched.iter().filter(|(_, length)| *length > 0).fold(0, |end, (offset, length)| {
        assert_eq!(*offset, end, "once, and without a hole: {fetched:?}");
        end + length
    });
    assert_eq!(end, content.len() as u64);
    assert_eq!(reads["files"]["file"]["bytes"], end);
    assert_eq!(reads["files"]["file"]["calls"], fetched.len());
    assert_eq!(reads["files"]["unrecorded"]["calls"], 1);
    // A call carries up to a megabyte.
    assert!(fetched.iter().any(|(_, length)| *length == 1 << 20), "{fetched:?}");
    world.nas.command("reset");
    assert_eq!(world.nas.command("reads")["list"].as_array().unwrap().len(), 0);
}

#[test]
fn nothing_is_faster_than_it_was_set() {
    needs_nas!();
    let world = World::new();
    for n in 0..4 {
        world.put(&n.to_string(), &noise(1_000_000));
    }
    world.nas.command("set bandwidth 20MB/s");
    let begun = Instant::now();
    let readers = [0, 1, 2, 3].map(|n| reader(world.at(&n.to_string())));
    for reader in readers {
        reader.join().unwrap().unwrap();
    }
    assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    world.nas.command("set bandwidth unlimited");
    world.nas.command("set latency 20ms");
    let begun = Instant::now();
    // At least LOOKUP, CREATE and WRITE.
    fs::write(world.at("new"), b"new").unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(60), "{:?}", begun.elapsed());
}

#[test]
fn a_command_that_is_wrong_says_why() {
    needs_nas!();
    let world = World::new();
    for command in
        ["", "dance", "fail", "fail EWHAT", "fail EIO a many", "hang a on DANCE", "set latency 5", "flip a 1 b"]
    {
        let error = world.nas.try_command(command).unwrap_err();
        assert!(!error.is_empty(), "{command:?}");
    }
    fs::read_dir(world.nas.mount()).unwrap();
}

#[test]
fn sigterm_unmounts_while_everything_hangs() {
    needs_nas!();
    let mut world = World::new();
    world.put("file", b"content");
    let open = File::open(world.at("file")).unwrap();
    world.nas.command("hang");
    let readers: Vec<_> = (0..100).map(|n| reader(world.at(&format!("file{n}")))).collect();
    world.nas.wait_until_hung(1);
    world.nas.signal(Signal::SIGTERM);
    assert!(world.nas.wait().success());
    assert!(!world.nas.is_mounted() && !world.nas.socket().exists());
    for reader in readers {
        reader.join().unwrap().unwrap_err();
    }
    assert!(open.read_at(&mut [0; 10], 0).is_err());
}

#[test]
fn kill_ends_it_while_everything_hangs() {
    needs_nas!();
    let mut world = World::new();
    world.put("file", b"content");
    world.nas.command("hang");
    let reader = reader(world.at("file"));
    world.nas.wait_until_hung(1);
    world.nas.signal(Signal::SIGKILL);
    world.nas.wait();
    reader.join().unwrap().unwrap_err();
}

#[test]
fn a_lazy_unmount_frees_who_hangs_and_ends_it() {
    needs_nas!();
    let mut world = World::new();
    world.put("file", b"content");
    let file = File::open(world.at("file")).unwrap();
    world.nas.command("hang");
    let reader = thread::spawn(move || file.read_at(&mut [0; 10], 0));
    world.nas.wait_until_hung(1);
    world.nas.umount_lazily();
    assert_eq!(errno(reader.join().unwrap()), libc::EIO);
    assert!(world.nas.wait().success());
}

#[test]
fn it_ends_with_whoever_holds_its_input() {
    needs_nas!();
    let mut world = World::new();
    world.nas.close_input();
    assert!(world.nas.wait().success());
    assert!(!world.nas.is_mounted());
}

#[test]
fn locks_are_local() {
    needs_nas!();
    let world = World::new();
    let file = File::create(world.at("file")).unwrap();
    file.lock().unwrap();
    assert!(File::open(world.at("file")).unwrap().try_lock().is_err());
    nix::unistd::fsync(file.as_fd()).unwrap();
}
