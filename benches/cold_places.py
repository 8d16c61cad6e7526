"""What cold starts are measured with: stores and a venv on the simulated NAS, a venv and a store on the local disk.

    DIR/backing/zstd, raw    stores; the NAS shows both, and `raw` is the store on the local disk, too
    DIR/backing/venv         the peer, made by uv through the NAS
    DIR/nas                  the NAS
    DIR/venv                 the peer on the local disk
    DIR/node, local          a node that mounts a store of the NAS, and one that mounts `backing/raw`
"""

import json
import time

import environments
import making
import nas
from harness import Failed, say
from node import Node

RECORD = "made.json"
STORES = {"zstd": "zstd", "raw": "none"}


class Places:
    """Everything there is, and what is known of it."""

    def __init__(self, ctx, nas):
        self.ctx, self.nas = ctx, nas
        self.record, self.lock = ctx.dir / RECORD, ctx.dir / "pylock.toml"
        self.venv, self.nas_venv = ctx.dir / "venv", nas.mount / "venv"
        self.nodes = {store: Node(ctx, ctx.dir / f"node-{store}", nas.mount / store) for store in STORES}
        self.node = self.nodes["zstd"]
        self.local = Node(ctx, ctx.dir / "local", nas.backing / "raw", cached=False)

    def unmount(self):
        for node in [*self.nodes.values(), self.local]:
            node.unmount()

    def make(self):
        """Makes what is not there yet."""
        if not (self.ctx.keep and self.record.exists()):
            self.record.write_text(json.dumps(self.made()))
        for name, value in json.loads(self.record.read_text()).items():
            setattr(self, name, value)
        self.same()

    def made(self):
        ctx, local = self.ctx, self.local
        say("ingesting the interpreter ...")
        new_store(ctx, local, STORES["raw"])
        origin = json.loads(local.fabric("python", "list", "--json"))[0]["origin"]
        requirements = ctx.dir / "requirements.txt"
        wanted = environments.SMALL if ctx.mode == "small" else environments.LARGE
        requirements.write_text("\n".join(wanted) + "\n")
        say("resolving and downloading ...")
        making.resolve(ctx, requirements, self.lock, origin)
        making.new_venv(ctx, self.venv, origin)
        making.sync(ctx, self.venv, self.lock)
        say("creating the environment in a store on the local disk ...")
        create(ctx, local, self.lock)
        creation = []
        if ctx.wants(self.creation_row()):
            say("creating the environment over the NAS, in turn with uv ...")
            creation = [self.over_nas(origin) for _ in range(min(3, ctx.runs) if ctx.mode == "small" else 1)]
        else:
            self.behind_nas(origin)
        shown = json.loads(self.node.fabric("show", f"bench/{ctx.mode}", "--json"))
        return {
            "origin": origin, "creation": creation, "packages": len(shown["packages"]), "bytes": shown["bytes"],
            "version": shown["interpreter"]["version"], "commit": ctx.commit,
        }

    def over_nas(self, origin):
        """Seconds of making the environment on the NAS, by envfabric and by uv, both offline."""
        ctx, node = self.ctx, self.node
        self.remove_both()
        new_store(ctx, node, STORES["zstd"])
        ours = took(lambda: create(ctx, node, self.lock))

        def with_uv():
            making.new_venv(ctx, self.nas_venv, origin)
            making.sync(ctx, self.nas_venv, self.lock, "--offline")

        ctx.env["UV_LINK_MODE"] = "copy"  # there are no hard links from the local disk to a NAS
        try:
            return ours, took(with_uv)
        finally:
            ctx.use(ctx.place)

    def behind_nas(self, origin):
        """Both made on the NAS's disk, past the NAS: nobody asks how long it takes."""
        ctx = self.ctx
        say("creating the environment on the NAS's disk ...")
        self.remove_both()
        builder = Node(ctx, ctx.dir / "builder", self.nas.backing / "zstd", cached=False)
        new_store(ctx, builder, STORES["zstd"])
        create(ctx, builder, self.lock)
        making.new_venv(ctx, self.nas.backing / "venv", origin)
        making.sync(ctx, self.nas.backing / "venv", self.lock, "--offline")

    def remove_both(self):
        self.node.forget()
        nas.remove(self.nas.backing / "zstd")
        nas.remove(self.nas.backing / "venv")

    def creation_row(self):
        return f"create the {self.ctx.mode} environment over the NAS, nothing but the interpreter in the store"

    def same(self):
        """What must not be compared is two Pythons, or two sets of packages."""
        sides = [environments.installed(self.ctx, self.venv / "bin/python")]
        sides.append(environments.installed(self.ctx, self.nas_venv / "bin/python"))
        for node in [*self.nodes.values(), self.local]:
            node.mount()
            sides.append(environments.installed(self.ctx, node.python()))
            node.unmount()
        for side in sides[1:]:
            if side != sides[0]:
                raise Failed(f"the environments differ: {sorted(set(side) ^ set(sides[0]))[:10]}")

    # Profiles

    def profiles(self, store):
        return self.nas.backing / store / "envs/bench" / self.ctx.mode / "profiles"

    def learn(self, store, code):
        """What the first start on a node leaves in the store, as {path: bytes}."""
        node = self.nodes[store]
        self.know(store, {})
        node.cold()
        self.ctx.timed(node.python(), "-c", code)()
        until = time.monotonic() + 30
        while not found(self.profiles(store)):
            if time.monotonic() > until:
                raise Failed(f"no profile came into the store within 30 s after `{code}`")
            time.sleep(0.2)
        node.unmount()
        return found(self.profiles(store))

    def know(self, store, profile):
        """The store has this profile from now on, and no other. Its node is unmounted, because it records."""
        self.nodes[store].unmount()
        nas.remove(self.profiles(store))
        for path, content in profile.items():
            target = self.profiles(store) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def found(place):
    """{path: bytes} of all documents below a directory."""
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*.json")} if place.exists() else {}


def new_store(ctx, node, compression):
    """A store that knows an interpreter and nothing else."""
    node.fabric("init", "--compression", compression)
    node.fabric("create", "bench/first", "six", *making.python_option(ctx))


def create(ctx, node, lock, name=None):
    node.fabric("create", name or f"bench/{ctx.mode}", "--lock", lock, "--offline", *making.python_option(ctx))


def took(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
