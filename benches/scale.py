#!/usr/bin/env python3
"""Ten thousand environments: how fast they are made, what they take, how a mount of them behaves.

    python3 benches/scale.py --dir DIR [--environments 10000] [--python 3.11]

About 300 small wheels from PyPI become known to a store in DIR (1 GB; begun anew each time, but for uv's cache); then
environments are created from 100 locks over them, one process each, two at a time, and mounted. Needs a release build
and uv. `rows` is what `scripts/bench` calls.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import time
import tomllib

from harness import Failed, Row

ROOT = pathlib.Path(__file__).resolve().parent.parent

# With what they require, about 300 wheels.
PACKAGES = """
aiohttp alembic apscheduler ariadne arrow attrs autopep8 azure-core babel backoff beartype beautifulsoup4 black boltons
bottle build cachetools cattrs cerberus click cloudpickle colorama configobj coverage croniter cytoolz deap
decorator diskcache django django-cors-headers django-debug-toolbar django-filter djangorestframework docutils dramatiq
dulwich dynaconf email-validator environs factory-boy falcon fastapi feedparser filelock flake8 flask flask-cors
flask-login flask-migrate flask-sqlalchemy flask-wtf freezegun fsspec gitpython google-auth graphene gunicorn
html5lib httpx humanize hypercorn hypothesis invoke ipython isort jinja2 joblib jsonschema kombu
lark loguru luigi mako markdown marshmallow mistune more-itertools mpmath mypy-extensions nbformat
networkx omegaconf openpyxl opentelemetry-sdk packaging paramiko pdoc peewee pendulum pexpect pika pip-tools 
pluggy plumbum ply poetry-core portalocker pre-commit prettytable prometheus-client psutil pycodestyle pydantic
pydocstyle pylint pyparsing pypdf pytest pytest-asyncio pytest-cov pytest-mock pytest-randomly
pytest-timeout pytest-xdist python-dateutil python-docx python-dotenv python-json-logger python-socketio pytz pyyaml
quart rapidfuzz redis requests responses retrying rich rq schedule schema semver sentry-sdk sh simpy 
sqlalchemy starlette stevedore structlog sympy tabulate tenacity textdistance toml tomlkit
toolz tornado tox tqdm traitlets twine typeguard typer uvicorn validators vcrpy virtualenv voluptuous waitress watchdog
websockets wrapt xlsxwriter yapf 
""".split()
LOCKS = 100
KNOWN = 160


class Bench:
    """A store of its own in `base`, with the command line bound to it."""

    def __init__(self, base, tool, uv, python="3.11", say=lambda text: None):
        self.base, self.tool, self.uv, self.python, self.say = pathlib.Path(base), str(tool), str(uv), python, say
        self.store, self.mountpoint = self.base / "store", self.base / "envs"
        self.cache = self.base / "uv-cache"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ENVFABRIC_", "VIRTUAL_ENV"))}
        env.update(ENVFABRIC_STORE=self.store, ENVFABRIC_MOUNT=self.mountpoint, ENVFABRIC_UV=self.uv)
        env.update(ENVFABRIC_CONFIG="/dev/null")
        env.update(XDG_STATE_HOME=self.base / "state", ENVFABRIC_SCRATCH=self.base / "scratch")
        env.update(UV_CACHE_DIR=self.cache, UV_LINK_MODE="hardlink")
        self.env = {k: str(v) for k, v in env.items()}

    def run(self, *command):
        """Seconds and standard output; a failure ends the benchmark with what was said."""
        begun = time.perf_counter()
        done = subprocess.run([str(c) for c in command], env=self.env, capture_output=True, text=True, cwd=self.base)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise Failed(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return seconds, done.stdout

    def fabric(self, *args):
        return self.run(self.tool, *args)

    def create(self, name, lock):
        return self.fabric("create", "-q", name, "--lock", lock)[0]

    def begin(self):
        for room in ("store", "state", "scratch", "locks", "venv", "universe"):
            shutil.rmtree(self.base / room, ignore_errors=True)
        (self.base / "locks").mkdir(parents=True)
        (self.base / "universe").mkdir()
        self.fabric("init")


class Universe:
    """One lock over all packages, cut down to consistent parts of it."""

    def __init__(self, bench):
        self.dir = bench.base / "locks"
        project = bench.base / "universe"
        python = f"=={bench.python}.*"
        text = f'[project]\nname = "universe"\nversion = "0"\nrequires-python = "{python}"\ndependencies = {PACKAGES}\n'
        (project / "pyproject.toml").write_text(text)
        flags = ["--project", project, "--python", bench.python]
        bench.run(bench.uv, "lock", "-q", *flags)
        exported = project / "pylock.toml"
        kind = ["--format", "pylock.toml", "--no-header", "--no-emit-project"]
        bench.run(bench.uv, "export", "-q", *kind, "-o", exported, *flags)
        self.requires = {}
        for package in tomllib.loads((project / "uv.lock").read_text())["package"]:
            wanted = list(package.get("dependencies", []))
            wanted += [d for extra in package.get("optional-dependencies", {}).values() for d in extra]
            self.requires.setdefault(package["name"], set()).update(d["name"] for d in wanted)
        self.head, *entries = exported.read_text().split("[[packages]]\n")
        self.entries = {tomllib.loads(entry)["name"]: entry for entry in entries}
        self.tops = sorted(set(PACKAGES) & set(self.entries))

    def closure(self, names):
        seen, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name in self.entries and name not in seen:
                seen.add(name)
                todo.extend(self.requires.get(name, ()))
        return seen

    def lock(self, name, packages):
        path = self.dir / f"pylock.{name}.toml"
        path.write_text(self.head + "".join(f"[[packages]]\n{self.entries[p]}" for p in sorted(packages)))
        return path

    def part(self, chance, size):
        """A random consistent set of at least `size` packages; hardly more."""
        chosen, tops = set(), list(self.tops)
        chance.shuffle(tops)
        for top in tops:
            if len(chosen) >= size:
                break
            if len(more := chosen | self.closure([top])) <= size + 5:
                chosen = more
        return chosen


def usage(path):
    """Sum of sizes, allocated bytes and number of everything below `path`, by room of the store."""
    rooms = collections.defaultdict(lambda: [0, 0, 0])
    for dir, dirs, files in os.walk(path):
        room = rooms[pathlib.Path(dir).relative_to(path).parts[:1] or ("",)]
        for name in dirs + files:
            stat = os.lstat(os.path.join(dir, name))
            room[0] += stat.st_size if name in files else 0
            room[1] += stat.st_blocks * 512
            room[2] += name in files
    return {"/".join(room): tuple(sums) for room, sums in rooms.items()}


def grown(before, after, without=()):
    """What was added, in bytes, allocated bytes, files."""
    rooms = set(after) - set(without)
    return tuple(sum(after[room][i] - before.get(room, (0, 0, 0))[i] for room in rooms) for i in range(3))


def median_ms(seconds):
    return statistics.median(seconds) * 1000


def one_environment(bench, lock, count):
    """Creates an environment from a known lock again and again, in turn with uv; what each one adds to the store."""
    bench.create("known/first", lock)
    interpreter = json.loads(bench.fabric("python", "list", "--json")[1])[0]["origin"]
    venv = bench.base / "venv"

    def with_uv():
        shutil.rmtree(venv, ignore_errors=True)
        seconds = bench.run(bench.uv, "venv", "-q", "--relocatable", "--python", interpreter, venv)[0]
        sync = ["pip", "sync", "-q", "--preview-features", "pylock", "--python", venv, lock]
        return seconds + bench.run(bench.uv, *sync)[0]

    with_uv()
    peer, ours = [], []
    before = usage(bench.store)
    for n in range(count):
        if n % 5 == 0:
            peer.append(with_uv())
        ours.append(bench.create(f"known/n{n}", lock))
    size, blocks, files = (sum / count for sum in grown(before, usage(bench.store)))
    a, b = median_ms(ours), median_ms(peer)
    shutil.rmtree(venv)
    made = f"an environment of {KNOWN} known layers from a lock"
    return [
        Row(f"create {made}, whole command", f"{a:.1f} ms", f"{b:.0f} ms, {b / a:.0f} x", a, 40, 15, unit="ms"),
        Row(f"files that {made} adds", f"{files:.1f}", "", files, 4, unit="files"),
        Row("their bytes", f"{size / 1000:.1f} KB ({blocks / 1000:.0f} KB on disk, with directories)", "",
            size / 1000, 16, unit="KB"),
    ]


def ten_thousand(bench, locks, count):
    """Creates them all, two at a time, and looks at the whole from the command line."""
    chance = random.Random(7)
    names = [f"wide/n{n:05}" if n % 2 else f"w{n // 2 % 50:02}/n{n:05}" for n in range(10, count)]
    chance.shuffle(names)
    before = usage(bench.store)
    for name, lock in zip(names[:100], locks):
        bench.create(name, lock)  # each lock's first
    single = [bench.create(name, chance.choice(locks)) for name in names[100:150]]
    rest = [(name, chance.choice(locks)) for name in names[150:]]
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for n, _ in enumerate(pool.map(lambda job: bench.create(*job), rest)):
            if n % 1000 == 999:
                bench.say(f"{n + 1} created, {(time.perf_counter() - begun) / (n + 1) * 1000:.1f} ms each")
    each = (time.perf_counter() - begun) / len(rest)
    size, blocks, files = grown(before, usage(bench.store), without=["blobs"])
    total, amount = each * count, f"{count:,} environments"
    rows = [
        Row(f"create {amount} from {LOCKS} locks, two processes at a time",
            f"{total:.0f} s ({each * 1000:.1f} ms each, alone {median_ms(single):.1f} ms)", "", total, 400, 60, unit="s"),
        Row(f"growth of the store by {amount} beyond blobs, bytes of files", f"{size / 1e6:.0f} MB", "",
            size / 1e6, 200, unit="MB"),
        Row("growth on disk, with directories", f"{blocks / 1e6:.0f} MB, {files / (count - 10):.2f} files each", "",
            blocks / 1e6, 200, unit="MB"),
    ]
    for args in (["list"], ["list", "--json"], ["show", names[5]], ["versions", names[5]]):
        first, *more = [bench.fabric(*args)[0] for _ in range(6)]
        text = f"{median_ms(more):.0f} ms, first {first * 1000:.0f} ms"
        rows.append(Row(f"envfabric {' '.join(args)}, {amount}", text))
    return rows, names


class Mount:
    """The store mounted with the ordinary command; knows its server."""

    def __init__(self, bench):
        self.bench = bench

    def __enter__(self):
        self.bench.fabric("mount")
        mine = lambda line: b"--notify" in line and os.fsencode(self.bench.mountpoint) in line
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if mine((process / "cmdline").read_bytes().split(b"\0")):
                    self.process = process
            except OSError:
                continue
        return self

    def __exit__(self, *_):
        subprocess.run([self.bench.tool, "umount", "--lazy"], env=self.bench.env, capture_output=True)

    def memory(self):
        """Resident megabytes, now and at most."""
        lines = dict(line.split(":", 1) for line in (self.process / "status").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))

    def walk(self, names):
        begun = time.perf_counter()
        places = [self.bench.mountpoint / name for name in names]
        for part in (places[at : at + 100] for at in range(0, len(places), 100)):
            self.bench.run("find", *part, "-maxdepth", "3", "-printf", "")
        return (time.perf_counter() - begun) / len(names)

    def lookup(self, names):
        """Seconds of a lookup that the kernel cannot answer itself: of a name that is not there."""
        times = []
        for turn in range(300):
            place = f"{self.bench.mountpoint}/{names[turn % len(names)]}/absent"
            begun = time.perf_counter()
            for n in range(20):
                os.path.lexists(f"{place}{n}")
            times.append((time.perf_counter() - begun) / 20)
        return statistics.median(times)


def mounted(bench, names, count, few):
    rows = []
    times = collections.defaultdict(list)
    for _ in range(7):
        begun = time.perf_counter()
        with Mount(bench):
            for what in ("", names[0], f"{names[0]}/.venv/bin/python"):
                (bench.mountpoint / what).lstat()
                times[what.count("/")].append(time.perf_counter() - begun)
    command, node, python = (median_ms(times[depth]) for depth in sorted(times))
    rows.append(Row(f"from `envfabric mount` to the first answer, {count:,} environments",
                    f"{node:.0f} ms (the command {command:.0f} ms, an interpreter's path {python:.0f} ms)", "",
                    node, 200, 50, unit="ms"))
    walked = random.Random(8).sample(names, min(1000, len(names)))
    with Mount(bench) as mount:
        fresh, _ = mount.memory()
        listing = ["ls -f", "ls -l"]
        seconds = [[bench.run(*how.split(), bench.mountpoint / "wide")[0] for _ in range(5)] for how in listing]
        listed, _ = mount.memory()
        lookups = [mount.lookup(names[:10]) for _ in range(5)]
        first = mount.walk(walked)
        once, _ = mount.memory()
        time.sleep(1)
        second = mount.walk(walked)
        twice, most = mount.memory()
    wide = sum(name.startswith("wide/") for name in names)
    for how, (begin, *more) in zip(listing, seconds):
        text = f"{begin * 1000:.0f} ms, again {median_ms(more):.0f} ms"
        rows.append(Row(f"{how} of a workflow with {wide:,} nodes", text))
    a, b = statistics.median(lookups) * 1e6, statistics.median(few["lookups"]) * 1e6
    rows.append(Row(f"a lookup, {count:,} environments against 10", f"{a:.1f} us", f"10: {b:.1f} us", a / b, 1.1))
    rows.append(Row(f"walking {len(walked):,} environments to depth 3, each",
                    f"{first * 1000:.2f} ms, again {second * 1000:.2f} ms", f"10: {few['walk'] * 1000:.2f} ms"))
    rows.append(Row("resident memory of the mount after that", f"{once:.0f} MB, at most {most:.0f} MB (fresh "
                    f"{fresh:.0f} MB, listed {listed:.0f} MB)", "", max(once, twice), 150, 60, unit="MB"))
    rows.append(Row("resident memory after a second round", f"{twice:.1f} MB", f"first: {once:.1f} MB",
                    twice / once, 1.05))
    return rows


def rows(ctx, count=10_000):
    bench = Bench(ctx.dir, ctx.tool, ctx.uv, ctx.python or "3.11", ctx.say)
    bench.begin()
    bench.say("resolving ...")
    universe = Universe(bench)
    bench.say(f"{len(universe.entries)} wheels become known ...")
    bench.create("known/all", universe.lock("all", universe.entries))
    chance = random.Random(6)
    locks = [universe.lock(f"lock{n}", universe.part(chance, chance.randint(20, 160))) for n in range(LOCKS)]
    result = []
    few_names = [f"w{n // 2 % 50:02}/n{n:05}" for n in range(10)]
    for name, lock in zip(few_names, locks):
        bench.create(name, lock)
    with Mount(bench) as mount:
        few = {"lookups": [mount.lookup(few_names) for _ in range(5)], "walk": mount.walk(few_names)}
    result += one_environment(bench, universe.lock("known", universe.part(chance, KNOWN)), 50)
    made, names = ten_thousand(bench, locks, count)
    result += made
    result += mounted(bench, names, count, few)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=ROOT / "target" / "bench-scale", type=pathlib.Path)
    parser.add_argument("--environments", default=10_000, type=int)
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--tool", default=ROOT / "target" / "release" / "envfabric")
    options = parser.parse_args()
    options.uv = os.environ.get("ENVFABRIC_UV") or shutil.which("uv")
    if not options.uv:
        sys.exit("uv is missing: run scripts/install-tools")
    options.dir = options.dir.absolute()
    options.dir.mkdir(parents=True, exist_ok=True)
    options.say = lambda text: print(text, file=sys.stderr)
    for row in rows(options, options.environments):
        print("| " + " | ".join(row.cells()) + " |", flush=True)


if __name__ == "__main__":
    main()
