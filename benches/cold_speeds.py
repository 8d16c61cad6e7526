"""First starts over networks of several speeds, from a store that is compressed and from one that is not."""

import os

import cold_starts
from cold_places import STORES
from harness import Failed, say, seconds, size
from nas import BANDWIDTH

SPEEDS = ["100MB/s", "1GB/s", "5GB/s"]
NAME = "compression and bandwidth"


def table(places):
    """{"sizes": {store: bytes}, "starts": [{bandwidth, code, store, profile, seconds, bytes}]}."""
    if not places.ctx.wants(NAME):
        return {}
    say(f"{NAME} ...")
    stored = {store: on_disk(places.nas.backing / store) for store in STORES}
    found = {"sizes": stored, "starts": []}
    codes = [f"import {library}" for library in cold_starts.libraries(places.ctx)]
    known = {(store, code): places.learn(store, code) for store in STORES for code in codes}
    try:
        for speed in SPEEDS:
            places.nas.tell(f"set bandwidth {speed}")
            for code in codes:
                found["starts"] += at(places, speed, code, known)
    except (Failed, OSError) as problem:
        found["trouble"] = str(problem)
        say(f"{NAME} failed: {problem}")
    finally:
        places.nas.tell(f"set bandwidth {BANDWIDTH}")
    return found


def at(places, speed, code, known):
    def side(store, profile):
        return lambda: cold_starts.on_node(places, store, code, profile)

    sides = {(store, bool(profile)): side(store, profile) for store in STORES for profile in [{}, known[store, code]]}
    sides["venv", False] = lambda: cold_starts.of_venv(places, places.nas_venv, code)
    say(f"  {code}, {speed} ...")
    for (store, profile), starts in cold_starts.in_turn(sides, min(3, places.ctx.runs)).items():
        middle = sorted(starts, key=lambda start: start.seconds)[len(starts) // 2]
        yield {"bandwidth": speed, "code": code, "store": store, "profile": profile,
               "seconds": middle.seconds, "bytes": middle.bytes, "calls": middle.calls}


def on_disk(store):
    """Bytes of a store's files."""
    return sum(
        os.lstat(os.path.join(directory, name)).st_blocks * 512
        for directory, _, names in os.walk(store) for name in names
    )


COLUMNS = {
    "zstd": ("zstd", False), "raw": ("raw", False), "zstd, profile": ("zstd", True), "raw, profile": ("raw", True),
    "venv there": ("venv", False),
}


def lines(found):
    """As a table in Markdown."""
    if not found:
        return []
    sizes = ", ".join(f"`--compression {STORES[store]}` {size(taken)}" for store, taken in found["sizes"].items())
    out = ["", f"Stores: {sizes}. Seconds and bytes over the line of first starts on a cold node, medians:", ""]
    if "trouble" in found:
        out += [f"It ended early: {found['trouble'].splitlines()[0]}", ""]
    out += ["| cold node | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    by_row = {}
    for start in found["starts"]:
        row = by_row.setdefault((start["code"], start["bandwidth"]), {})
        row[start["store"], start["profile"]] = f"{seconds(start['seconds'])}, {size(start['bytes'])}"
    for (code, speed), row in sorted(by_row.items(), key=lambda item: item[0][0]):
        out.append(f"| `{code}`, {speed} | " + " | ".join(row.get(key, "") for key in COLUMNS.values()) + " |")
    return out
