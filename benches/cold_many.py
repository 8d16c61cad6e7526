"""Many environments at once on a cold node, and a cache that is too small for what is used."""

import base64
import hashlib
import subprocess
import threading
import time
import zipfile

import cold_places
import cold_starts
import environments
import making
import nas
from harness import Failed, Row, failed, say, seconds, size
from node import Node
from trees import drop_page_cache

ENVIRONMENTS = 16
STARTS = 5
CHUNK = 256 * 1024
# The second is less than what `import torch` brings.
LIMITS = {"large": [1_000_000_000, 500_000_000], "small": [60_000_000]}


def rows(places):
    yield from sixteen(places)
    for limit in LIMITS[places.ctx.mode]:
        yield from limited(places, limit)


# Sixteen at once


def sixteen(places):
    name = f"{ENVIRONMENTS} environments that share most wheels, `import pandas` at once on a cold node: bytes brought"
    again = f"{ENVIRONMENTS} environments at once: bytes that READ calls of the NAS brought, against distinct ones"
    if not any([places.ctx.wants(name), places.ctx.wants(again)]):
        return
    say(f"{name} ...")
    # A store of its own: how many environments a store has is seen in the calls of the other rows.
    node = Node(places.ctx, places.ctx.dir / "node-many", places.nas.mount / "many")
    try:
        names = make_sixteen(places)
        forget_profiles(places)
        node.cold()
        took, reads = at_once(places, node, names)
        node.settle()
        stats, (held, _) = node.stats(), node.held()
    except (Failed, OSError) as problem:
        yield failed(name, problem)
        return
    finally:
        node.unmount()
    if places.ctx.wants(name):
        cache = stats.get("cache")
        if cache:
            brought = cache["unpacked_bytes"]
            shown = f"{size(brought)} unpacked, {size(cache['fetched_bytes'])} fetched; {seconds(took)}"
            yield Row(name, shown, f"held after that {size(held)}", brought / held, goal=1.0)
        else:
            yield Row(name, f"{size(held)} held; {seconds(took)}", trouble="not told: no `cache` in `envfabric stats`")
    if places.ctx.wants(again):
        read, distinct, calls = overlap(reads)
        worst = f", most in {reads_again(reads)}" if read > distinct else ""
        yield Row(again, f"{size(read)} in {calls:,} calls", f"{size(distinct)}{worst}", read / distinct, goal=1.0)


def make_sixteen(places):
    """Names of environments of the small set, each with another release of one small package."""
    ctx, names = places.ctx, [f"bench/many-{i + 1:02}" for i in range(ENVIRONMENTS)]
    store = places.nas.backing / "many"
    if all((store / "envs" / name).exists() for name in names):
        return names
    say("  making them ...")
    nas.remove(store)
    builder = Node(ctx, ctx.dir / "builder-many", store, cached=False)
    cold_places.new_store(ctx, builder, cold_places.STORES["zstd"])
    requirements, lock = ctx.dir / "many.txt", ctx.dir / "pylock.many.toml"
    for i, name in enumerate(names):
        wheel = differing(ctx.dir, i + 1)
        requirements.write_text("\n".join([*environments.SMALL, str(wheel)]) + "\n")
        making.resolve(ctx, requirements, lock, places.origin)
        cold_places.create(ctx, builder, lock, name)
    return names


def forget_profiles(places):
    """What an earlier run taught the store."""
    for profiles in (places.nas.backing / "many/envs/bench").glob("*/profiles"):
        nas.remove(profiles)


def differing(dir, number):
    """A wheel of one module, of which every release differs."""
    release = f"{number}.0"
    path = dir / f"differing-{release}-py3-none-any.whl"
    info = f"differing-{release}.dist-info"
    files = {
        "differing.py": f"NUMBER = {number}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: differing\nVersion: {release}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={digest(text)},{len(text)}\n" for name, text in files.items()]
    files[f"{info}/RECORD"] = "".join(record) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(zipfile.ZipInfo(name), text)
    return path


