"""The two reference environments, each made by uv and by envfabric from one lock."""

import json
import os
import pathlib
import shutil

import creation
import making
from harness import Failed, say

SMALL = "numpy pandas scikit-learn pyarrow fastapi jupyterlab".split()
LARGE = "torch transformers pandas scikit-learn pyarrow matplotlib ray[data] jupyterlab fastapi".split()


class Pair:
    """One environment as envfabric shows it and as a venv beside it."""

    def __init__(self, ctx):
        shown = ctx.fabric_json("show", f"bench/{ctx.mode}")
        self.python = pathlib.Path(shown["path"])
        self.tree = self.python.parent.parent
        self.packages, self.bytes = len(shown["packages"]), shown["bytes"]
        self.version = shown["interpreter"]["version"]
        self.lock = ctx.dir / "pylock.toml"
        self.venv = ctx.dir / "venv"
        self.venv_python = self.venv / "bin/python"
        # What the benchmark must not do is compare two Pythons, or two sets of packages.
        sides = [installed(ctx, self.venv_python), None]
        with ctx.mounted():
            sides[1] = installed(ctx, self.python)
        if sides[0] != sides[1]:
            raise Failed(f"the two environments differ: {sorted(set(sides[0]) ^ set(sides[1]))[:10]}")

    def library(self):
        """The largest shared library, by its path inside of the environment."""
        found = [
            (os.stat(path).st_size, path.relative_to(self.venv))
            for path in self.venv.rglob("*.so*")
            if path.is_file() and not path.is_symlink()
        ]
        return max(found)[1]


def installed(ctx, python):
    """The Python and the distributions that an interpreter sees."""
    code = (
        "import sys, json, importlib.metadata as m;"
        "print(json.dumps([sys.version] + sorted(d.name.lower() + '==' + d.version for d in m.distributions())))"
    )
    return json.loads(ctx.run(python, "-c", code, env=ctx.clean))


def make(ctx):
    """Makes both environments, or finds those of an earlier run with --keep."""
    if ctx.keep and (ctx.dir / "venv").exists() and ctx.fabric("show", f"bench/{ctx.mode}", quiet=True):
        ctx.unmount()
        making.same_disk(ctx)
        say(f"measuring with the environments in {ctx.dir}")
        return Pair(ctx)
    clear(ctx)
    ctx.dir.mkdir(parents=True, exist_ok=True)
    making.same_disk(ctx)
    say("ingesting the interpreter ...")
    origin = making.new_store(ctx)
    lock, venv = ctx.dir / "pylock.toml", ctx.dir / "venv"
    requirements = ctx.dir / "requirements.txt"
    requirements.write_text("\n".join(SMALL if ctx.mode == "small" else LARGE) + "\n")
    say("resolving and downloading ...")
    making.resolve(ctx, requirements, lock, origin)
    making.new_venv(ctx, venv, origin)
    making.sync(ctx, venv, lock)
    creation.in_turn(ctx, lock, venv, origin)
    return Pair(ctx)


def clear(ctx):
    """Removes what an earlier run left in the mode's directory, and nothing that is not a benchmark's."""
    if not ctx.dir.exists():
        return
    if any(ctx.dir.iterdir()) and not (ctx.dir / "store").exists():
        raise Failed(f"{ctx.dir} is there and not a benchmark's: remove it, or name another --dir")
    ctx.unmount()
    shutil.rmtree(ctx.dir)
