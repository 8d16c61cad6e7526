"""What a run was made with, its rows as Markdown and JSON, and its section of docs/benchmarks.md."""

import os
import pathlib
import platform
import re
import subprocess
import time

HEADER = ["what", "envfabric", "peer", "ratio", "must", "goal", "verdict"]
TITLES = {
    "small": "Small environment", "large": "Large environment", "scale": "Ten thousand environments",
    "cold": "A cold node and a store on a NAS", "cold-small": "A cold node and a store on a NAS, small environment",
}
NOTES = {
    "small": "Peer: what uv makes of the same lock on the same disk, bytecode compiled, the same Python. Ratios are\n"
    "medians of runs in turn, with the smallest and the largest; times are medians.",
}
NOTES["large"] = NOTES["small"]
NOTES["cold"] = (
    "Both sides on one simulated NAS in the same run (0.5 ms a call, 1 GB/s, attributes kept 3 s), the store compressed\n"
    "(zstd) unless the row says otherwise. *There*: a venv that uv made on that NAS of the same lock, relocatable,\n"
    "bytecode compiled, its interpreter on the local disk. Before each cold start envfabric is unmounted, the node's\n"
    "cache and state are removed, and the page cache is dropped: the client's of the NAS, the NAS's own, the disk's.\n"
    "Times are those of the interpreter, without `envfabric mount`: medians, with the smallest and the largest, of\n"
    "rounds in which each side has its turn. A known profile is what one first start of the same command left."
)
NOTES["cold-small"] = NOTES["cold"]


def git(place, *args):
    done = subprocess.run(["git", "-C", str(place), *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit(tool):
    """The commit of the repository that a program was built in; `+` where its sources have changed since."""
    place = pathlib.Path(tool).absolute().parent
    found = git(place, "rev-parse", "--short", "HEAD")
    top = git(place, "rev-parse", "--show-toplevel")
    changed = found and git(top, "status", "--porcelain", "--", "src", "Cargo.toml", "Cargo.lock")
    return (found or "unknown") + ("+" if changed else "")


def facts(ctx, command):
    """Machine, versions and command, as they are recorded."""
    memory = re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model.group(1) if model else platform.machine(),
        "cpus": os.cpu_count(),
        "memory": int(memory.group(1)) * 1024,
        "kernel": platform.release(),
        "file system": file_system(ctx.dir),
        "uv": ctx.run(ctx.uv, "--version").split()[1],
        "envfabric": ctx.run(ctx.tool, "--version").split()[1],
        "commit": ctx.commit,
    }


def file_system(path):
    """The type of the file system that a path lies on."""
    best = ("", "unknown")
    path = f"{pathlib.Path(path).resolve()}/"
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind = line.split()[:3]
        if path.startswith(point.rstrip("/") + "/"):
            best = max(best, (point, kind), key=lambda found: len(found[0]))
    return best[1]


def section(mode, facts, about, rows, requests):
    """One mode's part of docs/benchmarks.md."""
    ran = (
        f"`{facts['command']}` on {facts['cpu']}, {facts['cpus']} CPUs, {facts['memory'] / 2**30:.0f} GiB,\n"
        f"Linux {facts['kernel']}, {facts['file system']}; {about}uv {facts['uv']}, "
        f"envfabric {facts['envfabric']} (commit {facts['commit']}); {facts['date']}."
    )
    notes = [NOTES[mode]] if mode in NOTES else []
    lines = [f"## {TITLES[mode]}", "", ran, *notes, ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines + requests) + "\n"


def write(path, mode, text):
    """Replaces what stands between a mode's marks; the first time, appends it with its marks."""
    begin, end = f"<!-- begin: {mode} -->\n", f"<!-- end: {mode} -->\n"
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + begin + text + end + rest.split(end, 1)[1]
    else:
        new = f"{old}\n{begin}{text}{end}"
    path.write_text(new)
