//! Nodes that have not seen an environment, as a user meets them: `profile`, `warm`, a compressed store.

use std::fs;

use crate::world::{World, check, python311};

/// A store whose objects are compressed, with numpy in it.
fn compressed() -> World {
    let dir = tempfile::Builder::new().prefix("envfabric-it-").tempdir().unwrap().keep();
    let world = World::with_store(dir.join("store"));
    world.ok(["init", "--compression", "zstd"]);
    world.ok(["create", "cold/numpy", "numpy", "--python", &python311()]);
    world
}

#[test]
fn what_a_command_reads_is_recorded_and_brought_to_a_node_that_then_needs_no_store() {
    let world = compressed();
    // An ordinary failure records nothing and is passed on.
    let failed = world.fails(1, ["profile", "cold/numpy", "--", "python", "-c", "import nosuch"]);
    assert!(failed.contains("nothing was recorded") && failed.contains("nosuch"), "{failed}");
    let profile = |code: &str| -> serde_json::Value {
        let told = world.ok(["--json", "profile", "cold/numpy", "--", "python", "-c", code]);
        serde_json::from_str(&told).unwrap()
    };
    let (first, second) = (profile("import numpy"), profile("import numpy.fft"));
    assert_eq!((&first["starts"], &second["starts"]), (&1.into(), &2.into()));
    let bytes = |told: &serde_json::Value| told["profile"]["bytes"].as_u64().unwrap();
    assert!(bytes(&first) > 1_000_000 && bytes(&second) >= bytes(&first), "{first} {second}");
    world.ok(["fsck"]);

    let cache = world.dir().join("cache");
    let at = world.dir().join("mnt");
    let flags = [format!("--cache={}", cache.display()), "--cache-size=2GiB".into(), "--cache-free=1MB".into()];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mount = world.mount_with(&at, &flags);
    let warm = |all: &[&str]| {
        let mut command = world.command(["warm", "cold/numpy", "--wait", "--json"]);
        let told = check(command.args(all).env("ENVFABRIC_MOUNT", &at));
        serde_json::from_str::<serde_json::Value>(&told).unwrap()["warmed"].clone()
    };
    let some = warm(&[]);
    assert_eq!(
        (&some["total"], &some["done"], &some["ended"]),
        (&second["profile"]["bytes"], &some["total"], &true.into())
    );
    let all = warm(&["--all"]);
    assert!(all["total"].as_u64() > some["total"].as_u64(), "{some} {all}");
    // The store goes away: what is here is used as if nothing were.
    let away = world.store().with_extension("away");
    fs::rename(world.store(), &away).unwrap();
    mount.run("cold/numpy", "import numpy, numpy.fft; print(numpy.ones(3).sum())");
    fs::rename(&away, world.store()).unwrap();
    let stats = world.json(["stats", at.to_str().unwrap()]);
    assert!(stats["cache"]["held"].as_u64().unwrap() > 10_000_000, "{stats}");
    drop(mount);
    // The cache is there for the next mount, which compares nothing again.
    let mount = world.mount_with(&at, &flags);
    mount.run("cold/numpy", "import numpy");
    let stats = world.json(["stats", at.to_str().unwrap()]);
    assert_eq!(stats["cache"]["corrupt_in_cache"], 0);
    assert!(stats["cache"]["fetched_bytes"].as_u64().unwrap() < 100_000, "{stats}");
    drop(mount);
    let _ = fs::remove_dir_all(world.store().parent().unwrap());
}

#[test]
fn a_mistake_in_what_a_cold_node_is_told_is_wrong_usage() {
    let world = World::new();
    for (args, needle) in [
        (vec!["mount", "--cache-size", "many"], "20GiB"),
        (vec!["mount", "--cache-free=-1"], "size"),
        (vec!["mount", "--patience", "0s"], "30s"),
        (vec!["init", "--compression", "gzip"], "zstd"),
        (vec!["warm"], "WF/NODE"),
        (vec!["profile", "a/b"], "COMMAND"),
    ] {
        let stderr = world.fails(2, &args);
        assert!(stderr.contains(needle), "{args:?}: {stderr}");
    }
    for args in [vec!["warm", "no/such"], vec!["profile", "no/such", "--", "true"]] {
        let stderr = world.fails(1, &args);
        assert!(stderr.contains("no/such"), "{args:?}: {stderr}");
    }
    let other = world.fails(1, ["init", "--compression", "zstd"]);
    assert!(other.contains("another compression"), "{other}");
    // A raw store on a local disk is read in place: nothing needs to be brought.
    world.ok(["create", "a/b", "six", "--python", &python311()]);
    assert!(world.ok(["warm", "a/b", "--wait"]).contains("nothing more"));
}
