//! Real mounts of a synthetic store.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[macro_use]
mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::*;
use envfabric::error::{Error, Kind};
use envfabric::mount::{Mounted, Options, mount, mounts, stats, trial, umount};

/// Unmounts lazily whatever is at the path, so that no failed test leaves a mount.
struct Bound(PathBuf);

impl Bound {
    fn bind(from: impl AsRef<Path>, to: PathBuf) -> Bound {
        run("mount", &["--bind", from.as_ref().to_str().unwrap(), to.to_str().unwrap()]);
        Bound(to)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn served(fixture: &Fixture, name: &str) -> Mounted {
    served_with(fixture, name, |_| ())
}

fn served_with(fixture: &Fixture, name: &str, change: impl FnOnce(&mut Options)) -> Mounted {
    let mut options = Options::at(fixture.dir.path().join(name));
    change(&mut options);
    mount(fixture.store.clone(), fixture.index.clone(), &options).unwrap()
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn home(config: impl AsRef<Path>) -> String {
    let text = fs::read_to_string(config).unwrap();
    assert_eq!(text.len(), 8192);
    text.lines().next().unwrap().strip_prefix("home = ").unwrap().to_string()
}

/// Path, kind, mode, target or content of everything below `root`.
fn walk(root: &Path) -> BTreeMap<PathBuf, String> {
    fn visit(root: &Path, at: &Path, into: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if meta.is_dir() {
                visit(root, &path, into);
                format!("dir {:o}", meta.mode())
            } else {
                let bytes = fs::read(&path).unwrap();
                assert_eq!(bytes.len() as u64, meta.len(), "{}", path.display());
                format!("{:o} {}", meta.mode(), envfabric::environment::Digest::of(&bytes))
            };
            into.insert(path.strip_prefix(root).unwrap().to_path_buf(), what);
        }
    }
    let mut found = BTreeMap::new();
    visit(root, root, &mut found);
    found
}

#[test]
fn cp_tar_rsync_and_find_agree_about_a_mounted_environment() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "m");
    let version = mounted.mount_point().join("demo/a/.versions/1");
    let tree = walk(&version);
    let text = |path: &str| tree.get(Path::new(path)).map(String::as_str);
    assert_eq!(text(".venv/bin/python"), Some("-> ../../.python/bin/python3.11"));
    assert_eq!(text(".venv/bin/python3.11"), Some("-> python"));
    assert_eq!(text(".venv/lib64"), Some("-> lib"));
    assert_eq!(text(".venv/lib/python3.11/site-packages/shared"), Some("dir 40755"));
    assert!(text(".venv/bin/alpha").unwrap().starts_with("100755"));
    let big = format!("100644 {}", envfabric::environment::Digest::of(&noise(700_000, 200)));
    assert_eq!(text(".venv/lib/python3.11/site-packages/beta/data/big.bin"), Some(big.as_str()));

    let source = version.to_str().unwrap();
    let copies = ["cp", "tar", "rsync"].map(|name| fixture.place(name));
    run("cp", &["-a", &format!("{source}/."), copies[0].to_str().unwrap()]);
    let pipe = format!("tar -C {source} -cf - . | tar -C {} -xpf -", copies[1].display());
    run("sh", &["-ec", &pipe]);
    run("rsync", &["-a", &format!("{source}/"), copies[2].to_str().unwrap()]);
    for copy in &copies {
        let mut expected = tree.clone();
        // pyvenv.cfg is the same for whoever reads it through the same mount.
        assert_eq!(walk(copy), expected, "{}", copy.display());
        expected.clear();
        assert_eq!(run("rsync", &["-anic", "--delete", &format!("{source}/"), copy.to_str().unwrap()]), "");
    }
    let found = run("find", &[source, "-mindepth", "1", "-printf", "%P\n"]);
    let mut found: Vec<&str> = found.lines().collect();
    found.sort();
    let mut expected: Vec<&str> = tree.keys().map(|p| p.to_str().unwrap()).collect();
    expected.sort();
    assert_eq!(found, expected);
    // And with all caches dropped, from several at once.
    drop_caches();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(walk(&version), tree));
        }
    });
}

