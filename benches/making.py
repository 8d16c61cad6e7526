"""What both sides are made with: uv's commands, and a store that knows nothing but an interpreter."""

import pathlib

from harness import say

# What is published later is not seen, so that the figures of two runs are about the same files.
SNAPSHOT = "2026-11-01"


def python_option(ctx):
    return ["--python", ctx.python] if ctx.python else []


def new_store(ctx):
    """Makes the store, ingests the interpreter, and returns the path it came from."""
    ctx.place.mkdir(exist_ok=True)
    ctx.fabric("init")
    ctx.fabric("create", "bench/first", "six", *python_option(ctx))
    return ctx.fabric_json("python", "list")[0]["origin"]


def resolve(ctx, requirements, lock, python, *options):
    form = ["--format", "pylock.toml"] if lock.suffix == ".toml" else []
    ctx.run(ctx.uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--exclude-newer", SNAPSHOT,
            "--python", python, *form, "-o", lock, *options, requirements)


def new_venv(ctx, venv, python):
    ctx.run(ctx.uv, "venv", "-q", "--relocatable", "--python", python, venv)


def sync(ctx, venv, lock, *options):
    ctx.run(ctx.uv, "pip", "sync", "-q", "--preview-features", "pylock", "--compile-bytecode",
            "--python", venv / "bin/python", *options, lock)


def same_disk(ctx):
    """uv's cache must be where hard links into it are possible."""
    cache = pathlib.Path(ctx.run(ctx.uv, "cache", "dir").strip())
    while not cache.exists():
        cache = cache.parent
    if cache.stat().st_dev != ctx.dir.stat().st_dev:
        say("uv's cache is on another disk: using one of its own")
        ctx.clean["UV_CACHE_DIR"] = str(ctx.dir / "uv-cache")
        ctx.use(ctx.place)
