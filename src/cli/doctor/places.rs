//! What is known of file systems and of how they are mounted. Pure functions of what the kernel lists.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Check, State};
use crate::view::mountinfo::MountLine;

/// How a file system stands to this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// A disk of this machine, whose files the kernel can read for a mount.
    Local,
    /// A disk of this machine, or something like it, without passthrough.
    NoPassthrough,
    /// Over a network.
    Network,
    /// Nobody knows.
    Unknown,
}

/// What is known of file system type `name`, as `/proc/self/mountinfo` calls it, and whether that speaks against a store.
pub(super) fn known(name: &str) -> (Sort, State, &'static str) {
    use Sort::{Local, Network, NoPassthrough, Unknown};
    match name {
        "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" => (Local, State::Ok, "on a disk of this machine"),
        "tmpfs" => (Local, State::Note, "in memory: gone when this machine restarts"),
        "zfs" | "bcachefs" | "f2fs" => (NoPassthrough, State::Ok, "on a disk of this machine, without passthrough"),
        "overlay" => (NoPassthrough, State::Note, "a layer of a container: may go when that does"),
        "nfs" | "nfs4" => (Network, State::Ok, "what stores are made for"),
        "ceph" | "fuse.ceph-fuse" | "lustre" | "gpfs" | "beegfs" => {
            (Network, State::Ok, "clients agree on names at once; hard links and fsync are there; not tested")
        }
        "fuse.glusterfs" => (Network, State::Ok, "hard links and fsync are there; not tested"),
        "cifs" | "smb3" => (Network, State::Ok, "needs a server with hard links; not tested"),
        "fuse.sshfs" => {
            (Network, State::Note, "tested; slow, and remembers names for 20 s unless mounted with -o dcache_timeout=1")
        }
        "9p" | "virtiofs" => (Network, State::Ok, "a directory of the machine that runs this one; not tested"),
        "vfat" | "exfat" | "ntfs3" | "fuseblk" => (NoPassthrough, State::Note, "knows no modes; not for stores"),
        _ => (Unknown, State::Note, "nothing is known of it; mounts count it as distant"),
    }
}

/// The mount that `path`, which has no symbolic links, is on.
pub(super) fn mount_of<'m>(path: &Path, mounts: &'m [MountLine]) -> Option<&'m MountLine> {
    let above = mounts.iter().filter(|mount| path.starts_with(mount.mount_point_path()));
    // Of two at one place the later one is seen.
    above.max_by_key(|mount| mount.mount_point.len())
}

/// Something about the options of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Advice {
    /// What to mount with.
    pub(super) option: &'static str,
    /// What is so without.
    pub(super) because: String,
    /// False for what would only be better.
    pub(super) matters: bool,
}

/// Bytes that one request should carry: what is fetched together is as long.
const RSIZE: u64 = 1 << 20;
/// Names of a store may be so old, in seconds.
const NAMES_OLD: u64 = 5;

