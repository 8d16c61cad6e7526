"""What ten versions of the small environment take on the disk, each with one package one release newer."""

import hashlib
import json
import os
import shutil
import stat

import environments
import making
from harness import Failed, Row, failed, say, size

# Package, the release of the first version, the release it moves to. One step makes one version.
STEPS = [
    ("certifi", "2026.6.17", "2026.7.22"),
    ("idna", "3.18", "3.19"),
    ("narwhals", "2.25.0", "2.26.0"),
    ("numpy", "2.4.4", "2.4.5"),
    ("jedi", "0.19.2", "0.20.0"),
    ("urllib3", "2.6.3", "2.7.0"),
    ("packaging", "26.1", "26.2"),
    ("mistune", "3.3.3", "3.3.4"),
    ("requests", "2.34.1", "2.34.2"),
]
COUNT = 1 + len(STEPS)


def rows(ctx):
    name = "store bytes for ten versions, each with one package one release apart"
    against = f"{name}, against their distinct bytes"
    if not any([ctx.wants(name), ctx.wants(against)]):
        return
    say(f"{name} ...")
    try:
        with ctx.at(ctx.dir / "ten"):
            figures = measured(ctx)
    except (Failed, OSError) as problem:
        yield failed(name, problem)
        return
    store, distinct = size(figures["store"]), size(figures["distinct"])
    yield Row(
        name, f"{store} with the interpreter",
        f"ten venvs {size(figures['apparent'])}, on the disk with hard links {size(figures['linked'])}; "
        f"one venv {size(figures['one'])}",
    )
    yield Row(against, store, f"distinct files {distinct}", figures["store"] / figures["distinct"], 1.2, 0.6)


def measured(ctx):
    """Bytes of the store and of the venvs, made anew unless both are kept."""
    record = ctx.place / "venvs.json"
    if not record.exists():
        make(ctx, record)
    with ctx.mounted():
        distinct = distinct_bytes(ctx.mount_point / "bench/ten/.versions", COUNT)
    store = sum(info.st_blocks * 512 for _, info in entries(ctx.store))
    return json.loads(record.read_text()) | {"store": store, "distinct": distinct}


def make(ctx, record):
    shutil.rmtree(ctx.place, ignore_errors=True)
    origin = making.new_store(ctx)
    for i, lock in enumerate(locks(ctx, origin)):
        say(f"  version {i + 1} of {COUNT}")
        ctx.fabric("create", "bench/ten", "--lock", lock, *making.python_option(ctx))
    record.write_text(json.dumps(venvs(ctx, origin)))


def locks(ctx, python):
    """Ten locks; all but the first differ from the one before in one package."""
    pins, first, requirements = ctx.place / "pins.txt", ctx.place / "first.txt", ctx.place / "requirements.txt"
    requirements.write_text("\n".join(environments.SMALL) + "\n")
    pins.write_text("".join(f"{package}=={old}\n" for package, old, _ in STEPS))
    making.resolve(ctx, requirements, first, python, "--constraints", pins)
    pinned = first.read_text()
    made = []
    for package, old, new in [("", "", "")] + STEPS:
        before = pinned
        pinned = pinned.replace(f"{package}=={old}\n", f"{package}=={new}\n") if package else pinned
        if package and pinned == before:
            raise Failed(f"{package}=={old} is not among the packages of the first version")
        requirements.write_text(pinned)
        made.append(ctx.place / f"pylock.{len(made) + 1}.toml")
        making.resolve(ctx, requirements, made[-1], python, "--no-deps")
    return made


def venvs(ctx, python):
    """The ten venvs' bytes: of one, of all, and of all on the disk where hard links count once.

    One venv is moved through the ten versions. Files with one link (bytecode, scripts, records) would be anew in each
    of ten venvs; files that uv links from its cache are told by their inode.
    """
    venv = ctx.place / "venv"
    making.new_venv(ctx, venv, python)
    apparent, alone, linked = [], 0, {}
    for i in range(COUNT):
        making.sync(ctx, venv, ctx.place / f"pylock.{i + 1}.toml", "--offline")
        apparent.append(0)
        for _, info in entries(venv):
            regular = stat.S_ISREG(info.st_mode)
            apparent[-1] += info.st_size if regular else 0
            if regular and info.st_nlink > 1:
                linked[info.st_ino] = info.st_blocks * 512
            else:
                alone += info.st_blocks * 512
    shutil.rmtree(venv)
    return {"one": apparent[0], "apparent": sum(apparent), "linked": alone + sum(linked.values())}


def distinct_bytes(versions, count):
    """Bytes of all files of different content that the versions show, interpreter included."""
    digests, sizes = {}, {}
    for number in range(1, count + 1):
        for path, info in entries(versions / str(number)):
            if stat.S_ISREG(info.st_mode) and info.st_ino not in digests:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
                digests[info.st_ino] = digest
                sizes[digest] = info.st_size
    return sum(sizes.values())


def entries(top):
    """(path, lstat) of everything below a directory."""
    for directory, names, files in os.walk(top):
        for name in names + files:
            path = os.path.join(directory, name)
            yield path, os.lstat(path)
