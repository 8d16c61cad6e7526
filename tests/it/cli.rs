//! The command line as a user meets it.

use std::process::{Command, Stdio};

use crate::world::{World, check, python311, text};

const VERBS: &[&str] = &[
    "init",
    "create",
    "mount",
    "umount",
    "run",
    "shell",
    "list",
    "show",
    "versions",
    "diff",
    "rollback",
    "remove",
    "python",
    "warm",
    "profile",
    "stats",
    "gc",
    "fsck",
    "index",
    "doctor",
    "completions",
    "man",
];

#[test]
fn every_verb_has_help_completions_and_a_man_page() {
    let world = World::new();
    let help = world.ok(["--help"]);
    for verb in VERBS {
        assert!(help.contains(&format!("  {verb}")), "{verb} is not in --help");
        let own = world.ok([verb, "--help"]);
        assert!(own.contains("Usage: envfabric") && own.len() > 200, "{verb}: {own}");
        assert!(own.lines().all(|l| l.chars().count() <= 100), "{verb}: a line is too wide");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = world.ok(["completions", shell]);
        assert!(VERBS.iter().all(|v| script.contains(v)), "{shell}");
    }
    check(Command::new("bash").args(["-n", "-c", &world.ok(["completions", "bash"])]));
    let man = world.dir().join("man");
    world.ok(["man", man.to_str().unwrap()]);
    for verb in VERBS {
        let page = std::fs::read_to_string(man.join(format!("envfabric-{verb}.1"))).unwrap();
        assert!(page.contains(".TH"), "{verb}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_to_write() {
    let world = World::new();
    for (args, needle) in [
        (vec!["creat"], "create"),
        (vec!["create"], "WF/NODE"),
        (vec!["create", "noslash", "six"], "WORKFLOW/NODE"),
        (vec!["create", "../x/y", "six"], "name"),
        (vec!["create", "a/b", "six", "--lock", "x", "--project", "y"], "cannot be used with"),
        (vec!["create", "a/b"], "-r /dev/null"),
        (vec!["mount", "--watchdog", "1ms"], "1s or more"),
        (vec!["show", "a/b@zero"], "version number"),
        (vec!["rollback", "a/b", "-1"], "-1"),
        (vec!["gc", "--keep", "0"], "1.."),
        (vec!["gc", "--keep", "2", "--keep-for", "3d"], "cannot be used with"),
        (vec!["gc", "--grace", "5"], "24h"),
        (vec!["gc", "--keep-for=-3h"], "24h"),
        (vec!["fsck", "--rate", "0"], "20MB"),
        (vec!["index"], "rebuild"),
        (vec!["run", "a/b"], "COMMAND"),
        (vec!["--config", "/nonexistent.toml", "list"], "/nonexistent.toml"),
        (vec!["completions", "tcsh"], "bash"),
    ] {
        let output = world.output(&args);
        let stderr = text(&output.stderr);
        let expected = if args[0] == "--config" { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(expected), "{args:?}: {stderr}");
        assert!(stderr.contains(needle), "{args:?}: {stderr}");
    }
    let config = world.dir().join("config.toml");
    std::fs::write(&config, "stroe = '/x'\n").unwrap();
    let stderr = world.fails(2, ["--config", config.to_str().unwrap(), "list"]);
    assert!(stderr.contains("stroe") && stderr.contains("hint:"), "{stderr}");
}

#[test]
fn flags_win_over_variables_over_the_config_file() {
    let world = World::new();
    let dir = world.dir();
    let config = dir.join("config.toml");
    for name in ["by-flag", "by-variable", "by-file"] {
        world.ok(["init", dir.join(name).to_str().unwrap()]);
    }
    std::fs::write(&config, "store = 'by-file'\n").unwrap();
    let init = |flag: Option<&str>, variable: Option<&str>| {
        let mut command = world.command(["--config", config.to_str().unwrap(), "init", "--json"]);
        command.env_remove("ENVFABRIC_STORE");
        if let Some(flag) = flag {
            command.args(["--store", dir.join(flag).to_str().unwrap()]);
        }
        if let Some(variable) = variable {
            command.env("ENVFABRIC_STORE", dir.join(variable));
        }
        let value: serde_json::Value = serde_json::from_str(&check(&mut command)).unwrap();
        value["store"].as_str().unwrap().rsplit('/').next().unwrap().to_string()
    };
    assert_eq!(init(Some("by-flag"), Some("by-variable")), "by-flag");
    assert_eq!(init(None, Some("by-variable")), "by-variable");
    assert_eq!(init(None, None), "by-file");
}

#[test]
fn errors_are_json_too_and_a_closed_pipe_is_no_error() {
    let world = World::new();
    let output = world.output(["show", "no/such", "--json"]);
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "not-found");
    let usage: serde_json::Value = serde_json::from_slice(&world.output(["show", "--json"]).stderr).unwrap();
    assert_eq!(usage["error"]["kind"], "usage");
    assert!(output.stdout.is_empty());
    for args in [vec!["list"], vec!["--help"], vec!["completions", "bash"], vec!["list", "--json"]] {
        let mut process = world.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(process.stdout.take());
        let output = process.wait_with_output().unwrap();
        assert!(!text(&output.stderr).contains("panic"), "{args:?}: {}", text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    }
}

#[test]
fn many_runs_at_once_with_nothing_mounted_share_one_mount() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "demo/hello", "six", "--python", &python]);
    for _ in 0..3 {
        let started: Vec<_> = (0..6)
            .map(|_| {
                let mut command = world.command(["run", "demo/hello", "--", "python", "-c", "import six"]);
                command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for process in started {
            let output = process.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
        }
        let at = world.dir().join("envs").display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert_eq!(mounts.lines().filter(|l| l.contains(&at)).count(), 1);
        world.ok(["umount"]);
    }
    // Mounting what is mounted changes nothing. A mount whose processes were killed is made anew.
    assert_eq!(world.json(["mount"])["existed"], false);
    assert_eq!(world.json(["mount"])["existed"], true);
    let told = world.json(["stats"]);
    for pid in [&told["supervised"]["supervisor"], &told["pid"]] {
        check(Command::new("kill").args(["-9", &pid.to_string()]));
    }
    world.ok(["run", "demo/hello", "--", "python", "-c", "import six"]);
    world.ok(["umount"]);
    // A mount of a part of the store, elsewhere, is no mount of it.
    let part = world.dir().join("part");
    std::fs::create_dir(&part).unwrap();
    if !crate::world::is_root() {
        println!("skipped the bind mount: it needs root");
        return;
    }
    world.ok(["mount"]);
    let whole = world.dir().join("envs/demo");
    check(Command::new("mount").arg("--bind").args([&whole, &part]));
    let umounted = world.output(["umount", "--lazy"]);
    let ran = world.output(["run", "demo/hello", "--", "python", "-c", "import six"]);
    check(Command::new("umount").arg("--lazy").arg(&part));
    assert!(umounted.status.success() && ran.status.success(), "{}", text(&ran.stderr));
}

#[test]
fn stats_tells_what_a_mount_has_done_and_a_dead_or_stopped_one_is_not_waited_for() {
    let world = World::new();
    world.ok(["create", "demo/hello", "six", "--python", &python311()]);
    let at = world.dir().join("envs");
    let stderr = world.fails(1, ["stats"]);
    assert!(stderr.contains("nothing is mounted") && stderr.contains("hint: "), "{stderr}");
    world.fails(1, ["stats", world.dir().to_str().unwrap()]);

    world.ok(["run", "demo/hello", "--", "python", "-c", "import six"]);
    let told = world.json(["stats"]);
    assert_eq!(told["mount_point"], at.to_str().unwrap());
    assert!(told["requests"]["OPEN"].as_u64().unwrap() > 10, "{told}");
    assert_eq!(told["requests"]["WRITE"], serde_json::Value::Null);
    let text_of = world.ok(["stats", at.to_str().unwrap()]);
    assert!(text_of.contains("\nLOOKUP") && text_of.contains("\npassthrough"), "{text_of}");
    // Paths are as long as they are, everything else fits a terminal.
    let fits = |l: &str| l.chars().count() <= 80 || l.starts_with("mount ") || l.starts_with("store ");
    assert!(text_of.lines().all(fits), "{text_of}");

    let doctor = world.json(["doctor"]);
    let check = |name: &str| doctor["checks"].as_array().unwrap().iter().find(|c| c["name"] == name).unwrap().clone();
    let found = check("passthrough")["found"].as_str().unwrap().to_string();
    assert!(found.contains("used by the mount at"), "{found}");
    assert_eq!(told["passthrough"]["used"], !found.contains("not used"));

    // What replaces a process that serves is stopped first, and then killed first.
    let pids = [&told["supervised"]["supervisor"], &told["pid"]];
    let pids = pids.map(|pid| nix::unistd::Pid::from_raw(pid.as_i64().unwrap() as i32));
    let send = |signal| pids.iter().for_each(|pid| nix::sys::signal::kill(*pid, signal).unwrap());
    send(nix::sys::signal::Signal::SIGSTOP);
    let start = std::time::Instant::now();
    let stopped = world.output(["stats"]);
    send(nix::sys::signal::Signal::SIGCONT);
    let stderr = text(&stopped.stderr);
    assert!(stopped.status.code() == Some(1) && stderr.contains("has not answered"), "{stopped:?}");
    assert!(start.elapsed() < std::time::Duration::from_secs(30));
    world.ok(["stats"]);

    send(nix::sys::signal::Signal::SIGKILL);
    crate::world::until("it is told as dead", std::time::Duration::from_secs(20), || {
        let output = world.output(["stats"]);
        output.status.code() == Some(1) && text(&output.stderr).contains("is dead: the process that served it is gone")
    });
    world.ok(["mount"]);
    world.ok(["stats"]);
    world.ok(["umount"]);
}

#[test]
fn stats_tells_what_the_cache_of_a_mount_holds_and_has_spared_the_store() {
    let world = World::new();
    world.ok(["create", "demo/hello", "six", "--python", &python311()]);
    let cache = world.dir().join("node");
    world.ok(["mount", "--cache", cache.to_str().unwrap(), "--cache-size", "5GiB"]);
    world.ok(["run", "demo/hello", "--", "python", "-c", "import six, json"]);
    let told = world.json(["stats"])["cache"].clone();
    assert_eq!((&told["dir"], &told["limit"]), (&cache.to_str().unwrap().into(), &(5u64 << 30).into()));
    let number = |name: &str| told[name].as_u64().unwrap();
    for used in ["held", "objects", "misses", "fetches", "fetched_bytes", "served_bytes", "verified_bytes"] {
        assert!(number(used) > 0, "{used}: {told}");
    }
    for trouble in ["retries", "corrupt_in_store", "corrupt_in_cache", "timeouts", "not_kept", "evictions"] {
        assert_eq!(number(trouble), 0, "{trouble}: {told}");
    }
    let answers: u64 = told["latency"]["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
    assert!(answers > 0, "{told}");
    let shown = world.ok(["stats"]);
    assert!(
        shown.contains("\nCACHE") && shown.contains(" % from here") && shown.contains("\nSTORE ANSWERED"),
        "{shown}"
    );
    let fits = |l: &str| l.chars().count() <= 80 || l.contains(world.dir().to_str().unwrap());
    assert!(shown.lines().all(fits), "{shown}");
    world.ok(["umount"]);
    world.ok(["mount"]);
    assert_eq!(world.json(["stats"])["cache"], serde_json::Value::Null);
    world.ok(["umount"]);
}

#[test]
fn paths_that_are_no_text_and_places_that_are_missing_are_told_without_a_panic() {
    use std::os::unix::ffi::OsStrExt;
    let world = World::new();
    let odd = world.dir().join(std::ffi::OsStr::from_bytes(b"st\xfe"));
    for args in [["init"], ["mount"], ["umount"]] {
        let output = world.command(args).arg(&odd).output().unwrap();
        assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
        assert!(matches!(output.status.code(), Some(0..=2)), "{args:?}: {}", output.status);
    }
    let nowhere = |args: &[&str]| {
        let mut command = world.command(args);
        for name in
            ["HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "ENVFABRIC_SCRATCH"]
        {
            command.env_remove(name);
        }
        command.output().unwrap()
    };
    assert!(nowhere(&["list"]).status.success());
    let mount = nowhere(&["mount"]);
    assert!(text(&mount.stderr).contains("XDG_STATE_HOME"), "{}", text(&mount.stderr));
    // Looking makes no store.
    let fresh = |args: &[&str]| {
        let mut command = world.command(args);
        command.env_remove("ENVFABRIC_STORE").env("XDG_DATA_HOME", world.dir().join("fresh")).output().unwrap()
    };
    assert!(fresh(&["list"]).status.success());
    assert_eq!(fresh(&["show", "a/b"]).status.code(), Some(1));
    assert!(!world.dir().join("fresh").exists());
    // An empty variable is as none.
    let output = world.command(["list"]).env("ENVFABRIC_MOUNT", "").env("ENVFABRIC_SCRATCH", "").output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn run_and_show_and_diff_and_rollback_as_the_readme_says() {
    let world = World::new();
    let python = python311();
    let created = world.ok(["create", "demo/hello", "six==1.15.0", "--python", &python]);
    let path = created.trim();
    assert!(path.ends_with("/envs/demo/hello/.venv/bin/python"), "{created}");

    // `run` mounts by itself.
    let said = world.ok([
        "run",
        "demo/hello",
        "--",
        "python",
        "-c",
        "import six, os; print(six.__version__, os.environ['VIRTUAL_ENV'])",
    ]);
    assert!(said.starts_with("1.15.0 ") && said.contains(".versions/1/.venv"), "{said}");
    assert_eq!(check(Command::new(path).args(["-c", "print(6*7)"])).trim(), "42");
    assert_eq!(world.output(["run", "demo/hello", "--", "python", "-c", "raise SystemExit(7)"]).status.code(), Some(7));
    let missing = world.output(["run", "demo/hello", "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127), "{}", text(&missing.stderr));

    world.ok(["create", "demo/hello", "six==1.16.0", "idna", "--python", &python]);
    let diff = world.json(["diff", "demo/hello@1", "demo/hello"]);
    assert_eq!(diff["changes"].as_array().unwrap().len(), 2, "{diff}");
    world.ok(["rollback", "demo/hello"]);
    assert_eq!(world.json(["show", "demo/hello"])["number"], 1);
    world.ok(["rollback", "demo/hello", "2"]);
    assert_eq!(
        world.ok(["run", "demo/hello@1", "--", "python", "-c", "import six; print(six.__version__)"]).trim(),
        "1.15.0"
    );

    let shell = world.command(["shell", "demo/hello"]).env("SHELL", "/bin/bash").output().unwrap();
    assert!(shell.status.success(), "{}", text(&shell.stderr));
    let pythons = world.json(["python", "list"]);
    assert!(pythons[0]["python"]["version"].as_str().unwrap().starts_with("3.11"), "{pythons}");
    let doctor = world.json(["doctor"]);
    assert!(
        doctor["checks"].as_array().unwrap().iter().any(|c| c["name"] == "store" && c["state"] == "ok"),
        "{doctor}"
    );
    // `remove` is all or nothing, and `rollback` undoes it: back comes the version that was current.
    world.ok(["rollback", "demo/hello", "1"]);
    world.fails(1, ["remove", "demo/hello", "no/such"]);
    world.ok(["show", "demo/hello"]);
    world.ok(["remove", "demo/hello", "demo/hello"]);
    assert!(world.fails(1, ["show", "demo/hello"]).contains("demo/hello"));
    world.ok(["rollback", "demo/hello"]);
    assert_eq!(world.json(["show", "demo/hello"])["number"], 1);
    world.ok(["umount"]);
}
