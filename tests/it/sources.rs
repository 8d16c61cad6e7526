//! Every source that an environment can come from.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::wheels::Wheel;
use crate::world::{World, check, python311, sh, uv};

fn packages(world: &World, name: &str) -> Vec<String> {
    let shown = world.json(["show", name]);
    let list = shown["packages"].as_array().unwrap();
    list.iter().map(|p| format!("{}=={}", p["name"].as_str().unwrap(), p["version"].as_str().unwrap())).collect()
}

fn names(world: &World, name: &str) -> Vec<String> {
    packages(world, name).iter().map(|p| p.split("==").next().unwrap().to_string()).collect()
}

#[test]
fn requirements_with_hashes_urls_vcs_local_wheels_and_source_directories() {
    let world = World::shared();
    let python = python311();
    let dir = tempfile::tempdir_in(world.dir()).unwrap();
    let wheel = Wheel::new("localwheel", "2.0").file("localwheel.py", "x = 2\n").write(dir.path());
    let source = project(&dir.path().join("srcdir"), "srcpkg", &[]);
    let repo = project(&dir.path().join("gitrepo"), "gitpkg", &[]);
    sh(&format!("cd {}; git init -q; git add -A; git -c user.name=t -c user.email=t@t commit -qm x", repo.display()));
    let hashed = dir.path().join("hashed.txt");
    fs::write(&hashed, "six==1.16.0 --hash=sha256:8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254\n")
        .unwrap();
    // A hash that the index does not have is held to, wherever it is written, also for a layer that is known.
    let wrong = "0".repeat(64);
    let bad = dir.path().join("bad.txt");
    let cases = [
        format!("six==1.16.0 --hash=sha256:{wrong}"),
        format!("-r hashed.txt\nidna==3.7 \\\n  --hash=sha256:{wrong}"),
        format!("localwheel @ file://{}#sha256={wrong}", wheel.display()),
        "--require-hashes\nsix==1.16.0".to_string(),
        "six==1.16.0 --hash=sha256:deadbeef".to_string(),
    ];
    for text in cases {
        fs::write(&bad, &text).unwrap();
        let stderr = world.fails(1, ["create", "sources/hashes", "-r", bad.to_str().unwrap(), "--python", &python]);
        assert!(stderr.contains("hash"), "{text}: {stderr}");
    }
    let plain = dir.path().join("plain.txt");
    fs::write(&plain, format!("# a comment\nidna<4\n{}\ngitpkg @ git+file://{}\n", wheel.display(), repo.display()))
        .unwrap();
    world.ok(["create", "sources/requirements", "--python", &python, "-r", hashed.to_str().unwrap()]);
    assert_eq!(packages(world, "sources/requirements"), ["six==1.16.0"]);
    // Standard input is a file like any other, and the same text is the same environment.
    for _ in 0..2 {
        let mut piped = world.command(["create", "sources/piped", "-r", "-", "--python", &python]);
        let mut piped = piped.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
        std::io::Write::write_all(piped.stdin.as_mut().unwrap(), b"six==1.16.0\n").unwrap();
        drop(piped.stdin.take());
        assert!(piped.wait().unwrap().success());
        assert_eq!(packages(world, "sources/piped"), ["six==1.16.0"]);
    }
    assert_eq!(world.json(["versions", "sources/piped"]).as_array().unwrap().len(), 1);
    // A hash that the index does not have is held to, wherever it is written, also for a layer that is known.
    let wrong = "0".repeat(64);
    let bad = dir.path().join("bad.txt");
    let cases = [
        format!("six==1.16.0 --hash=sha256:{wrong}"),
        format!("-r hashed.txt\nidna==3.7 \\\n  --hash=sha256:{wrong}"),
        format!("localwheel @ file://{}#sha256={wrong}", wheel.display()),
        "--require-hashes\nsix==1.16.0".to_string(),
        "six==1.16.0 --hash=sha256:deadbeef".to_string(),
    ];
    for text in cases {
        fs::write(&bad, &text).unwrap();
        let stderr = world.fails(1, ["create", "sources/hashes", "-r", bad.to_str().unwrap(), "--python", &python]);
        assert!(stderr.contains("hash"), "{text}: {stderr}");
    }
    let plain = dir.path().join("plain.txt");
    fs::write(&plain, format!("# a comment\nidna<4\n{}\ngitpkg @ git+file://{}\n", wheel.display(), repo.display()))
        .unwrap();
    world.ok(["create", "sources/requirements", "--python", &python, "-r", hashed.to_str().unwrap()]);
    assert_eq!(packages(world, "sources/requirements"), ["six==1.16.0"]);
    // Standard input is a file like any other.
    let mut piped = world.command(["create", "sources/piped", "-r", "-", "--python", &python]);
    let mut piped = piped.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(piped.stdin.as_mut().unwrap(), b"six==1.16.0\n").unwrap();
    drop(piped.stdin.take());
    assert!(piped.wait().unwrap().success());
    assert_eq!(packages(world, "sources/piped"), ["six==1.16.0"]);
    world.ok([
        "create",
        "sources/mixed",
        "docopt",
        source.to_str().unwrap(),
        "-r",
        plain.to_str().unwrap(),
        "--python",
        &python,
    ]);
    assert_eq!(names(world, "sources/mixed"), ["docopt", "gitpkg", "idna", "localwheel", "srcpkg"]);
    let mount = world.mount();
    mount.run("sources/mixed", "import docopt, gitpkg, idna, localwheel, srcpkg; assert srcpkg.NAME == 'srcpkg'");
    // The lock is there to look at, and is a lock.
    let lock = fs::read_to_string(mount.at.join("sources/mixed/pylock.toml")).unwrap();
    assert!(lock.contains("lock-version") && lock.contains("name = \"docopt\""), "{lock}");
    let metadata = fs::read_to_string(mount.at.join("sources/mixed/metadata.json")).unwrap();
    let metadata: serde_json::Value = serde_json::from_str(&metadata).unwrap();
    assert_eq!(metadata["packages"].as_array().unwrap().len(), 5);

    // A source directory is built again when it has changed.
    fs::write(source.join("src/srcpkg/__init__.py"), "NAME = 'changed'\n").unwrap();
    world.ok(["create", "sources/mixed", source.to_str().unwrap(), "--python", &python]);
    let mount = world.mount();
    mount.run("sources/mixed", "import srcpkg; assert srcpkg.NAME == 'changed', srcpkg.NAME");
}