/// What to change in the options of a network file system, as the kernel lists them.
pub(super) fn advice(fs_type: &str, options: &str) -> Vec<Advice> {
    let value = |name: &str| options.split(',').find_map(|o| o.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| value(name).and_then(|text| text.parse::<u64>().ok());
    let has = |name: &str| options.split(',').any(|option| option == name);
    let mut advice = Vec::new();
    let mut add = |option, because: String, matters| advice.push(Advice { option, because, matters });
    match fs_type {
        "nfs" | "nfs4" => {
            // Times that are as nfs(5) has them are not listed.
            let names = if has("noac") { 0 } else { number("acdirmax").unwrap_or(60) };
            let late = format!("up to {names} s late");
            if names > NAMES_OLD && !matches!(value("lookupcache"), Some("pos" | "positive" | "none")) {
                let because = format!("a name that was missing stays so: new versions are seen {late}");
                add("lookupcache=positive", because, true);
            }
            if names > NAMES_OLD {
                add("acdirmin=1,acdirmax=1", format!("listings show new environments {late}"), true);
            }
            if has("noac") {
                let because = "noac asks for attributes again and again, which nothing here needs";
                add("acdirmin=1,acdirmax=1", because.into(), true);
            }
            if has("soft") || has("softerr") {
                let because = "soft ends a build whose server is slow; what waits for a store gives up by itself";
                add("hard", because.into(), true);
            }
            if let Some(rsize) = number("rsize").filter(|rsize| *rsize < RSIZE) {
                add(
                    "rsize=1048576",
                    format!("what is fetched together takes {} requests", RSIZE.div_ceil(rsize)),
                    true,
                );
            }
            if number("nconnect").is_none_or(|n| n < 2) {
                add("nconnect=4", "all requests share one connection".into(), false);
            }
        }
        "cifs" | "smb3" => {
            let names = number("acdirmax").or(number("actimeo")).unwrap_or(1);
            if names > NAMES_OLD {
                add("actimeo=1", format!("new environments and versions are seen up to {names} s late"), true);
            }
            if value("cache") == Some("loose") {
                add("cache=strict", "cache=loose may show what others wrote late or in part".into(), true);
            }
        }
        _ => {}
    }
    advice
}

/// Options of a mount that say how it behaves towards a store.
pub(super) fn telling(options: &str) -> String {
    const TELLING: [&str; 17] = [
        "vers",
        "proto",
        "hard",
        "soft",
        "softerr",
        "rsize",
        "wsize",
        "nconnect",
        "noac",
        "lookupcache",
        "acdirmin",
        "acdirmax",
        "acregmin",
        "acregmax",
        "actimeo",
        "cache",
        "local_lock",
    ];
    let named = options.split(',').filter(|option| TELLING.contains(&option.split('=').next().unwrap_or_default()));
    named.collect::<Vec<_>>().join(",")
}

/// What follows from such advice.
pub(super) fn options_check(options: &str, advice: &[Advice]) -> Check {
    const NAME: &str = "mount options";
    let told = telling(options);
    let matters = advice.iter().any(|advice| advice.matters);
    let found = if told.is_empty() { "as by default".to_string() } else { told };
    let check = Check::new(NAME, if matters { State::Note } else { State::Ok }, found);
    if advice.is_empty() {
        return check;
    }
    let lines = advice.iter().map(|advice| format!("{}: {}", advice.option, advice.because));
    check.hint(lines.collect::<Vec<_>>().join("\n-> "))
}

/// The middle one.
pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// What a store is like whose answer usually takes `time`.
pub(super) fn latency(time: Duration) -> (State, &'static str) {
    match time.as_micros() {
        ..201 => (State::Ok, "as fast as a local disk"),
        201..5_001 => (State::Ok, "good"),
        5_001..30_001 => {
            (State::Note, "slow: a first start waits for some hundred answers, one after the other in part")
        }
        _ => (
            State::Note,
            "very slow: a first start takes many seconds; is the store in the same place as this machine?",
        ),
    }
}

/// Clocks that differ by so much are told.
const CLOCKS_DIFFER: f64 = 5.0;

/// How far the clock of a server is ahead, in seconds, which gave a file the time `server`, while here it was between
/// `before` and `after`. Where times are whole seconds, up to one of those is nothing.
pub(super) fn ahead(server: SystemTime, before: SystemTime, after: SystemTime) -> f64 {
    let since = |a: SystemTime, b: SystemTime| a.duration_since(b).map_or(0.0, |time| time.as_secs_f64());
    match since(server, after) - since(before, server) {
        behind if (-1.0..0.0).contains(&behind) => 0.0,
        ahead => ahead,
    }
}

/// What follows from a server's clock that is `ahead` seconds ahead.
pub(super) fn clock_check(ahead: f64) -> Check {
    let check = if ahead.abs() < CLOCKS_DIFFER {
        Check::new("clock", State::Ok, "the store's server has the same time")
    } else {
        let which = if ahead > 0.0 { "ahead" } else { "behind" };
        let found = format!("the store's server is {:.0} s {which}", ahead.abs());
        Check::new("clock", State::Note, found)
            .hint("ages of files in the store are counted by the server's clock: let both follow one (NTP)")
    };
    check.fact("ahead_seconds", ahead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::mountinfo::parse;

    /// Lines as Linux 5.10 to 6.12 write them.
    const LINES: &str = "\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
40 21 0:50 / /nas rw,relatime shared:9 - nfs4 nas.example:/export rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.7,local_lock=none,addr=10.0.0.2\n\
41 40 0:51 /envfabric /nas/good rw,noatime - nfs4 nas.example:/export rw,vers=4.1,rsize=1048576,wsize=1048576,namlen=255,acdirmin=1,acdirmax=1,hard,nconnect=4,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.7,lookupcache=pos,local_lock=none,addr=10.0.0.2\n\
42 21 0:52 / /old ro,relatime - nfs old.example:/v rw,vers=3,rsize=65536,wsize=65536,namlen=255,soft,proto=tcp,timeo=600,retrans=2,sec=sys,mountaddr=10.0.0.3,mountvers=3,mountport=635,mountproto=udp,local_lock=none,addr=10.0.0.3\n\
43 21 0:53 / /noac rw,sync,relatime - nfs4 nas.example:/export rw,sync,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,hard,noac,nconnect=8,proto=tcp,timeo=600,retrans=2,sec=sys,local_lock=none,addr=10.0.0.2\n\
44 21 0:54 / /smb rw,relatime - cifs //srv/share rw,vers=3.1.1,cache=strict,username=x,uid=0,forceuid,gid=0,forcegid,addr=10.0.0.4,file_mode=0755,dir_mode=0755,soft,nounix,serverino,mapposix,rsize=4194304,wsize=4194304,bsize=1048576,echo_interval=60,actimeo=1,closetimeo=1\n\
45 21 0:55 / /loose rw,relatime - cifs //srv/share rw,vers=3.0,cache=loose,rsize=4194304,actimeo=30\n\
46 21 0:56 / /my\\040ssh rw,nosuid,nodev,relatime - fuse.sshfs host:/srv rw,user_id=0,group_id=0,allow_other\n\
47 21 0:57 / /nas/over rw - tmpfs tmpfs rw,size=1024k\n\
48 47 0:58 / /nas/over rw - ceph 10.0.0.5:6789:/ rw,name=admin,secret=<hidden>,acl\n";

    #[test]
    fn a_path_is_on_the_mount_that_is_seen_there() {
        let mounts = parse(LINES.as_bytes());
        for (path, expected) in [
            ("/", "ext4"),
            ("/home/x", "ext4"),
            ("/nas", "nfs4"),
            ("/nasty", "ext4"),
            ("/nas/store/blobs", "nfs4"),
            ("/my ssh/store", "fuse.sshfs"),
            ("/nas/over/store", "ceph"),
        ] {
            assert_eq!(mount_of(Path::new(path), &mounts).unwrap().fs_type, expected, "{path}");
        }
        assert_eq!(mount_of(Path::new("/x"), &[]), None);
    }

    #[test]
    fn what_is_to_be_changed_in_mount_options_is_told() {
        let mounts = parse(LINES.as_bytes());
        let late = |n| format!("a name that was missing stays so: new versions are seen up to {n} s late");
        let table: &[(&str, &[&str], State)] = &[
            ("/nas", &["lookupcache=positive", "acdirmin=1,acdirmax=1", "nconnect=4"], State::Note),
            ("/nas/good", &[], State::Ok),
            (
                "/old",
                &["lookupcache=positive", "acdirmin=1,acdirmax=1", "hard", "rsize=1048576", "nconnect=4"],
                State::Note,
            ),
            ("/noac", &["acdirmin=1,acdirmax=1"], State::Note),
            ("/smb", &[], State::Ok),
            ("/loose", &["actimeo=1", "cache=strict"], State::Note),
            ("/my ssh", &[], State::Ok),
        ];
        for (path, expected, state) in table {
            let mount = mount_of(Path::new(path), &mounts).unwrap();
            let advice = advice(&mount.fs_type, &mount.options);
            assert_eq!(&advice.iter().map(|a| a.option).collect::<Vec<_>>(), expected, "{path}");
            assert_eq!(options_check(&mount.options, &advice).state, *state, "{path}");
        }
        assert_eq!(advice("nfs4", "rw,hard")[0].because, late(60));
        assert_eq!(advice("nfs4", "rw,acdirmin=3,acdirmax=30,hard")[0].because, late(30));
        assert_eq!(
            advice("nfs", "rsize=65536,nconnect=2,acdirmax=1")[0].because,
            "what is fetched together takes 16 requests"
        );
        let told = telling(&mount_of(Path::new("/nas"), &mounts).unwrap().options);
        assert_eq!(told, "vers=4.2,rsize=1048576,wsize=1048576,hard,proto=tcp,local_lock=none");
    }

    #[test]
    fn of_each_file_system_it_is_told_what_is_known() {
        for (name, sort, state) in [
            ("ext4", Sort::Local, State::Ok),
            ("tmpfs", Sort::Local, State::Note),
            ("zfs", Sort::NoPassthrough, State::Ok),
            ("overlay", Sort::NoPassthrough, State::Note),
            ("nfs", Sort::Network, State::Ok),
            ("nfs4", Sort::Network, State::Ok),
            ("cifs", Sort::Network, State::Ok),
            ("ceph", Sort::Network, State::Ok),
            ("lustre", Sort::Network, State::Ok),
            ("fuse.glusterfs", Sort::Network, State::Ok),
            ("fuse.sshfs", Sort::Network, State::Note),
            ("fuse.something", Sort::Unknown, State::Note),
        ] {
            let (found, judged, says) = known(name);
            assert_eq!((found, judged), (sort, state), "{name}");
            assert!(!says.is_empty() && says.len() < 100);
        }
    }

    #[test]
    fn a_latency_is_judged_by_its_median() {
        let millis = |all: &[u64]| all.iter().map(|n| Duration::from_millis(*n)).collect::<Vec<_>>();
        assert_eq!(median(millis(&[900, 1, 2, 3, 1])), Duration::from_millis(2));
        assert_eq!(median(vec![]), Duration::ZERO);
        for (micros, state) in
            [(50, State::Ok), (500, State::Ok), (5_000, State::Ok), (6_000, State::Note), (99_000, State::Note)]
        {
            assert_eq!(latency(Duration::from_micros(micros)).0, state, "{micros}");
        }
    }

    #[test]
    fn clocks_that_differ_by_seconds_are_told() {
        let at = |millis: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + millis);
        // (server, before, after, ahead by)
        for (server, before, after, expected) in [
            (20, 10, 30, 0.0),
            (0, 900, 950, 0.0), // whole seconds
            (9_000, 900, 1_000, 8.0),
            (0, 60_000, 61_000, -60.0),
        ] {
            let found = ahead(at(server), at(before), at(after));
            assert!((found - expected).abs() < 1e-3, "{found} {expected}");
            assert_eq!(clock_check(found).state, if expected.abs() < 5.0 { State::Ok } else { State::Note });
        }
        assert_eq!(clock_check(-60.0).found, "the store's server is 60 s behind");
    }
}