fn drop_caches() {
    // Not possible in some containers; then the test says less.
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

#[test]
fn every_directory_knows_itself_its_parent_and_its_subdirectories() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    fixture.publish("demo/b", fixture.packages());
    fixture.publish("other/c", vec![]);
    let mounted = served(&fixture, "m");
    fn check(dir: &Path, parent: Option<u64>) {
        let ino = fs::metadata(dir).unwrap().ino();
        assert!(ino < 1 << 53);
        assert_eq!(fs::metadata(dir.join(".")).unwrap().ino(), ino);
        let mut subdirs = 0;
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            use std::os::unix::fs::DirEntryExt;
            let meta = fs::symlink_metadata(entry.path()).unwrap();
            assert_eq!(entry.ino(), meta.ino(), "{}", entry.path().display());
            assert_eq!(entry.file_type().unwrap(), meta.file_type());
            if meta.is_dir() {
                subdirs += 1;
                check(&entry.path(), Some(ino));
            } else {
                assert_eq!(meta.nlink(), 1);
            }
        }
        assert_eq!(fs::metadata(dir).unwrap().nlink(), 2 + subdirs, "{}", dir.display());
        let listed = run("ls", &["-aif1", dir.to_str().unwrap()]);
        let of = |name: &str| {
            let line = listed.lines().find(|l| l.trim().split_once(' ').is_some_and(|(_, n)| n == name)).unwrap();
            line.trim().split_once(' ').unwrap().0.parse::<u64>().unwrap()
        };
        assert_eq!(of("."), ino, "{}", dir.display());
        if let Some(parent) = parent {
            assert_eq!(of(".."), parent, "{}", dir.display());
        }
    }
    let root = mounted.mount_point();
    // What is above the root of a mount belongs to another file system.
    check(root, None);
    // The same file of the same layer is one inode in every environment; directories never are.
    let ino = |path: &str| fs::symlink_metadata(root.join(path)).unwrap().ino();
    let file = ".venv/lib/python3.11/site-packages/alpha/__init__.py";
    assert_eq!(ino(&format!("demo/a/{file}")), ino(&format!("demo/b/{file}")));
    let dir = ".venv/lib/python3.11/site-packages/alpha";
    assert_ne!(ino(&format!("demo/a/{dir}")), ino(&format!("demo/b/{dir}")));
}

#[test]
fn a_name_that_is_too_long_is_told_as_every_file_system_does() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "m");
    let root = mounted.mount_point();
    for dir in [root.to_path_buf(), root.join("demo"), root.join("demo/a/.venv/lib")] {
        let error = |length: usize| fs::metadata(dir.join("x".repeat(length))).unwrap_err().raw_os_error();
        assert_eq!((error(255), error(256)), (Some(libc::ENOENT), Some(libc::ENAMETOOLONG)));
    }
}

#[test]
fn every_write_is_answered_with_a_read_only_file_system() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "m");
    let root = mounted.mount_point();
    let site = root.join("demo/a/.venv/lib/python3.11/site-packages");
    let file = site.join("alpha/__init__.py");
    let erofs = |what: &str, result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS), "{what}");
    };
    for dir in [root.to_path_buf(), root.join("demo"), root.join("demo/a"), site.clone(), site.join("alpha")] {
        erofs("create", fs::write(dir.join("new"), "x"));
        erofs("mkdir", fs::create_dir(dir.join("new")));
        erofs("symlink", std::os::unix::fs::symlink("x", dir.join("new")));
        erofs("link", fs::hard_link(&file, dir.join("new")));
        erofs("chmod", fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)));
    }
    erofs("write", fs::OpenOptions::new().write(true).open(&file).map(drop));
    erofs("read-write", fs::OpenOptions::new().read(true).write(true).open(&file).map(drop));
    erofs("truncate", fs::OpenOptions::new().write(true).truncate(true).open(&file).map(drop));
    erofs("unlink", fs::remove_file(&file));
    erofs("rmdir", fs::remove_dir(site.join("shared")));
    erofs("rename", fs::rename(&file, site.join("moved")));
    erofs("chown", std::os::unix::fs::chown(&file, Some(1), None));
    erofs("utimes", fs::File::open(&file).and_then(|f| f.set_modified(std::time::SystemTime::now())));
    let mkfifo = nix::unistd::mkfifo(&site.join("fifo"), nix::sys::stat::Mode::S_IRUSR);
    assert_eq!(mkfifo, Err(nix::Error::EROFS));
    let output = Command::new("setfattr").args(["-n", "user.x", "-v", "y"]).arg(&file).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("Read-only"), "{output:?}");
}

