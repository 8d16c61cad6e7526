//! Collecting and repairing with the whole program, beside a mount that is in use.

use std::fs;
use std::path::Path;

use crate::world::{World, check, python311};

const AT_ONCE: [&str; 3] = ["gc", "--grace", "0s"];

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_a_job_uses_stays_until_its_mount_is_gone_and_what_was_removed_can_be_had_back() {
    let world = World::new();
    let python = python311();
    let create = |name: &str, packages: &[&str]| {
        let args: Vec<&str> = ["create", name, "--python", &python].iter().chain(packages).copied().collect();
        world.ok(args);
    };
    create("etl/a", &["six==1.16.0"]);
    create("etl/a", &["six==1.16.0", "idna==3.7"]);
    create("etl/b", &["idna==3.7"]);
    // `run` mounts, and the mount stays.
    let six = ["run", "etl/a@1", "--", "python", "-c", "import six; print(six.__version__)"];
    assert_eq!(world.ok(six).trim(), "1.16.0");
    let leases = world.store().join("leases");
    let is_leased = || fs::read_dir(&leases).is_ok_and(|mut entries| entries.next().is_some());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !is_leased() {
        assert!(std::time::Instant::now() < deadline, "no lease was published");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    world.ok(["remove", "etl/a", "etl/b"]);
    let told = world.json(AT_ONCE.iter().chain(&["--dry-run"]));
    assert_eq!(told["retired"], serde_json::json!(["etl/a@2", "etl/b@1"]), "{told}");
    for _ in 0..5 {
        world.ok(AT_ONCE);
        assert_eq!(world.ok(six).trim(), "1.16.0");
    }
    assert!(world.ok(["remove", "--undo", "etl/a"]).contains("at version 1"), "2 was collected for good");
    assert!(world.fails(1, ["remove", "--undo", "etl/b"]).contains("create etl/b"));
    assert!(world.fails(1, ["remove", "--undo", "etl/a"]).contains("was not removed"));
    world.ok(["umount"]);
    assert!(!is_leased());
    // Numbers go on, and all that is left is sound.
    create("etl/a", &["idna==3.7"]);
    assert_eq!(world.json(["show", "etl/a"])["number"], 3);
    world.ok(["fsck"]);
}

#[test]
fn a_store_is_repaired_and_its_index_begun_anew() {
    let world = World::new();
    world.ok(["create", "etl/a", "six==1.16.0", "--python", &python311()]);
    let layers = |world: &World| world.json(["index", "rebuild"])["layers"].as_u64();
    assert_eq!(layers(&world), Some(3));
    let packs = world.store().join("packs");
    let all: Vec<_> = fs::read_dir(&packs).unwrap().flatten().collect();
    assert_eq!(all.len(), 3);
    for pack in &all {
        flip(&pack.path());
    }
    world.fails(1, ["fsck"]);
    let told = world.json(["fsck", "--repair"]);
    let outcomes: Vec<&serde_json::Value> =
        told["repair"]["layers"].as_object().unwrap().values().map(|layer| &layer["outcome"]).collect();
    assert_eq!(outcomes, ["rebuilt"; 3], "{told}");
    assert_eq!(told["repair"]["copied"].as_array().map(Vec::len), Some(3));
    assert_eq!(world.ok(["run", "etl/a", "--", "python", "-c", "import six; print(1)"]).trim(), "1");
    check(&mut world.command(["fsck", "--rate", "1GB"]));
    world.ok(["umount"]);
}
