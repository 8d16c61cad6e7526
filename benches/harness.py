"""What every measurement uses: a context, commands timed in pairs, mounts, and rows.

A measuring module has `rows(ctx)`, which yields Row. Names of rows are stable: `--only` selects by them.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time


class Failed(Exception):
    """A command or a condition of a measurement failed; the message is what the user needs."""

    verdict = "failed"


class Skipped(Failed):
    """The machine does not let this be measured."""

    verdict = "skipped"


@dataclasses.dataclass
class Row:
    """One line of the table.

    `ratio` is what is judged against `must` and `goal` (at most): envfabric's figure over the peer's, or, with another
    `unit` than x, an amount. `low` and `high` are its extremes over the pairs.
    """

    name: str
    ours: str = ""
    peer: str = ""
    ratio: float | None = None
    must: float | None = None
    goal: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    trouble: str = ""

    @property
    def verdict(self):
        if self.trouble:
            return self.trouble
        if self.ratio is None or (self.must is None and self.goal is None):
            return "reported"
        shown = round(self.ratio, 2)  # what is printed is what is judged
        if self.must is not None and shown > self.must:
            return "misses must"
        if self.goal is not None and shown > self.goal:
            return "misses goal"
        return "ok"

    def cells(self):
        ratio = ""
        if self.ratio is not None and self.unit == "x":
            ratio = f"{self.ratio:.2f} x"
            if self.low is not None:
                ratio += f" ({self.low:.2f} to {self.high:.2f})"
        limits = ["" if limit is None else self.limit(limit) for limit in (self.must, self.goal)]
        return [self.name, self.ours, self.peer, ratio, *limits, self.verdict]

    def limit(self, value):
        return f"{value:.2f} x" if self.unit == "x" else f"{value:g} {self.unit}"

    def as_json(self):
        return {**dataclasses.asdict(self), "verdict": self.verdict}


def seconds(value):
    if value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def size(value):
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


class Context:
    """One mode's run: where it works, with which programs, and what has been measured so far."""

    def __init__(self, mode, dir, tool, uv, python=None, keep=False, runs=9, only=None):
        self.mode, self.dir, self.tool, self.uv = mode, pathlib.Path(dir), pathlib.Path(tool), uv
        self.python, self.keep, self.runs = python, keep, runs
        self.only = re.compile(only, re.IGNORECASE) if only else None
        self.matched = only is None
        self.mount_flags = []
        # What steers Python would steer both sides, but not what a user of either sees.
        dropped = ("PYTHON", "ENVFABRIC_", "VIRTUAL_ENV")
        self.clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        self.clean["UV_LINK_MODE"] = "hardlink"
        self.use(self.dir)

    def use(self, place):
        """Makes the store and the mount below `place` the ones that `fabric` and `mounted` mean."""
        self.place = pathlib.Path(place)
        self.store, self.mount_point = self.place / "store", self.place / "envs"
        self.env = self.clean | {
            "ENVFABRIC_STORE": str(self.store),
            "ENVFABRIC_MOUNT": str(self.mount_point),
            "ENVFABRIC_UV": str(self.uv),
            "ENVFABRIC_CONFIG": "/dev/null",
            "ENVFABRIC_SCRATCH": str(self.dir / "scratch"),
            "XDG_STATE_HOME": str(self.place / "state"),
        }

    @contextlib.contextmanager
    def at(self, place):
        before = self.place
        self.use(place)
        try:
            yield self
        finally:
            self.use(before)

    @staticmethod
    def say(text):
        say(text)

    # Commands

    def run(self, *command, env=None, quiet=False):
        """Standard output of a command that must succeed."""
        # In a session of its own: Ctrl-C is for the benchmark, which ends what it started.
        process = subprocess.Popen(
            [str(c) for c in command], env=env or self.env, cwd=self.dir, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()
            process.communicate()
            raise
        if process.returncode != 0 and not quiet:
            lines = err.strip().splitlines() or [f"exit code {process.returncode}"]
            raise Failed(f"{pathlib.Path(command[0]).name} {command[1]}: " + "\n".join(lines[-8:]))
        return out

    def fabric(self, *args, **kw):
        return self.run(self.tool, *args, **kw)

    def fabric_json(self, *args):
        return json.loads(self.fabric(*args, "--json"))

    def timed(self, *command):
        """A function that runs a command as a user of the environment would, and returns its seconds."""
        command = [str(c) for c in command]

        def measure():
            start = time.perf_counter()
            done = subprocess.run(command, env=self.clean, cwd=self.dir, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            took = time.perf_counter() - start
            if done.returncode != 0:
                raise Failed(f"{command}: {done.stderr.decode(errors='replace').strip()[-500:]}")
            return took

        return measure

    # Mounts

    @contextlib.contextmanager
    def mounted(self, passthrough=True):
        """The store is shown at `mount_point` for as long as this lasts."""
        self.mount_flags = [] if passthrough else ["--no-passthrough"]
        try:
            self.fabric("mount", *self.mount_flags)
            yield
        finally:
            self.unmount()

    def unmount(self):
        """Takes every mount below `dir` away, whoever uses it."""
        below = f"{self.dir.resolve()}/"
        for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
            point = line.split()[4].encode().decode("unicode_escape")
            if point.startswith(below):
                self.fabric("umount", "--lazy", point, quiet=True)

    def remount(self):
        """A new mount in place of the present one: the kernel knows nothing of it yet."""
        self.fabric("umount")
        self.fabric("mount", *self.mount_flags)

    # Rows

    def wants(self, name):
        wanted = self.only is None or bool(self.only.search(name))
        self.matched |= wanted
        return wanted

    def compare(self, name, ours, theirs, must=None, goal=None, runs=None, show=seconds):
        """Yields a row of medians of two measurements made in turn, or nothing if it is not wanted.

        The first pair only warms up. Which side goes first changes from pair to pair.
        """
        if not self.wants(name):
            return
        say(f"{name} ...")
        pairs = []
        try:
            for i in range(1 + (runs or self.runs)):
                sides = [ours, theirs] if i % 2 else [theirs, ours]
                first, second = sides[0](), sides[1]()
                pairs.append((first, second) if i % 2 else (second, first))
        except (Failed, OSError) as problem:
            yield failed(name, problem)
            return
        ratios = [a / b for a, b in pairs[1:]]
        a, b = (statistics.median(side) for side in zip(*pairs[1:]))
        yield Row(name, show(a), show(b), statistics.median(ratios), must, goal, min(ratios), max(ratios))


def failed(name, problem):
    """A row that could not be measured, and the reason on standard error in full."""
    verdict = getattr(problem, "verdict", "failed")
    say(f"{name} {verdict}: {problem}")
    return Row(name, trouble=f"{verdict}: " + str(problem).splitlines()[0].replace("|", "/")[:120])


def say(text):
    print(text, file=sys.stderr, flush=True)


def interruptible():
    """SIGTERM and SIGHUP end a run as Ctrl-C does, with its mounts taken away."""

    def interrupt(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
