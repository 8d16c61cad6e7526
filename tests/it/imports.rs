//! The import accelerator: cheaper imports, and nothing else that anybody could notice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::world::{Mount, World, check, clean, is_root, python, python311, sh};

const PACKAGES: &[&str] = &[
    "numpy",
    "pandas",
    "setuptools",
    "packaging",
    "jaraco.context",
    "jaraco.functools",
    "pyyaml",
    "protobuf",
    "googleapis-common-protos",
];
const FEW: &[&str] = &["packaging", "jaraco.context", "jaraco.functools"];

fn script(name: &str) -> String {
    format!("{}/tests/it/imports/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// `ENVFABRIC_IMPORTS=<imports>`, no other variable that Python looks at, `python SCRIPT ARGS`.
fn run(python: &Path, imports: &str, args: &[&str]) -> String {
    check(clean(Command::new(python).args(args)).env("ENVFABRIC_IMPORTS", imports))
}

fn ensure(world: &World, name: &str, packages: &[&str], python: &str) {
    world.ensure(name, &[packages, &["--python", python]].concat());
}

/// Every Python there is here, with an environment of [`FEW`].
fn of_every_python(world: &World) -> Vec<String> {
    let minors = ["3.9", "3.10", "3.11", "3.12", "3.13"];
    let found = minors.iter().filter_map(|minor| Some((*minor, python(minor)?)));
    let names = found.map(|(minor, python)| {
        let name = format!("imports/few{}", minor.replace('.', "-"));
        ensure(world, &name, FEW, python.to_str().unwrap());
        name
    });
    names.collect()
}

#[test]
fn every_module_is_found_with_the_same_spec_as_without_the_accelerator() {
    let world = World::shared();
    ensure(world, "imports/many", PACKAGES, &python311());
    let mount = world.mount();
    let specs = |imports| -> Value {
        serde_json::from_str(&run(&mount.python("imports/many"), imports, &[&script("specs.py")])).unwrap()
    };
    let (with, without) = (specs("on"), specs("off"));
    assert_eq!((&with["active"], &without["active"]), (&Value::Bool(true), &Value::Bool(false)));
    let (with, without) = (with["found"].as_object().unwrap(), without["found"].as_object().unwrap());
    let mut modules = 0;
    for (directory, theirs) in without {
        let ours = with[directory].as_object().unwrap();
        for (name, spec) in theirs.as_object().unwrap() {
            assert_eq!(ours.get(name), Some(spec), "{name} in {directory}");
            modules += usize::from(!spec.is_null());
        }
        assert_eq!(ours.len(), theirs.as_object().unwrap().len());
    }
    assert!(modules > 3000, "{modules}");
}

#[test]
fn what_is_offered_to_imports_is_what_the_files_are() {
    let world = World::shared();
    ensure(world, "imports/many", PACKAGES, &python311());
    let mount = world.mount();
    let mut names = of_every_python(world);
    names.push("imports/many".into());
    for name in names {
        let counted = run(&mount.python(&name), "on", &[&script("packs.py")]);
        println!("{name}: modules, packages, extension modules, left to CPython: {counted}");
        let counted: Vec<usize> = counted.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert!(counted[0] > 300 && counted[1] > 30 && counted[2] > 30, "{name}: {counted:?}");
    }
}

#[test]
fn imports_mean_what_they_mean_without_the_accelerator() {
    let world = World::shared();
    let mount = world.mount();
    for name in of_every_python(world) {
        for imports in ["on", "off"] {
            let told = run(&mount.python(&name), imports, &[&script("semantics.py"), imports]);
            assert_eq!(told, "done\n", "{name} {imports}");
        }
    }
}

#[test]
fn cpythons_own_tests_of_imports_pass_with_the_accelerator() {
    let world = World::shared();
    let mount = world.mount();
    let mut ran = 0;
    for name in of_every_python(world) {
        let minor = name.rsplit("few").next().unwrap().replace('-', ".");
        let tests = mount.at.join(&name).join(format!(".python/lib/python{minor}/test/test_importlib"));
        if !tests.is_dir() {
            eprintln!("skipped: Python {minor} has no test package here (Debian: libpython3.11-testsuite)");
            continue;
        }
        let args = [
            &script("cpython.py"),
            "test_importlib",
            "test_import",
            "test_pkgutil",
            "test_runpy",
            "test_zipimport",
            "test_zipimport_support",
        ];
        let told = run(&mount.python(&name), "on", &args);
        assert!(told.starts_with("active\n"), "{told}");
        println!("Python {minor}: {}", told.lines().rfind(|line| line.contains("otal")).unwrap_or_default());
        ran += 1;
    }
    assert!(ran > 0 || std::env::var_os("CI").is_none(), "no Python here has its test package: run scripts/test");
}

#[test]
fn the_accelerator_is_off_where_a_variable_an_option_or_a_flag_says_so() {
    let world = World::shared();
    ensure(world, "imports/few3-11", FEW, &python311());
    let told = |mount: &Mount<'_>, imports: &str, flags: &[&str]| {
        let args = [flags, &["-c", "import _envfabric; print(_envfabric.start())"]].concat();
        run(&mount.python("imports/few3-11"), imports, &args) == "True\n"
    };
    let mount = world.mount();
    assert!(told(&mount, "on", &[]));
    assert!(told(&mount, "", &["-I"]));
    for (imports, flags) in [("off", &[][..]), ("0", &[]), ("no", &[]), ("on", &["-O"]), ("on", &["-v"])] {
        assert!(!told(&mount, imports, flags), "{imports} {flags:?}");
    }
    assert!(told(&mount, "off", &["-E"]), "-E ignores the environment");
    let at = world.dir().join("plain-imports");
    world.ok(["mount", "--plain-imports", at.to_str().unwrap()]);
    let venv = at.join("imports/few3-11/.venv");
    let told = run(&venv.join("bin/python"), "on", &["-c", "import _envfabric; print(_envfabric.start())"]);
    assert_eq!(told, "False\n");
    assert!(!venv.join("../.imports").exists());
    world.ok(["umount", "--lazy", at.to_str().unwrap()]);
}

#[test]
fn a_file_that_is_put_over_one_of_an_environment_is_what_is_imported() {
    if !is_root() {
        eprintln!("skipped: mounting over a file needs root");
        return;
    }
    let world = World::shared();
    ensure(world, "imports/few3-11", FEW, &python311());
    let mount = world.mount();
    let version = fs::canonicalize(mount.venv("imports/few3-11")).unwrap().parent().unwrap().to_path_buf();
    let site = version.join(".venv/lib/python3.11/site-packages");
    let code = "import _envfabric; started = _envfabric.start(); import packaging.version as v, packaging; \
                print(started, getattr(v, 'mine', 0), getattr(packaging, 'mine', 0))";
    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("mine.py");
    let text = fs::read_to_string(site.join("packaging/version.py")).unwrap();
    let in_namespace = |script: &str| sh(&format!("unshare -m --propagation private bash -euc '{script}'"));
    let python = version.join(".venv/bin/python");
    let check = dir.path().join("check.py");
    fs::write(&check, code).unwrap();
    assert_eq!(run(&python, "on", &[check.to_str().unwrap()]), "True 0 0\n");
    // One file, one directory, and all of it below a writable overlay.
    fs::write(&mine, format!("{text}\nmine = 7\n")).unwrap();
    let told = in_namespace(&format!(
        "touch -d @946684800 {0}; mount --bind {0} {1}/packaging/version.py; {2} {3}",
        mine.display(),
        site.display(),
        python.display(),
        check.display()
    ));
    assert_eq!(told, "True 7 0\n", "a file");
    let copy = dir.path().join("copied");
    let told = in_namespace(&format!(
        "cp -a {1}/packaging {0}; echo mine=8 >> {0}/__init__.py; touch -d @946684800 {0}/__init__.py; \
         mount --bind {0} {1}/packaging; {2} {3}",
        copy.display(),
        site.display(),
        python.display(),
        check.display()
    ));
    assert_eq!(told, "True 0 8\n", "a directory");
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| dir.path().join(name));
    [&upper, &work, &merged].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let told = in_namespace(&format!(
        "mount -t overlay overlay -o lowerdir={},upperdir={},workdir={} {3}; cd {3}/.venv/lib/python3.11/site-packages; \
         echo mine=9 >> packaging/version.py; touch -d @946684800 packaging/version.py; echo x=1 > added.py; \
         {3}/.venv/bin/python {4}; {3}/.venv/bin/python -c \"import added; print(added.x)\"",
        version.display(),
        upper.display(),
        work.display(),
        merged.display(),
        check.display()
    ));
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].ends_with(" 9 0") && lines[1] == "1", "an overlay: {told}");
}