#[test]
fn files_tell_their_layer_and_digest_and_directories_their_version() {
    needs_mounts!();
    let fixture = Fixture::new();
    let layers = fixture.packages();
    fixture.publish("demo/a", layers.clone());
    let mounted = served(&fixture, "m");
    let venv = mounted.mount_point().join("demo/a/.venv");
    let get = |path: &str, name: &str| {
        let output =
            Command::new("getfattr").args(["--only-values", "-n", name]).arg(venv.join(path)).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    };
    let file = "lib/python3.11/site-packages/alpha/data/big.bin";
    assert_eq!(get(file, "user.envfabric.layer"), Some(layers[0].to_string()));
    assert_eq!(get(file, "user.envfabric.package").as_deref(), Some("alpha==1.0"));
    let digest = envfabric::environment::Digest::of(&noise(700_000, 100));
    assert_eq!(get(file, "user.envfabric.digest"), Some(digest.to_string()));
    assert_eq!(get("lib", "user.envfabric.version").as_deref(), Some("demo/a@1"));
    assert_eq!(get("..", "user.envfabric.version").as_deref(), Some("demo/a@1"));
    assert_eq!(get(file, "user.envfabric.version"), None);
    let dump = run("getfattr", &["-d", venv.join(file).to_str().unwrap()]);
    assert_eq!(dump.matches("user.envfabric.").count(), 3, "{dump}");
    let stat = nix::sys::statvfs::statvfs(&venv).unwrap();
    let of_store = nix::sys::statvfs::statvfs(fixture.store.root()).unwrap();
    assert_eq!((stat.blocks(), stat.name_max()), (of_store.blocks(), 255));
    assert!(stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY));
}

#[test]
fn a_mount_counts_what_it_is_asked_and_tells_it_without_a_name_in_its_tree() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    for wanted in [true, false] {
        let mounted = served_with(&fixture, &format!("m{wanted}"), |o| (o.passthrough, o.threads) = (wanted, 3));
        let root = mounted.mount_point();
        let site = root.join("demo/a/.venv/lib/python3.11/site-packages/alpha");
        let before = stats(root).unwrap();
        for _ in 0..20 {
            fs::read(site.join("data/small.bin")).unwrap();
            fs::read(site.join("data/big.bin")).unwrap();
            assert!(fs::metadata(site.join("missing")).is_err());
        }
        home(root.join("demo/a/.venv/pyvenv.cfg"));
        // Asked through a bind mount of a part; releases may come late.
        let bound = Bound::bind(root.join("demo/a"), fixture.place("bound"));
        until("every handle is released", || stats(&bound.0).unwrap().requests["RELEASE"] == 41);
        let after = stats(&bound.0).unwrap();
        let grown = |name: &str| after.requests[name] - before.requests[name];
        assert_eq!(grown("OPEN"), 41);
        let of_names = grown("LOOKUP");
        assert!((7..40).contains(&of_names), "names are kept, missing ones too: {of_names}");
        assert_eq!(after.opens.passthrough + after.opens.cached, 40);
        assert_eq!(after.opens.direct, 1);
        let used = after.passthrough.used;
        assert_eq!(after.passthrough.why_not.is_none(), used);
        assert_eq!(after.opens.passthrough, if used { 20 } else { 0 });
        // Small files are kept by the kernel after the first time; so are large ones, unless it reads them itself.
        let bytes = if used { 5_000 } else { 705_000 } + 8_192;
        assert_eq!(after.bytes_read, bytes);
        if !wanted {
            assert!(after.passthrough.why_not.as_deref().unwrap().contains("--no-passthrough"));
        }
        assert_eq!((after.threads, after.pid), (3, std::process::id()));
        assert_eq!(
            (&*after.mount_point, &*after.store),
            (root.to_str().unwrap(), fixture.store.root().to_str().unwrap())
        );
        assert!(after.protocol.starts_with("7.") && after.resident_bytes > 1_000_000 && after.open_files > 3);
        let catalogs = after.memories["catalogs"];
        assert!(catalogs.held > 0 && catalogs.most >= catalogs.held);
        // Nothing that walks the tree or copies it meets the attribute.
        for path in [root.to_path_buf(), root.join("demo"), site.join("data/small.bin")] {
            let dump = run("getfattr", &["-d", "-m", "-", path.to_str().unwrap()]);
            assert!(!dump.contains("stats"), "{dump}");
        }
        assert_eq!(fs::read_dir(root).unwrap().count(), 1);
    }
}

