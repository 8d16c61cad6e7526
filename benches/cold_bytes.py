"""How many bytes a first start brings to a node, against those that it touches."""

import contextlib
import ctypes
import mmap
import os
import pathlib
import statistics

import cold_starts
from harness import Failed, Row, Skipped, failed, say, size
from trees import drop_page_cache

READ_AHEAD = 128  # KiB
PROT_READ, MAP_SHARED = 1, 1


def rows(places):
    library = cold_starts.heavy(places.ctx)
    name = f"bytes brought for `import {library}`, cold node, no profile, unpacked"
    # What a disk brings depends on how far it reads ahead; the least is what no disk would do with.
    least_name = f"{name}, against pages with the least read-ahead"
    if not places.ctx.wants(name) and not places.ctx.wants(least_name):
        return
    say(f"{name} ...")
    runs = range(min(3, places.ctx.runs))
    try:
        touched = statistics.median(bytes_touched(places, f"import {library}") for _ in runs)
        with read_ahead(places.venv):
            least = statistics.median(bytes_touched(places, f"import {library}") for _ in runs)
        figures = [brought(places, f"import {library}") for _ in runs]
    except (Failed, OSError) as problem:
        yield failed(name, problem)
        return
    unpacked, fetched, how = sorted(figures)[len(figures) // 2]
    ours = f"{size(unpacked)} ({size(fetched)} as they lie in the store; {how})"
    peer = "in the page cache after a cold start of a venv on the local disk, read-ahead"
    yield Row(name, ours, f"touched {size(touched)}: {peer} as it is", unpacked / touched, goal=1.3)
    yield Row(least_name, ours, f"touched {size(least)}: {peer} {READ_AHEAD} KiB", unpacked / least)


def brought(places, code):
    """Bytes unpacked, bytes fetched, and who says so, when the mount is at rest after a first start."""
    places.know("zstd", {})
    node = places.node
    try:
        node.cold()
        cold_starts.start(places, node.python(), code)
        node.settle()
        stats, over_line = node.stats(), places.nas.tell("stats")["bytes_read"]
        files, _ = node.held()
    finally:
        node.unmount()
    cache = stats.get("cache")
    if cache:
        return cache["unpacked_bytes"], cache["fetched_bytes"], "`envfabric stats`"
    return files, over_line, "blocks of the cache; READ calls of the NAS"


def bytes_touched(places, code):
    """Bytes of the local venv and of its interpreter that are in memory after a cold start."""
    base = places.ctx.run(places.venv / "bin/python", "-c", "import sys; print(sys.base_prefix)", env=places.ctx.clean)
    drop_page_cache()
    places.ctx.timed(places.venv / "bin/python", "-c", code)()
    return sum(resident(top) for top in [places.venv, pathlib.Path(base.strip())])


@contextlib.contextmanager
def read_ahead(place):
    """The disk under `place` reads ahead by 128 KiB for as long as this lasts."""
    dev = os.stat(place).st_dev
    control = pathlib.Path(f"/sys/class/bdi/{os.major(dev)}:{os.minor(dev)}/read_ahead_kb")
    try:
        before = control.read_text()
        control.write_text(f"{READ_AHEAD}\n")
    except OSError as problem:
        raise Skipped(f"the read-ahead of the disk cannot be set ({problem.strerror})") from None
    try:
        yield
    finally:
        control.write_text(before)


def resident(top):
    """Bytes of all files below a directory that are in the page cache."""
    total = 0
    for directory, _, names in os.walk(top):
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                total += pages(path) * mmap.PAGESIZE
    return total


def pages(path):
    """Pages of a file that are in the page cache, as mincore(2) tells."""
    length = os.path.getsize(path)
    if not length:
        return 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = LIBC.mmap(None, length, PROT_READ, MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise Failed(f"{path} cannot be mapped")
    try:
        marks = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        if LIBC.mincore(address, length, marks) != 0:
            raise Failed(f"{path}: {os.strerror(ctypes.get_errno())}")
        return bytes(marks).translate(LOWEST).count(1)
    finally:
        LIBC.munmap(address, length)


LOWEST = bytes(value & 1 for value in range(256))
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