/// Before it starts, and with what was there before it started.
#[test]
fn whoever_wraps_the_finder_at_any_time_is_asked_and_nothing_goes_round_in_circles() {
    let world = World::shared();
    let mount = world.mount();
    let wrap = "asked = []\n\
                def wrap(inner):\n\
                \x20   def find_spec(self, fullname, target=None):\n\
                \x20       asked.append(fullname)\n\
                \x20       return inner(self, fullname, target)\n\
                \x20   finder.find_spec = find_spec\n";
    let check = "import argparse, json.tool, email.mime.text, html.parser, wsgiref.simple_server, packaging.version\n\
                 assert {'argparse', 'packaging.version'} <= set(asked), asked\n\
                 print(_envfabric.start())\n";
    let begin = "import _envfabric\nfrom importlib.machinery import FileFinder as finder\n";
    for name in of_every_python(world) {
        for (how, active) in [
            ("wrap(finder.find_spec)\n", "False\n"),
            ("_envfabric.start()\nwrap(finder.find_spec)\n", "True\n"),
            ("first = finder.find_spec\n_envfabric.start()\nwrap(first)\n", "True\n"),
        ] {
            let told = run(&mount.python(&name), "on", &["-c", &format!("{begin}{wrap}{how}{check}")]);
            assert_eq!(told, active, "{name}: {how}");
        }
    }
}

