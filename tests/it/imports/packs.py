"""Compares every entry that an environment offers to imports with the file system, and prints how many there were."""

import marshal
import os
import sys

version = os.path.realpath(sys.base_prefix + "/..")
imports = version + "/.imports/"


def read(path):
    with open(path, "rb") as file:
        return file.read()


form, device, (site_ino, site_path), libraries, file_bases, dir_bases, top = marshal.loads(read(imports + "index"))
site = os.stat(f"{version}/.venv/{site_path}")
assert (form, device, site_ino) == (1, site.st_dev, site.st_ino)
for ino, path in libraries.items():
    assert os.stat(f"{version}/.python/{path}").st_ino == ino
assert len(libraries) == 2
stems = {name.split(".")[0] for name in os.listdir(f"{version}/.venv/{site_path}")}
assert set(top) <= stems, set(top) - stems
tag = sys.implementation.cache_tag
counted = [0, 0, 0, 0]
for layer, base in enumerate(file_bases):
    root = f"{version}/{'.venv' if layer else '.python'}/"
    tables = marshal.loads(read(f"{imports}{layer}.index"))
    pack = None
    for directory, table in tables.items():
        row, names = marshal.loads(table)
        # A directory of several layers is this layer's only in part, and imports leave it to CPython.
        first = directory[len(site_path) + 1 :].split("/")[0]
        if layer == 0 or (directory.startswith(site_path + "/") and top.get(first) == layer):
            assert os.stat(root + directory).st_ino == dir_bases[layer] + row, directory
        for name, entry in names.items():
            counted[entry[0]] += 1
            here = f"{root}{directory}/"
            if entry[0] == 3:
                continue
            source = here + name + {0: ".py", 1: "/__init__.py", 2: entry[2]}[entry[0]]
            assert os.stat(source).st_ino == base + entry[1], source
            if entry[0] != 2:
                stem = name if entry[0] == 0 else "__init__"
                inside = "" if entry[0] == 0 else name + "/"
                if pack is None:
                    pack = read(f"{imports}{layer}.pack")
                expected = read(f"{here}{inside}__pycache__/{stem}.{tag}.pyc")
                assert pack[entry[2] : entry[2] + entry[3]] == expected, source
print(*counted)