#[test]
fn what_is_no_mount_of_ours_is_asked_nothing() {
    needs_mounts!();
    let fixture = Fixture::new();
    let plain = fixture.place("plain");
    assert!(stats(&plain).unwrap_err().is_not_found());
    assert!(stats(&plain.join("missing")).unwrap_err().is_not_found());
    run("mount", &["-t", "tmpfs", "none", plain.to_str().unwrap()]);
    let plain = Bound(plain);
    let error = stats(&plain.0).unwrap_err();
    assert!(error.kind() == Kind::Usage && error.to_string().contains("not envfabric's"), "{error:?}");
}

#[test]
fn pyvenv_cfg_names_the_path_that_its_reader_sees() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "a mount");
    let root = mounted.mount_point();
    let version = root.join("demo/a/.versions/1");
    let config = version.join(".venv/pyvenv.cfg");
    assert_eq!(home(&config), format!("{}/.python/bin", version.display()));
    assert_eq!(fs::metadata(&config).unwrap().len(), 8192);

    // (what is bound, the version in it), each alone in a namespace of its own, where the mount itself is hidden.
    let table = [
        (root.to_path_buf(), "demo/a/.versions/1"),
        (root.join("demo"), "a/.versions/1"),
        (root.join("demo/a"), ".versions/1"),
        (version.clone(), ""),
    ];
    for (i, (source, inside)) in table.iter().enumerate() {
        let target = fixture.place(&format!("bind {i}"));
        let seen = target.join(inside);
        let shell = format!(
            "mount --make-rprivate / && mount --bind '{}' '{}' && umount -l '{}' && head -1 '{}/.venv/pyvenv.cfg'",
            source.display(),
            target.display(),
            root.display(),
            seen.display()
        );
        let said = run("unshare", &["-m", "sh", "-ec", &shell]);
        let seen = seen.to_str().unwrap().trim_end_matches('/');
        assert_eq!(said, format!("home = {seen}/.python/bin\n"), "{}", source.display());

        // The same, bound at the root of a chroot and below it.
        let jail = fixture.place(&format!("jail{i}"));
        fs::create_dir(jail.join("env")).unwrap();
        for dir in ["bin", "lib", "lib64", "usr", "proc"] {
            if Path::new("/").join(dir).is_dir() {
                fs::create_dir(jail.join(dir)).unwrap();
            }
        }
        let shell = format!(
            "mount --make-rprivate /; cd '{}'; for d in bin lib lib64 usr; do [ -d $d ] && mount --bind /$d $d; done; \
             mount --bind '{}' env; chroot . head -1 'env/{inside}/.venv/pyvenv.cfg'",
            jail.display(),
            source.display(),
        );
        let said = run("unshare", &["-m", "sh", "-ec", &shell]);
        let seen = PathBuf::from("/env").join(inside);
        let seen = seen.to_str().unwrap().trim_end_matches('/');
        assert_eq!(said, format!("home = {seen}/.python/bin\n"), "chroot, {}", source.display());
    }
    // In a pid namespace the reader is seen from here all the same.
    let shell = format!("head -1 '{}'", config.display());
    let said = run("unshare", &["-m", "-p", "-f", "--mount-proc", "sh", "-ec", &shell]);
    assert_eq!(said, format!("home = {}/.python/bin\n", version.display()));
}

