"""Walking the environment's tree, and reading its largest library."""

import os
import time

from harness import Skipped

BLOCK = 1 << 20


def rows(ctx, pair):
    """`find` and `du`, when the kernel knows the tree and when it has just been mounted."""
    for name, command in {
        "`find -type f -size +100k`": lambda tree: ["find", f"{tree}/", "-type", "f", "-size", "+100k"],
        "`du -s`": lambda tree: ["du", "-s", f"{tree}/"],
    }.items():
        ours, theirs = ctx.timed(*command(pair.tree)), ctx.timed(*command(pair.venv))
        yield from ctx.compare(f"{name}, second run", ours, theirs, 1.05, 1.0)
        yield from ctx.compare(
            f"{name}, first run after mounting", lambda ours=ours: (ctx.remount(), ours())[1], theirs, 7.0, 4.0,
            runs=min(5, ctx.runs),
        )


def reading(ctx, pair, passthrough=True):
    """Reading one large file from its beginning to its end, from the disk and from memory."""
    suffix = "" if passthrough else ", without passthrough"
    library = pair.library()
    megabytes = os.stat(pair.venv / library).st_size / 1e6
    what = f"read `{library.name}` ({megabytes:.0f} MB)"

    def limits(must):
        return {"must": must, "goal": 1.0} if passthrough else {}

    def dropped(path):
        return lambda: (drop_page_cache(), read(path))[1]

    ours, theirs = pair.tree / library, pair.venv / library
    yield from ctx.compare(
        f"{what}, page cache dropped{suffix}", dropped(ours), dropped(theirs), **limits(1.10), runs=min(5, ctx.runs)
    )
    yield from ctx.compare(f"{what}, warm{suffix}", lambda: read(ours), lambda: read(theirs), **limits(1.05))


def read(path):
    """Seconds that it takes to open, read and close a file."""
    block = bytearray(BLOCK)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass
    return time.perf_counter() - start


def drop_page_cache():
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as control:
            control.write("3\n")
    except OSError as problem:
        raise Skipped(f"only root can drop the page cache ({problem.strerror})") from None
