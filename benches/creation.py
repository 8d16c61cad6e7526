"""How long it takes to make an environment when its wheels are in uv's cache and nothing of it is in the store."""

import json
import os
import shutil
import statistics
import time

import making
from harness import Row, say, seconds

RECORD = "made.json"


def name(ctx):
    return f"create the {ctx.mode} environment, nothing but the interpreter in the store, wheels in uv's cache"


def in_turn(ctx, lock, venv, python):
    """Makes both environments, uv's before and after each of ours; the last of both stay.

    Once for the large environment, because of the disk it takes.
    """
    turns = min(3, ctx.runs) if ctx.mode == "small" and ctx.wants(name(ctx)) else 1
    say(f"creating the {ctx.mode} environment, in turn with uv ...")
    ours, theirs = [], [with_uv(ctx, lock, venv, python)]
    for turn in range(turns):
        if turn < turns - 1:
            with ctx.at(ctx.dir / "again"):
                making.new_store(ctx)
                ours.append(with_envfabric(ctx, lock))
            shutil.rmtree(ctx.dir / "again")
        else:
            ours.append(with_envfabric(ctx, lock))
        theirs.append(with_uv(ctx, lock, venv, python))
    (ctx.dir / RECORD).write_text(json.dumps({"ours": ours, "theirs": theirs, "commit": ctx.commit}))


# Offline on both sides: where an index forbids caching, uv would otherwise fetch the wheels of a lock anew each time.


def with_envfabric(ctx, lock):
    def work():
        ctx.fabric("create", f"bench/{ctx.mode}", "--lock", lock, "--offline", *making.python_option(ctx))

    return cost(work)


def with_uv(ctx, lock, venv, python):
    def work():
        making.new_venv(ctx, venv, python)
        making.sync(ctx, venv, lock, "--offline")

    shutil.rmtree(venv)
    return cost(work)


def cost(work):
    """Seconds, and seconds of processor time; what the disk still has to write of others is written before."""
    os.sync()
    used, start = os.times(), time.perf_counter()
    work()
    took, now = time.perf_counter() - start, os.times()
    return took, now.children_user + now.children_system - used.children_user - used.children_system


def rows(ctx):
    if not ctx.wants(name(ctx)):
        return
    try:
        made = json.loads((ctx.dir / RECORD).read_text())
    except OSError:
        yield Row(name(ctx), trouble="not measured: the environments were there")
        return
    ours, theirs = made["ours"], made["theirs"]
    ratios = [2 * a[0] / (before[0] + after[0]) for a, before, after in zip(ours, theirs, theirs[1:])]
    kept = "" if made["commit"] == ctx.commit else f", commit {made['commit']}"
    yield Row(
        name(ctx), median(ours) + kept, median(theirs), statistics.median(ratios), 1.5, 1.1, min(ratios), max(ratios),
    )


def median(costs):
    took, used = (statistics.median(side) for side in zip(*costs))
    return f"{seconds(took)} ({seconds(used)} of processor time)"