#[test]
fn an_interpreter_starts_through_its_links_wherever_a_version_is_bound() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "m");
    let root = mounted.mount_point();
    assert_eq!(run(root.join("demo/a/.venv/bin/python").to_str().unwrap(), &["1"]), "fake python 1\n");
    let bound = Bound::bind(root.join("demo/a/.versions/1"), fixture.place("bound"));
    for name in ["python", "python3", "python3.11"] {
        assert_eq!(run(bound.0.join(".venv/bin").join(name).to_str().unwrap(), &["x"]), "fake python x\n");
    }
}

#[test]
fn switching_removing_and_adding_versions_disturbs_nobody_inside() {
    needs_mounts!();
    let fixture = Fixture::new();
    let packages = fixture.packages();
    fixture.publish("demo/a", packages.clone());
    let mounted = served(&fixture, "m");
    let node = mounted.mount_point().join("demo/a");
    let name = fixture.name("demo/a");
    let current = || fs::read_link(node.join(".venv")).unwrap().to_str().unwrap().to_string();
    assert_eq!(current(), ".versions/1/.venv");

    let bound = Bound::bind(node.join(".versions/1"), fixture.place("bound"));
    let node_bound = Bound::bind(&node, fixture.place("node"));
    // A working directory inside the old version, a loop of listings, a loop of reads, until told to stop.
    let stop = fixture.dir.path().join("stop");
    let script = format!(
        "cd '{0}/.venv/lib/python3.11/site-packages/alpha'; n=0
         while [ ! -e '{1}' ]; do
           cat __init__.py ../shared/beta.py >/dev/null; [ $(ls | wc -l) = 4 ]; ls -laR ../shared >/dev/null
           /bin/pwd >/dev/null; stat . .. ../../../.. >/dev/null; cat data/big.bin | cmp - '{2}/.venv/lib/python3.11/site-packages/alpha/data/big.bin'
           ls '{0}' >/dev/null; n=$((n+1))
         done; echo $n",
        node.display(),
        stop.display(),
        bound.0.display()
    );
    let loops: Vec<_> = (0..2)
        .map(|_| {
            let mut command = Command::new("sh");
            command.args(["-ec", &script]).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();

    for round in 0..5 {
        let mut layers = packages.clone();
        layers.push(fixture.layer("extra", vec![file(format!("{SITE}/extra{round}.py"), "x")]));
        let number = fixture.publish("demo/a", layers);
        let link = format!(".versions/{number}/.venv");
        // Through the path, through a bind mount of the node, and in a listing that the kernel keeps.
        until("the link leads to the new version", || current() == link);
        until("so it does in a bind mount", || fs::read_link(node_bound.0.join(".venv")).unwrap() == Path::new(&link));
        until("the version is listed", || {
            fs::read_dir(node.join(".versions")).unwrap().any(|e| *e.unwrap().file_name() == *number.to_string())
        });
        assert!(node.join(format!(".venv/lib/python3.11/site-packages/extra{round}.py")).exists());
        let metadata = fs::read_to_string(node.join("metadata.json")).unwrap();
        assert!(metadata.contains(&format!("\"number\": {number}")) && metadata.contains("\"packages\""));
        fixture.store.rollback(&name, 1).unwrap();
        until("it is rolled back", || current() == ".versions/1/.venv");
        assert!(!node.join(format!(".venv/lib/python3.11/site-packages/extra{round}.py")).exists());
    }
    fixture.store.remove(&name).unwrap();
    let listed = |name: &str| {
        let demo =
            fs::read_dir(mounted.mount_point().join("demo")).map(|d| d.flatten().any(|e| *e.file_name() == *name));
        demo.unwrap_or(false)
    };
    until("it is not listed once removed", || !listed("a"));
    // But who knows the path is not disturbed.
    assert_eq!(current(), ".versions/1/.venv");
    fixture.publish("demo/new", vec![]);
    assert!(mounted.mount_point().join("demo/new/.venv/bin/activate").exists(), "a new name is there at once");
    until("it is listed", || listed("new"));

    fs::write(&stop, "").unwrap();
    for child in loops {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.is_empty(), "{said}");
        assert!(String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().unwrap() > 0);
    }
}

#[test]
fn removed_and_unfinished_environments_are_not_there() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("gone/a", vec![]);
    fixture.store.remove(&fixture.name("gone/a")).unwrap();
    fixture.publish("demo/a", vec![]);
    // As a builder would leave it that was killed before it published.
    fs::create_dir_all(fixture.store.root().join("envs/demo/half/versions")).unwrap();
    let mounted = served(&fixture, "m");
    let names = |path: &str| -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(mounted.mount_point().join(path))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(""), ["demo"]);
    assert_eq!(names("demo"), ["a"]);
    assert_eq!(names("demo/a"), [".python", ".venv", ".versions", "metadata.json", "pylock.toml", "pyproject.toml"]);
    let version = [".python", ".venv", "metadata.json", "pylock.toml", "pyproject.toml"];
    assert_eq!(names("demo/a/.versions/1"), version);
    for missing in ["gone", "gone/a", "demo/half", "demo/a/.versions/2", "demo/a/.versions/01", "demo/a/uv.lock", ".x"]
    {
        assert!(!mounted.mount_point().join(missing).exists(), "{missing}");
    }
    fixture.publish("gone/a", vec![]);
    assert!(mounted.mount_point().join("gone/a/.venv").exists());
    until("a workflow is listed again", || names("") == ["demo", "gone"]);
}

