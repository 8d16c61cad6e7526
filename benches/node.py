"""A node: one machine's mount of a store, with a cache and a state directory that can be forgotten."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import nas
from harness import Failed
from trees import drop_page_cache

SETTLED = 1.0  # seconds without work of the mount after which it is at rest
LONGEST = 20.0  # seconds to wait for that


class Node:
    """`dir` has its mount point, cache and state; `cached` for a store on the NAS."""

    def __init__(self, ctx, dir, store, cached=True):
        self.ctx, self.dir, self.store = ctx, pathlib.Path(dir), pathlib.Path(store)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.envs, self.cache = self.dir / "envs", self.dir / "cache"
        self.flags = ["--cache", self.cache] if cached else []
        self.serving = None
        self.env = ctx.env | {
            "ENVFABRIC_STORE": str(store),
            "ENVFABRIC_MOUNT": str(self.envs),
            "XDG_STATE_HOME": str(self.dir / "state"),
        }

    def fabric(self, *args):
        return self.ctx.run(self.ctx.tool, *args, env=self.env)

    def python(self, name=None):
        """The path of an environment's interpreter, the reference environment's by default."""
        return self.envs / (name or f"bench/{self.ctx.mode}") / ".venv/bin/python"

    def mount(self, *flags):
        self.fabric("mount", *self.flags, *flags)
        self.serving = self.stats()["pid"]

    def unmount(self):
        """Takes the mount away and waits for its process, which may still have a profile or a ledger to write."""
        self.serving = None
        if str(self.envs.resolve()) not in nas.mounts_below(self.dir):
            return
        process = None
        try:
            process = pathlib.Path("/proc", str(self.stats()["pid"]))
        except Failed:
            pass  # it does not answer
        try:
            subprocess.run([self.ctx.tool, "umount", self.envs], env=self.env, stdin=subprocess.DEVNULL,
                           capture_output=True, timeout=nas.PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        for point in nas.mounts_below(self.dir):
            nas.take_away(point)
        until = time.monotonic() + nas.PATIENCE
        while process and process.exists():
            if time.monotonic() > until:
                raise Failed(f"the process {process.name} that served {self.envs} does not end")
            time.sleep(0.01)

    def forget(self):
        """As if it had never seen the store: unmounted, without cache and state."""
        self.unmount()
        for place in ["cache", "state"]:
            nas.remove(self.dir / place)

    def cold(self, *flags):
        """Mounted, and nothing of the store is here, nor in the page cache, nor known to the NAS's client."""
        self.forget()
        drop_page_cache()
        self.mount(*flags)

    def stats(self):
        return json.loads(self.fabric("stats", "--json"))

    def settle(self):
        """Waits until the mount is at rest."""
        until, used, since = time.monotonic() + LONGEST, -1.0, time.monotonic()
        while time.monotonic() < min(until, since + SETTLED):
            now = self.stats()["cpu_seconds"]
            # Being asked costs it something, too.
            if now > used + 0.02:
                used, since = now, time.monotonic()
            time.sleep(0.1)

    def held(self):
        """Bytes on the disk of the cached files, and of all that lies in the cache directory, at one moment."""
        pid = self.serving
        try:
            # Files that come and go while others are counted would be counted twice, or not at all.
            if pid:
                os.kill(pid, signal.SIGSTOP)
            return self.count()
        except ProcessLookupError:
            return self.count()
        finally:
            with contextlib.suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGCONT)

    def count(self):
        files = everything = 0
        for directory, _, names in os.walk(self.cache):
            for name in names:
                try:
                    blocks = os.lstat(os.path.join(directory, name)).st_blocks * 512
                except FileNotFoundError:  # it goes while it is counted
                    continue
                everything += blocks
                files += 0 if directory == str(self.cache) else blocks
        return files, everything
