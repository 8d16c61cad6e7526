"""The simulated NAS of tests/nas, started and always taken away again."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile

from harness import Failed, say

ROOT = pathlib.Path(__file__).resolve().parent.parent
LATENCY, BANDWIDTH, ATTRIBUTES = "0.5ms", "1GB/s", "3s"
PATIENCE = 60  # seconds for what should take none


class Nas:
    """Shows `backing` at `mount` for as long as the `with` block lasts."""

    def __init__(self, backing, mount, program):
        self.backing, self.mount, self.program = pathlib.Path(backing), pathlib.Path(mount), program

    def __enter__(self):
        self.backing.mkdir(parents=True, exist_ok=True)
        self.mount.mkdir(parents=True, exist_ok=True)
        # The path of a socket must be short, and that of a benchmark's directory may be long.
        self.private = tempfile.mkdtemp(prefix="bench-nas-")
        path = os.path.join(self.private, "control")
        self.process = subprocess.Popen(
            [self.program, self.backing, self.mount, "--control", path, "--latency", LATENCY,
             "--bandwidth", BANDWIDTH, "--attr-ttl", ATTRIBUTES, "--until-eof"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )
        try:
            if self.process.stdout.readline().strip() != "ready":
                raise Failed("simulated-nas did not start: it needs root and /dev/fuse")
            self.control = socket.socket(socket.AF_UNIX)
            self.control.settimeout(PATIENCE)
            self.control.connect(path)
            self.answers = self.control.makefile("r")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        # The end of its input ends it: it then unmounts and waits for nobody.
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            take_away(self.mount)
        self.process.stdout.close()
        shutil.rmtree(self.private, ignore_errors=True)

    def tell(self, command):
        """The answer to a command (tests/nas/control.rs)."""
        self.control.sendall(f"{command}\n".encode())
        answer = json.loads(self.answers.readline())
        if "error" in answer:
            raise Failed(f"simulated-nas: {answer['error']}")
        return answer


def program(tool):
    """The simulated NAS that was built beside envfabric; built here if it is missing."""
    for place in [pathlib.Path(tool).parent, ROOT / "target/release"]:
        if (place / "examples/simulated-nas").exists():
            return place / "examples/simulated-nas"
    say("building the simulated NAS ...")
    build = ["cargo", "build", "--locked", "--release", "--quiet", "--example", "simulated-nas"]
    if subprocess.run(build, cwd=ROOT, stdin=subprocess.DEVNULL).returncode != 0:
        raise Failed("the simulated NAS cannot be built")
    return ROOT / "target/release/examples/simulated-nas"


def mounts_below(place):
    """Mount points below a directory, the innermost first."""
    below = f"{pathlib.Path(place).resolve()}/"
    lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return sorted((point for point in points if point.startswith(below)), key=len, reverse=True)


def take_away(point):
    """Unmounts without waiting for anybody."""
    subprocess.run(["umount", "-l", point], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)


def remove(place):
    """Removes a directory once nothing is mounted below it."""
    for point in mounts_below(place):
        take_away(point)
    left = mounts_below(place)
    if left:
        raise Failed(f"{left[0]} cannot be unmounted: {place} is left as it is")
    if pathlib.Path(place).exists():
        shutil.rmtree(place)