#[test]
fn a_directory_of_20000_names_is_listed_whole() {
    needs_mounts!();
    let fixture = Fixture::new();
    let many = |from: u32, to: u32| -> Vec<_> {
        (from..to)
            .map(|i| file(format!("{SITE}/many/file-with-a-rather-long-name-{i:06}.py"), format!("{i}")))
            .collect()
    };
    let layers = vec![fixture.layer("one", many(0, 12_000)), fixture.layer("two", many(8_000, 20_000))];
    fixture.publish("demo/a", layers);
    let mounted = served(&fixture, "m");
    let dir = mounted.mount_point().join("demo/a/.venv/lib/python3.11/site-packages/many");
    for _ in 0..2 {
        let names: std::collections::BTreeSet<_> =
            fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 20_000);
        drop_caches();
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 20_000, "no name twice");
    // Positions stay good while somebody else lists, and after seeking.
    let script = "import os,sys; a=os.scandir(sys.argv[1]); got=[next(a).name for _ in range(7)]; os.listdir(sys.argv[1]); \
                  got+=[e.name for e in a]; print(len(got), len(set(got)))";
    assert_eq!(run("python3", &["-c", script, dir.to_str().unwrap()]).trim(), "20000 20000");
}

#[test]
fn what_is_damaged_fails_alone() {
    needs_mounts!();
    let fixture = Fixture::new();
    let bad = fixture.layer(
        "bad",
        vec![file(format!("{SITE}/bad/__init__.py"), "1"), file(format!("{SITE}/bad/big.bin"), noise(300_000, 9))],
    );
    let cut = fixture.layer("cut", vec![file(format!("{SITE}/cut/__init__.py"), noise(3000, 4)), file("bin/cut", "")]);
    fixture.publish("demo/good", fixture.packages());
    fixture.publish("demo/bad", vec![bad]);
    fixture.publish("demo/cut", vec![cut]);
    let mounted = served(&fixture, "m");
    let root = mounted.mount_point();
    let eio = |path: &str| {
        let error = fs::read(root.join(path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{path}: {error}");
    };
    // A blob that is missing, and one that is cut off.
    let blob = fixture.store.blob_path(&envfabric::environment::Digest::of(&noise(300_000, 9)));
    let bytes = fs::read(&blob).unwrap();
    fs::remove_file(&blob).unwrap();
    eio("demo/bad/.venv/lib/python3.11/site-packages/bad/big.bin");
    fs::write(&blob, &bytes[..200_000]).unwrap();
    eio("demo/bad/.venv/lib/python3.11/site-packages/bad/big.bin");
    assert_eq!(fs::read(root.join("demo/bad/.venv/lib/python3.11/site-packages/bad/__init__.py")).unwrap(), b"1");
    // A catalog that is cut off.
    let catalog = fixture.store.catalog_path(&fixture.store.layer(&cut).unwrap().catalog);
    let bytes = fs::read(&catalog).unwrap();
    fs::remove_file(&catalog).unwrap();
    fs::write(&catalog, &bytes[..bytes.len() / 2]).unwrap();
    eio("demo/cut/.venv/bin/cut");
    assert!(fs::read_to_string(root.join("demo/cut/pylock.toml")).unwrap().contains("lock-version"));
    assert!(!walk(&root.join("demo/good/.versions/1")).is_empty());
}

#[test]
fn one_store_may_be_mounted_several_times() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let all = ["m1", "m2", "m3"].map(|name| served(&fixture, name));
    let trees = all.each_ref().map(|m| {
        let mut tree = walk(&m.mount_point().join("demo/a/.versions/1"));
        tree.remove(Path::new(".venv/pyvenv.cfg"));
        tree
    });
    assert!(trees[0] == trees[1] && trees[1] == trees[2]);
    for mounted in &all {
        let info = mounts().unwrap().into_iter().find(|info| info.mount_point == mounted.mount_point()).unwrap();
        assert_eq!(info.store, fixture.store.root());
    }
    for mounted in all {
        mounted.unmount().unwrap();
    }
}

#[test]
fn a_mount_point_that_cannot_be_used_is_refused_with_the_reason() {
    needs_mounts!();
    let fixture = Fixture::new();
    let try_at = |path: &Path| -> Error {
        mount(fixture.store.clone(), fixture.index.clone(), &Options::at(path)).map(drop).unwrap_err()
    };
    let mounted = served(&fixture, "m");
    let error = try_at(mounted.mount_point());
    assert!(error.kind() == Kind::Busy && error.to_string().contains("already mounted"), "{error:?}");
    let full = fixture.place("full");
    fs::write(full.join("x"), "").unwrap();
    let error = try_at(&full);
    assert!(error.to_string().contains("not empty"), "{error:?}");
    let error = try_at(&full.join("x"));
    assert!(error.to_string().contains("not a directory"), "{error:?}");
    let other = fixture.place("other");
    run("mount", &["-t", "tmpfs", "none", other.to_str().unwrap()]);
    let other = Bound(other);
    let error = try_at(&other.0);
    assert!(error.to_string().contains("another file system (tmpfs)"), "{error:?}");
    let error = umount(&other.0, false).unwrap_err();
    assert!(error.kind() == Kind::Usage && error.to_string().contains("not envfabric's"), "{error:?}");
    let error = umount(&full, false).unwrap_err();
    assert!(error.is_not_found(), "{error:?}");
}

#[test]
fn umount_of_a_busy_mount_names_who_uses_it_and_lazy_takes_it_away() {
    needs_mounts!();
    let fixture = Fixture::new();
    fixture.publish("demo/a", fixture.packages());
    let mounted = served(&fixture, "m");
    let root = mounted.mount_point().to_path_buf();
    let big = root.join("demo/a/.venv/lib/python3.11/site-packages/alpha/data/big.bin");
    let mut user = Command::new("sleep").arg("1000").current_dir(root.join("demo")).spawn().unwrap();
    let held = fs::File::open(&big).unwrap();
    let error = umount(&root, false).unwrap_err();
    let text = format!("{error:?}");
    assert_eq!(error.kind(), Kind::Busy);
    assert!(text.contains(&format!("{} (sleep 1000)", user.id())), "{text}");
    assert!(text.contains(&format!("{} (", std::process::id())) && text.contains("--lazy"), "{text}");
    umount(&root, true).unwrap();
    assert!(fs::read_dir(&root).unwrap().next().is_none(), "the directory is empty again");
    let mut bytes = vec![0; 700_000];
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, noise(700_000, 100), "who has it open goes on");
    user.kill().unwrap();
    user.wait().unwrap();
    drop(held);
    mounted.unmount().unwrap();
}

