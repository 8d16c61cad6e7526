"""Requests that reach the serving process, by kind, for each workload (where `envfabric stats` tells)."""

import json

import imports
from harness import say


def table(ctx, pair):
    """{workload: {kind: requests}} of warm runs; empty where the program has no counts."""
    if not ctx.wants("requests by kind") or counts(ctx) is None:
        return {}
    say("requests by kind ...")
    asking = caused(ctx, lambda: None)
    found = {}
    for code in ["pass", *(f"import {library}" for library in imports.libraries(ctx))]:
        start = ctx.timed(pair.python, "-c", code)
        start()
        found[code] = {k: n - asking.get(k, 0) for k, n in caused(ctx, start).items() if n > asking.get(k, 0)}
    return found


def caused(ctx, work):
    """{kind: requests} between two questions, what the question itself causes included."""
    before = counts(ctx)
    work()
    return {k: n - before.get(k, 0) for k, n in counts(ctx).items()}


def counts(ctx):
    """{kind: requests so far}, or None."""
    out = ctx.fabric("stats", "--json", quiet=True)
    return numbers(json.loads(out)) if out.strip() else None


def numbers(value):
    """The first object named `requests` whose values are whole numbers."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return None
    inner = value.get("requests")
    if isinstance(inner, dict) and inner and all(isinstance(n, int) for n in inner.values()):
        return inner
    return next(filter(None, map(numbers, value.values())), None)


def lines(found):
    """As a table in Markdown."""
    if not found:
        return []
    out = ["", "| requests, warm | all | by kind |", "|---|---|---|"]
    for code, kinds in found.items():
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
        out.append(f"| `{code}` | {sum(kinds.values())} | {listed} |")
    return out
