"""First starts on a node that has nothing of a distant store: everything on one simulated NAS (tests/nas)."""

import statistics

import cold_bytes
import cold_many
import cold_speeds
import cold_starts
import making
import nas
from cold_places import RECORD, Places
from harness import Failed, Row, say, seconds


def measured(ctx):
    """Rows, what they are about, and the table of compressions."""
    program = nas.program(ctx.tool)
    prepare(ctx)
    with nas.Nas(ctx.dir / "backing", ctx.dir / "nas", program) as simulated:
        places = Places(ctx, simulated)
        try:
            places.make()
            rows = [*cold_starts.rows(places), *cold_bytes.rows(places), *cold_many.rows(places), *creation(places)]
            speeds = cold_speeds.table(places)
        finally:
            places.unmount()
    about = f"{places.packages} packages, {places.bytes / 1e9:.2f} GB; CPython {places.version}, "
    return rows, about, speeds


def clear(ctx):
    """Takes away every mount of a run and, unless it is kept, what it made; nothing that is not a benchmark's."""
    if not (ctx.dir / "backing").exists():
        return
    for point in nas.mounts_below(ctx.dir):
        nas.take_away(point)
    if not ctx.keep:
        say(f"removing {ctx.dir} ...")
        nas.remove(ctx.dir)


def prepare(ctx):
    """Removes what an earlier run left, unless it is to be used, and nothing that is not a benchmark's."""
    ctx.dir.mkdir(parents=True, exist_ok=True)
    for point in nas.mounts_below(ctx.dir):
        nas.take_away(point)
    there = {path.name for path in ctx.dir.iterdir()}
    if there and "backing" not in there:
        raise Failed(f"{ctx.dir} is there and not a benchmark's: remove it, or name another --dir")
    if ctx.keep and RECORD in there:
        say(f"measuring with what is in {ctx.dir}")
    else:
        nas.remove(ctx.dir)
        ctx.dir.mkdir(parents=True)
    making.same_disk(ctx)


def creation(places):
    name = places.creation_row()
    if not places.ctx.wants(name):
        return
    if not places.creation:
        yield Row(name, trouble="not measured: the environments were there")
        return
    ratios = [ours / theirs for ours, theirs in places.creation]
    ours, theirs = (statistics.median(side) for side in zip(*places.creation))
    kept = "" if places.commit == places.ctx.commit else f", commit {places.commit}"
    yield Row(name, seconds(ours) + kept, f"venv there {seconds(theirs)}", statistics.median(ratios), None, 0.2,
              min(ratios), max(ratios))