#[test]
fn trial_shows_an_unpublished_draft_and_always_unmounts() {
    needs_mounts!();
    let fixture = Fixture::new();
    let draft = fixture.draft("demo/a", fixture.packages());
    let seen = trial(&fixture.store, fixture.index.clone(), &draft, |dir| {
        assert_eq!(run(dir.join(".venv/bin/python").to_str().unwrap(), &["ok"]), "fake python ok\n");
        assert_eq!(home(dir.join(".venv/pyvenv.cfg")), dir.join(".python/bin").to_str().unwrap());
        assert_eq!(run("find", &[dir.to_str().unwrap(), "-name", "*.dist-info"]).lines().count(), 3);
        Ok(dir.to_path_buf())
    })
    .unwrap();
    assert!(!seen.exists() && !seen.ancestors().nth(4).unwrap().exists());
    let failed = trial(&fixture.store, fixture.index.clone(), &draft, |dir| -> envfabric::error::Result<()> {
        let _still_open = Box::leak(Box::new(fs::File::open(dir.join(".venv/pyvenv.cfg")).unwrap()));
        Err(Error::new(Kind::Failed, "no"))
    });
    assert_eq!(failed.unwrap_err().to_string(), "no");
    let source = format!("envfabric-trial:{}", fixture.store.root().display());
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&source));
    assert!(fixture.store.current(&fixture.name("demo/a")).unwrap_err().is_not_found(), "nothing was published");
}

