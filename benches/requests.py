#!/usr/bin/env python3
"""Prints what single calls on files cost, in microseconds: tenth percentile and median of 101 batches, files in turn.

    benches/requests.py FILE...        # one of a mount, and the same file of an ordinary venv

`chrt -f 5` before it keeps other work away. Python's own share is about 0.5 us a call.
"""

import os
import statistics
import sys
import time

BATCHES, CALLS = 101, 40


def opened(path):
    os.close(os.open(path, os.O_RDONLY))


def asked(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.isatty(descriptor)
    finally:
        os.close(descriptor)


def imported(path):
    """As CPython up to 3.13 reads a module."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fstat(descriptor)
    os.isatty(descriptor)
    os.read(descriptor, 4096)
    os.close(descriptor)


def missed(path):
    missed.number += 1
    os.access(f"{path}-{missed.number}", os.F_OK)


missed.number = time.time_ns()

KINDS = {
    "open, close": opened,
    "open, isatty, close": asked,
    "as an import": imported,
    "statfs": os.statvfs,
    "a name that is not there": missed,
}


def microseconds(call, path):
    start = time.perf_counter()
    for _ in range(CALLS):
        call(path)
    return (time.perf_counter() - start) / CALLS * 1e6


def main(paths):
    if not paths or paths[0].startswith("-"):
        sys.exit(__doc__)
    for name, call in KINDS.items():
        batches = {path: [] for path in paths}
        for _ in range(BATCHES):
            for path in paths:
                batches[path].append(microseconds(call, path))
        for path, found in batches.items():
            print(f"{name:26} {sorted(found)[BATCHES // 10]:8.1f} {statistics.median(found):8.1f}  {path}")


main(sys.argv[1:])
