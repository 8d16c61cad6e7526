"""First and second starts on a node: seconds, and calls to the NAS."""

import dataclasses
import statistics

from harness import Failed, Row, failed, say, seconds, size
from trees import drop_page_cache


@dataclasses.dataclass
class Start:
    """What one start of an interpreter took, from its beginning to its end."""

    seconds: float
    calls: int
    bytes: int


def heavy(ctx):
    return "torch" if ctx.mode == "large" else "pyarrow"


def libraries(ctx):
    """What is imported, with the goal in seconds for a cold node without a profile."""
    return {"torch": 4.0, "pandas": 0.6} if ctx.mode == "large" else {"pyarrow": None, "pandas": 0.6}


def rows(places):
    for library, goal in libraries(places.ctx).items():
        yield from first(places, library, goal)
    for library in libraries(places.ctx):
        yield from second(places, library)


def start(places, python, code):
    places.nas.tell("reset")
    took = places.ctx.timed(python, "-c", code)()
    stats = places.nas.tell("stats")
    return Start(took, stats["total"], stats["bytes_read"])


def on_node(places, store, code, profile):
    """A start on a cold node, with that profile in the store or none."""
    places.know(store, profile)
    node = places.nodes[store]
    try:
        node.cold()
        return start(places, node.python(), code)
    finally:
        node.unmount()


def of_venv(places, venv, code):
    """A start of an ordinary venv, on the local disk or on the NAS, with nothing of it in memory."""
    drop_page_cache()
    return start(places, venv / "bin/python", code)


def on_local_store(places, code):
    try:
        places.local.mount()
        # After mounting, as on a node: what the mount itself needs is there.
        drop_page_cache()
        return start(places, places.local.python(), code)
    finally:
        places.local.unmount()


def in_turn(sides, runs):
    """{side: results}; which goes first changes from round to round."""
    names, found = list(sides), {name: [] for name in sides}
    for i in range(runs):
        for name in names[i % len(names):] + names[:i % len(names)]:
            found[name].append(sides[name]())
    return found


def first(places, library, goal):
    """Rows of a cold node; all sides in the same rounds."""
    code = f"import {library}"
    blank, known = f"`{code}`, cold node, no profile", f"`{code}`, cold node, profile known"
    local = f"`{code}`, store on the local disk, page cache dropped"
    names = [blank, known, local]
    calls = [f"calls to the NAS, {name}" for name in names[:2]]
    if not any([places.ctx.wants(name) for name in names + calls]):
        return
    say(f"{blank} ...")
    try:
        profile = places.learn("zstd", code)
        found = in_turn({
            "blank": lambda: on_node(places, "zstd", code, {}),
            "known": lambda: on_node(places, "zstd", code, profile),
            "there": lambda: of_venv(places, places.nas_venv, code),
            "venv": lambda: of_venv(places, places.venv, code),
            "store": lambda: on_local_store(places, code),
        }, min(5, places.ctx.runs))
    except (Failed, OSError) as problem:
        yield failed(blank, problem)
        return
    ratios = {side: ratio(found[side], found["venv"]) for side in found}
    there = f"venv there {spread(found['there'])}, venv on the local disk {spread(found['venv'])}"
    if places.ctx.wants(blank):
        yield Row(blank, spread(found["blank"]), there, median(found["blank"]), goal=goal, unit="s")
    if places.ctx.wants(known):
        limit = 2.0 if library == heavy(places.ctx) else None
        on_disk = f"venv on the local disk {spread(found['venv'])}"
        yield Row(known, spread(found["known"]), on_disk, *ratios["known"][:1], None, limit, *ratios["known"][1:])
    if places.ctx.wants(local):
        on_disk = f"venv on the local disk {spread(found['venv'])}"
        yield Row(local, spread(found["store"]), on_disk, *ratios["store"][:1], None, None, *ratios["store"][1:])
    for name, side in zip(calls, ["blank", "known"]):
        if places.ctx.wants(name):
            limit = 150 if library == "pandas" else None
            figure = statistics.median(start.calls for start in found[side])
            yield Row(name, asked(found[side]), f"venv there {asked(found['there'])}", figure, goal=limit, unit="calls")


def second(places, library):
    """The second start on a node, and a later one, against warm starts from a store on the local disk."""
    code = f"import {library}"
    next_, later = f"`{code}`, second start on a node", f"`{code}`, a later start, the mount at rest"
    if not any([places.ctx.wants(name) for name in [next_, later]]):
        return
    say(f"{next_} ...")
    found = {"next": [], "later": [], "local": []}
    node = places.node
    try:
        places.local.mount()
        for _ in range(min(5, places.ctx.runs)):
            places.know("zstd", {})
            node.cold()
            start(places, node.python(), code)
            found["next"].append(start(places, node.python(), code))
            node.settle()
            # A start for nothing on both sides: the one that is measured follows one of its own.
            start(places, node.python(), code)
            found["later"].append(start(places, node.python(), code))
            start(places, places.local.python(), code)
            found["local"].append(start(places, places.local.python(), code))
    except (Failed, OSError) as problem:
        yield failed(next_, problem)
        return
    finally:
        node.unmount()
        places.local.unmount()
    warm = f"warm, store on the local disk {spread(found['local'])}"
    for name, side, goal in [(next_, "next", 1.05), (later, "later", None)]:
        if places.ctx.wants(name):
            all_of, low, high = ratio(found[side], found["local"])
            yield Row(name, spread(found[side]), warm, all_of, None, goal, low, high)


def ratio(ours, theirs):
    """Median, smallest and largest ratio of seconds, run by run."""
    ratios = [a.seconds / b.seconds for a, b in zip(ours, theirs)]
    return statistics.median(ratios), min(ratios), max(ratios)


def median(starts):
    return statistics.median(start.seconds for start in starts)


def spread(starts):
    """Median, smallest and largest seconds."""
    times = [start.seconds for start in starts]
    return f"{seconds(statistics.median(times))} ({seconds(min(times))} to {seconds(max(times))})"


def asked(starts):
    """Calls and bytes of the middle start."""
    middle = sorted(starts, key=lambda start: start.calls)[len(starts) // 2]
    return f"{middle.calls:,} calls, {size(middle.bytes)}"