/// The reason that there is an accelerator, told in requests and not in time.
#[test]
fn a_hundred_modules_cost_the_mount_a_few_requests() {
    let world = World::new();
    let imports: String = (0..100).map(|n| format!("from . import m{n}\n")).collect();
    // Bytecode of more than a small file does not lie in the pack; that of the modules below does.
    let large = format!("{imports}text = '{}'\n", "long ".repeat(40_000));
    let mut wheel = crate::wheels::Wheel::new("hundred", "1.0").file("hundred/__init__.py", large);
    for n in 0..100 {
        wheel = wheel.file(&format!("hundred/m{n}.py"), format!("number = {n}\n"));
    }
    let wheel = wheel.write(world.dir()).display().to_string();
    world.ok(["create", "imports/hundred", &wheel, "--python", &python311()]);
    let mount = world.mount();
    let requests = |imports: &str, code: &str| -> u64 {
        let python = mount.python("imports/hundred");
        let counted = || -> u64 {
            let stats = world.json(["stats", mount.at.to_str().unwrap()]);
            ["OPEN", "RELEASE", "IOCTL"].iter().map(|kind| stats["requests"][kind].as_u64().unwrap()).sum()
        };
        run(&python, imports, &["-c", code]);
        let before = counted();
        run(&python, imports, &["-c", code]);
        counted() - before
    };
    let cost = |imports: &str| requests(imports, "import hundred.m99") - requests(imports, "pass");
    let (with, without) = (cost("on"), cost("off"));
    println!("101 modules: {with} requests, {without} without");
    assert!(with < 40, "{with}");
    assert!(without > 200, "{without}");
}

/// Decision 13: a process that was started by the moving name imports what is current then.
#[test]
fn after_a_switch_a_moving_path_imports_the_new_version_and_a_pinned_path_the_old() {
    let world = World::new();
    let python = python311();
    world.ok(["create", "imports/switch", "packaging==24.0", "six", "--python", &python]);
    world.ok(["create", "imports/switch", "packaging==24.1", "idna", "--python", &python]);
    let mount = world.mount();
    let code = "import sys, _envfabric\n\
                started = _envfabric.start()\n\
                import packaging\n\
                print(started, packaging.__version__, flush=True)\n\
                sys.stdin.readline()\n\
                for name in [n for n in sys.modules if n.startswith('packaging')]: del sys.modules[name]\n\
                import packaging, packaging.version\n\
                def has(name):\n\
                \x20   try: __import__(name); return True\n\
                \x20   except ModuleNotFoundError: return False\n\
                print(packaging.__version__, has('six'), has('idna'))\n";
    let pinned = fs::canonicalize(mount.venv("imports/switch")).unwrap().join("bin/python");
    let start = |python: PathBuf| {
        let mut child = clean(Command::new(python).args(["-c", code]));
        child.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mut children = [start(mount.python("imports/switch")), start(pinned)];
    let mut outputs: Vec<_> = children.iter_mut().map(|c| std::io::BufReader::new(c.stdout.take().unwrap())).collect();
    let line = |out: &mut std::io::BufReader<std::process::ChildStdout>| {
        let mut line = String::new();
        std::io::BufRead::read_line(out, &mut line).unwrap();
        line
    };
    for out in &mut outputs {
        assert_eq!(line(out), "True 24.1\n");
    }
    world.ok(["rollback", "imports/switch", "1"]);
    let link = mount.venv("imports/switch");
    crate::world::until("the switch", std::time::Duration::from_secs(10), || {
        fs::read_link(&link).is_ok_and(|target| target == Path::new(".versions/1/.venv"))
    });
    for child in &mut children {
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"\n").unwrap();
    }
    assert_eq!(line(&mut outputs[0]), "24.0 True False\n", "by the moving name");
    assert_eq!(line(&mut outputs[1]), "24.1 False True\n", "by the pinned path");
    children.iter_mut().for_each(|child| assert!(child.wait().unwrap().success()));
}
