//! Test suites of real packages, from the mount and from an ordinary venv.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::world::{World, check, clean, python311, text, uv};

/// What runs, as modules below site-packages. Some minutes for both sides together.
const TESTS: &[&str] = &[
    "numpy/linalg/tests",
    "numpy/lib/tests/test_io.py",
    "numpy/lib/tests/test_format.py",
    "numpy/_core/tests/test_mem_overlap.py",
    "numpy/_core/tests/test_dtype.py",
    "numpy/random/tests/test_generator_mt19937.py",
    "pandas/tests/frame/indexing",
    "pandas/tests/io/parser/common",
    "pandas/tests/io/json",
];

#[test]
fn numpys_and_pandas_own_tests_have_the_same_outcome_as_in_an_ordinary_venv() {
    let world = World::shared();
    let python = python311();
    // pytest's own caches and temporary files go elsewhere; pandas 2 and numpy 2 carry their tests in the wheel.
    let packages = ["numpy", "pandas", "pytest", "hypothesis", "--python", &python];
    world.ensure("suites/a", &packages);
    let mount = world.mount();
    let reference = world.dir().join("suites");
    let _ = fs::remove_dir_all(&reference);
    fs::create_dir(&reference).unwrap();
    let lock = reference.join("pylock.toml");
    fs::copy(mount.at.join("suites/a/pylock.toml"), &lock).unwrap();
    let venv = reference.join(".venv");
    let quiet = |args: &[&str]| check(Command::new(uv()).args(args).env_remove("VIRTUAL_ENV"));
    quiet(&["venv", "--quiet", "--python", &python, venv.to_str().unwrap()]);
    quiet(&["pip", "sync", "--quiet", "--python", venv.to_str().unwrap(), lock.to_str().unwrap()]);

    let sides = [("mount", mount.venv("suites/a")), ("plain", venv)];
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> =
            sides.iter().map(|(side, venv)| scope.spawn(|| outcomes(&reference, side, venv))).collect();
        running.into_iter().map(|r| r.join().unwrap()).collect()
    });
    let [ours, theirs] = &outcomes[..] else { panic!() };
    let passed = ours.values().filter(|o| *o == "passed").count();
    println!("{} tests ran on both sides, {passed} passed", ours.len());
    assert!(passed > 5000, "only {passed} passed");
    let differ: Vec<_> = ours
        .iter()
        .filter(|(test, outcome)| theirs.get(*test) != Some(outcome))
        .map(|(test, outcome)| format!("{test}: mount {outcome}, venv {:?}", theirs.get(test)))
        .chain(theirs.keys().filter(|t| !ours.contains_key(*t)).map(|t| format!("{t}: only in the venv")))
        .collect();
    assert!(differ.is_empty(), "{} outcomes differ:\n{}", differ.len(), differ.join("\n"));
}

/// Outcome of each test, by its id.
fn outcomes(dir: &Path, side: &str, venv: &Path) -> BTreeMap<String, String> {
    let plugin = dir.join(format!("plugin-{side}"));
    fs::create_dir(&plugin).unwrap();
    let report = dir.join(format!("{side}.txt"));
    fs::write(
        plugin.join("outcomes.py"),
        "import os\n\
         seen = {}\n\
         def pytest_runtest_logreport(report):\n\
         \x20   if report.when == 'call' or report.outcome != 'passed': seen[report.nodeid] = report.outcome\n\
         def pytest_sessionfinish():\n\
         \x20   with open(os.environ['OUTCOMES'], 'w') as f:\n\
         \x20       for k in sorted(seen): f.write('%s %s\\n' % (seen[k], k.replace('\\n', ' ')))\n",
    )
    .unwrap();
    // Without symlinks in it, or pytest names the tests otherwise.
    let site = fs::canonicalize(venv).unwrap().join("lib/python3.11/site-packages");
    let mut command = Command::new(venv.join("bin/python"));
    command
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "outcomes", "--rootdir"])
        .arg(&site)
        .args(["--basetemp", dir.join(format!("tmp-{side}")).to_str().unwrap()])
        .args(["-m", "not slow and not network and not single_cpu", "-W", "ignore"])
        .args(TESTS)
        .current_dir(&site);
    let mut command = clean(&mut command);
    command.env("PYTHONPATH", &plugin).env("OUTCOMES", &report).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("HYPOTHESIS_STORAGE_DIRECTORY", dir.join(format!("hypothesis-{side}")));
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let lines =
        fs::read_to_string(&report).unwrap_or_else(|e| panic!("{e}: {}{}", text(&output.stdout), text(&output.stderr)));
    lines.lines().filter_map(|l| l.split_once(' ')).map(|(outcome, id)| (id.to_string(), outcome.to_string())).collect()
}
