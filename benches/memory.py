"""The memory of many processes that each import the same wheels, in one environment each."""

import pathlib
import subprocess

import making
from harness import Failed, size

ENVIRONMENTS = 20
CHILD = "import sys, {}; print('ready', flush=True); sys.stdin.read()"


def rows(ctx, pair):
    library = "torch" if ctx.mode == "large" else "pandas"
    name = f"total PSS of {ENVIRONMENTS} processes in {ENVIRONMENTS} environments, `import {library}`"
    if not ctx.wants(name):
        return
    pythons = [environment(ctx, pair, i) for i in range(ENVIRONMENTS)]
    yield from ctx.compare(
        name, lambda: total_pss(ctx, pythons, library),
        lambda: total_pss(ctx, [pair.venv_python] * ENVIRONMENTS, library),
        1.10, 1.02, runs=min(2, ctx.runs), show=size,
    )


def environment(ctx, pair, number):
    """The interpreter of one more environment from the same lock."""
    name = f"bench/shared-{number + 1:02}"
    if not (ctx.store / "envs" / name).exists():
        ctx.fabric("create", name, "--lock", pair.lock, "--offline", *making.python_option(ctx))
    return ctx.mount_point / name / ".venv/bin/python"


def total_pss(ctx, pythons, library):
    """Bytes of proportional set size of all, taken while every one of them waits."""
    processes = []
    try:
        for python in pythons:
            processes.append(subprocess.Popen(
                [str(python), "-c", CHILD.format(library)], env=ctx.clean, cwd=ctx.dir,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ))
        if any(process.stdout.readline() != b"ready\n" for process in processes):
            raise Failed(f"a process could not import {library}")
        return sum(pss(process.pid) for process in processes)
    finally:
        for process in processes:
            process.stdin.close()
        for process in processes:
            process.wait()
            process.stdout.close()


def pss(pid):
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise Failed("the kernel does not tell the PSS of a process")