#[test]
fn large_files_have_the_same_bytes_with_and_without_passthrough() {
    needs_mounts!();
    let fixture = Fixture::new();
    let content = noise(9_000_001, 42);
    let layer = fixture.layer("big", vec![file(format!("{SITE}/big.so"), content.clone())]);
    fixture.publish("demo/a", vec![layer]);
    fixture.publish("demo/b", vec![layer]);
    for passthrough in [true, false] {
        let mounted = served_with(&fixture, &format!("m{passthrough}"), |o| o.passthrough = passthrough);
        let path = |env: &str| mounted.mount_point().join(env).join(".venv/lib/python3.11/site-packages/big.so");
        // Handles that come and go, in both environments, which share the inode; by read, mmap and position.
        std::thread::scope(|scope| {
            for i in 0..4 {
                let (path, content) = (path(if i % 2 == 0 { "demo/a" } else { "demo/b" }), &content);
                scope.spawn(move || {
                    for _ in 0..5 {
                        assert!(fs::read(&path).unwrap() == *content);
                        let file = fs::File::open(&path).unwrap();
                        let mut part = vec![0; 5000];
                        file.read_exact_at(&mut part, 8_990_000).unwrap();
                        assert_eq!(part, content[8_990_000..8_995_000]);
                    }
                });
            }
        });
        let script = "import mmap,hashlib,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); \
                      g=open(sys.argv[1],'rb'); print(hashlib.sha256(m).hexdigest()==hashlib.sha256(g.read()).hexdigest())";
        assert_eq!(run("python3", &["-c", script, path("demo/a").to_str().unwrap()]).trim(), "True");
        mounted.unmount().unwrap();
    }
}