def digest(text):
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def at_once(places, node, names):
    """Seconds until the last of them has ended, and the READ calls that the NAS was asked."""
    places.nas.tell("reset")
    places.nas.tell("record on")
    processes, start = [], time.perf_counter()
    try:
        for name in names:
            command = [str(node.python(name)), "-c", "import pandas, differing"]
            processes.append(subprocess.Popen(command, env=places.ctx.clean, cwd=places.ctx.dir,
                                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        codes = [process.wait() for process in processes]
        took = time.perf_counter() - start
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
    finally:
        places.nas.tell("record off")
    if any(codes):
        raise Failed(f"{sum(map(bool, codes))} of {len(names)} could not import pandas")
    reads = places.nas.tell("reads")
    if reads["left_out"]:
        raise Failed("the NAS did not record all of its READ calls")
    return took, [read for read in reads["list"] if read["path"].split("/")[1:2] != ["envs"]]


def ranges(reads):
    """{path: (bytes read, distinct bytes)}."""
    by_path = {}
    for read in reads:
        by_path.setdefault(read["path"], []).append((read["offset"], read["offset"] + read["length"]))
    found = {}
    for path, spans in by_path.items():
        distinct = behind = 0
        for begin, end in sorted(spans):
            distinct += max(0, end - max(begin, behind))
            behind = max(behind, end)
        found[path] = (sum(end - begin for begin, end in spans), distinct)
    return found


def overlap(reads):
    """Bytes read, distinct bytes, calls."""
    found = ranges(reads).values()
    return sum(read for read, _ in found), sum(distinct for _, distinct in found), len(reads)


def reads_again(reads):
    """The path of which most was read more than once."""
    found = ranges(reads)
    return max(found, key=lambda path: found[path][0] - found[path][1])


# A small cache


def limited(places, limit):
    """Starts with a cache that should not be able to hold what they use."""
    ctx = places.ctx
    code = f"import {cold_starts.heavy(ctx)}"
    name = f"cache limit {size(limit)}, {STARTS} starts with `{code}`: bytes held beyond it"
    if not ctx.wants(name):
        return
    say(f"{name} ...")
    node, took, seen = places.node, [], Watch(places.node)
    try:
        places.know("zstd", {})
        node.forget()
        with seen:
            for _ in range(STARTS):
                node.unmount()
                drop_page_cache()
                node.mount("--cache-size", f"{limit}B")
                took.append(cold_starts.start(places, node.python(), code))
                stats = node.stats()
                seen.told = max(seen.told, (stats.get("cache") or {}).get("held", 0))
            node.settle()
    except (Failed, OSError) as problem:
        yield failed(name, problem)
        return
    finally:
        node.unmount()
    allowed = stats["threads"] * CHUNK
    held = max(seen.files, seen.told)
    times = ", ".join(seconds(start.seconds) for start in took)
    told = f", as it tells {size(seen.told)}" if seen.told else ""
    # A limit that nothing came near was not put to the test.
    trouble = "" if held > 0.98 * limit else "limit not reached"
    yield Row(
        name, f"at most {size(held)}{told}, with its ledger {size(seen.everything)}; {times}",
        f"looked at {seen.looks:,} times; {stats['threads']} threads, 256 KiB each",
        max(0, held - limit) / 1e6, goal=round(allowed / 1e6, 2), unit="MB", trouble=trouble,
    )


class Watch:
    """Looks at how much a cache directory holds again and again, and keeps the highest figures."""

    def __init__(self, node):
        self.node, self.ended = node, threading.Event()
        self.files = self.everything = self.told = self.looks = 0

    def __enter__(self):
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.ended.wait(0.1):
            files, everything = self.node.held()
            self.files, self.everything = max(self.files, files), max(self.everything, everything)
            self.looks += 1

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