/// A project directory with a `src/<name>` package; returns it.
fn project(dir: &Path, name: &str, dependencies: &[&str]) -> std::path::PathBuf {
    let package = dir.join("src").join(name);
    fs::create_dir_all(&package).unwrap();
    fs::write(package.join("__init__.py"), format!("NAME = '{name}'\n")).unwrap();
    let dependencies: Vec<String> = dependencies.iter().map(|d| format!("{d:?}")).collect();
    fs::write(
        dir.join("pyproject.toml"),
        format!(
            "[project]\nname = \"{name}\"\nversion = \"0.1\"\nrequires-python = \">=3.9\"\ndependencies = [{}]\n\
             [project.optional-dependencies]\nextra = [\"idna\"]\n\
             [dependency-groups]\ndev = [\"six\"]\nlint = [\"decorator\"]\n\
             [build-system]\nrequires = [\"setuptools\"]\nbuild-backend = \"setuptools.build_meta\"\n",
            dependencies.join(", ")
        ),
    )
    .unwrap();
    dir.to_path_buf()
}

#[test]
fn a_project_with_groups_and_extras_and_its_uv_lock_alone() {
    let world = World::shared();
    let python = python311();
    let dir = tempfile::tempdir_in(world.dir()).unwrap();
    let project = project(&dir.path().join("proj"), "proj", &["click"]);
    let p = project.to_str().unwrap();

    // Without a lock: told what to do, and nothing is written into the user's project.
    let stderr = world.fails(1, ["create", "sources/project", "--project", p, "--python", &python]);
    assert!(stderr.contains("uv lock"), "{stderr}");
    assert!(!project.join("uv.lock").exists());

    check(Command::new(uv()).args(["lock", "--quiet", "--project", p, "--python", &python]));
    world.ok(["create", "sources/project", "--project", p, "--python", &python]);
    let default = names(world, "sources/project");
    assert!(default.contains(&"proj".into()) && default.contains(&"click".into()), "{default:?}");
    assert!(!default.contains(&"idna".into()) && !default.contains(&"decorator".into()), "{default:?}");
    world.ok(["create", "sources/project", "--project", p, "--python", &python, "--extra", "extra", "--group", "lint"]);
    let chosen = names(world, "sources/project");
    assert!(chosen.contains(&"idna".into()) && chosen.contains(&"decorator".into()), "{chosen:?}");
    let stderr = world.fails(1, ["create", "sources/project", "--project", p, "--python", &python, "--extra", "nope"]);
    assert!(stderr.contains("nope"), "{stderr}");

    let mount = world.mount();
    mount.run("sources/project", "import proj, click, idna; assert 'site-packages' in proj.__file__, proj.__file__");
    let base = mount.at.join("sources/project");
    assert_eq!(fs::read(base.join("uv.lock")).unwrap(), fs::read(project.join("uv.lock")).unwrap());
    assert_eq!(fs::read(base.join("pyproject.toml")).unwrap(), fs::read(project.join("pyproject.toml")).unwrap());

    // The lock alone, of a project that only names packages of the index.
    let alone = dir.path().join("alone");
    fs::create_dir(&alone).unwrap();
    fs::write(
        alone.join("pyproject.toml"),
        "[project]\nname = \"alone\"\nversion = \"0\"\nrequires-python = \">=3.9\"\ndependencies = [\"click\"]\n",
    )
    .unwrap();
    check(Command::new(uv()).args(["lock", "--quiet", "--project", alone.to_str().unwrap(), "--python", &python]));
    let lock = dir.path().join("elsewhere");
    fs::create_dir(&lock).unwrap();
    fs::copy(alone.join("uv.lock"), lock.join("uv.lock")).unwrap();
    world.ok(["create", "sources/uvlock", "--lock", lock.join("uv.lock").to_str().unwrap(), "--python", &python]);
    assert_eq!(names(world, "sources/uvlock"), ["click"]);

    // A lock that is out of date is told.
    let text = fs::read_to_string(alone.join("pyproject.toml")).unwrap().replace("\"click\"", "\"click\", \"six\"");
    fs::write(alone.join("pyproject.toml"), text).unwrap();
    let stderr = world.fails(1, ["create", "sources/stale", "--project", alone.to_str().unwrap(), "--python", &python]);
    assert!(stderr.contains("uv lock"), "{stderr}");
}

#[test]
fn a_pylock_of_known_layers_needs_no_uv_and_gives_the_same_layers() {
    let world = World::shared();
    let python = python311();
    world.ensure("sources/first", &["requests", "pyyaml", "--python", &python]);
    let mount = world.mount();
    let lock = world.dir().join("pylock.known.toml");
    fs::copy(mount.at.join("sources/first/pylock.toml"), &lock).unwrap();
    let args = ["create", "sources/second", "--lock", lock.to_str().unwrap(), "--python", &python];
    let output = world.command(args).env("ENVFABRIC_UV", "/nonexistent/uv").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(packages(world, "sources/first"), packages(world, "sources/second"));
    let layers = |name: &str| world.json(["show", name])["layers"].clone();
    assert_eq!(layers("sources/first"), layers("sources/second"));
    // Once more: nothing has changed, so there is no new version.
    let again = world.json(args);
    assert_eq!(again["outcome"], "unchanged", "{again}");
    assert_eq!(world.json(["versions", "sources/second"]).as_array().unwrap().len(), 1);
}
