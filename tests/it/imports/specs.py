"""Prints what an import of every module of an environment would be given, and of names that do not exist, as JSON.

Nothing is imported: the finder of each directory is asked by itself.
"""

import json
import os
import pkgutil
import sys
import sysconfig

import _envfabric

active = _envfabric.start()


def told(spec):
    if spec is None:
        return None
    loader = spec.loader
    return {
        "name": spec.name,
        "loader": None if loader is None else [type(loader).__module__, type(loader).__qualname__, vars(loader)],
        "origin": spec.origin,
        "cached": spec.cached,
        "locations": None if spec.submodule_search_locations is None else list(spec.submodule_search_locations),
        "has_location": spec.has_location,
        "parent": spec.parent,
        "state": spec.loader_state,
    }


def visit(directory, package, found):
    names = {"_absent", "", "__init__", "__pycache__"}
    for entry in os.listdir(directory):
        names.update((entry, entry.split(".")[0], entry.rpartition(".")[0]))
    below = {}
    for name in sorted(names):
        full = package + name
        spec = pkgutil.get_importer(directory).find_spec(full)
        found[full] = told(spec)
        for place in (spec and spec.submodule_search_locations) or ():
            if name and not name.startswith("__"):
                below[place] = full + "."
    for place, full in below.items():
        visit(place, full, found)


found = {}
for directory in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib") + "/lib-dynload"):
    part = {}
    visit(directory, "", part)
    found[directory] = part
json.dump({"active": active, "found": found}, sys.stdout)
