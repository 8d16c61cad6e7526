"""Checks in one interpreter that imports are what they are without the accelerator; prints "done".

semantics.py on|off
"""

import importlib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
import warnings

import _envfabric

sys.dont_write_bytecode = True  # two modules beside this file

assert _envfabric.start() == (sys.argv[1] == "on")


def files():
    """Packs that this process has open."""
    names = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [path for path in (os.readlink(name) for name in names if os.path.lexists(name)) if ".imports" in path]


# A module and a package know where they are from.
import colorsys
import packaging
import packaging.version

for module, package in ((colorsys, False), (packaging, True), (packaging.version, False)):
    spec = module.__spec__
    assert type(spec) is importlib.machinery.ModuleSpec and spec.name == module.__name__
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader and spec.loader is module.__loader__
    assert module.__file__ == spec.origin == module.__loader__.path and os.path.isfile(module.__file__)
    assert module.__cached__ == spec.cached == importlib.util.cache_from_source(module.__file__)
    assert spec.has_location and not spec._initializing
    assert hasattr(module, "__path__") == package
    if package:
        assert module.__path__ == [os.path.dirname(module.__file__)]
    assert inspect.getsource(module) == open(module.__file__).read()
    assert module.__loader__.get_code(module.__name__).co_filename == module.__file__
    assert spec.loader == importlib.machinery.SourceFileLoader(module.__name__, module.__file__)
assert packaging.version.parse.__code__.co_filename == packaging.version.__file__
assert not files(), files()

# Data, resources, and looking around.
assert pkgutil.get_data("packaging", "py.typed") == b""
assert (importlib.resources.files("packaging") / "version.py").read_text() == inspect.getsource(packaging.version)
assert "version" in {module.name for module in pkgutil.iter_modules(packaging.__path__)}
assert importlib.util.find_spec("packaging.absent") is None
try:
    import packaging.absent
except ModuleNotFoundError as error:
    assert error.name == "packaging.absent"
else:
    raise AssertionError

# Reloading runs the code again, in the same module.
before = packaging.version.Version
assert importlib.reload(packaging.version) is packaging.version and packaging.version.Version is not before

# A namespace package.
import jaraco
import jaraco.context
import jaraco.functools

assert jaraco.__spec__.loader is None or "Namespace" in type(jaraco.__spec__.loader).__name__
assert getattr(jaraco, "__file__", None) is None and len(list(jaraco.__path__)) == 1

# Tracebacks and warnings name no frame of importlib, whatever runs in between.
class Stop(Exception):
    pass


def stop(*args, **kwargs):
    raise Stop


sys.modules.pop("this", None)
saved, sys.stdout = sys.stdout, type("Out", (), {"write": stop, "flush": lambda self: None})()
try:
    import this
except Stop as error:
    names = [os.path.basename(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
else:
    names = []
finally:
    sys.stdout = saved
assert names == ["semantics.py", "this.py", "semantics.py"], names
sys.modules.pop("this", None)
assert not files(), files()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import imp_warns  # beside this file: warns with stacklevel=2
assert [w.filename for w in caught] == [__file__], caught

# A loader of somebody's own, put before the usual ones.
class Loud(importlib.machinery.SourceFileLoader):
    seen = []

    def source_to_code(self, data, path, *, _optimize=-1):
        self.seen.append(self.name)
        return super().source_to_code(data + b"\nloud = True\n", path)

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)


hook = importlib.machinery.FileFinder.path_hook((Loud, [".py"]))
sys.path_hooks.insert(0, hook)
sys.path_importer_cache.clear()
import packaging.tags

assert packaging.tags.loud and "packaging.tags" in Loud.seen, Loud.seen
sys.path_hooks.remove(hook)
sys.path_importer_cache.clear()

# A patched loader.
usual = importlib.machinery.SourceFileLoader.get_code
asked = []


def get_code(self, fullname):
    asked.append(fullname)
    return usual(self, fullname)


importlib.machinery.SourceFileLoader.get_code = get_code
import packaging.utils

del importlib.machinery.SourceFileLoader.get_code
assert "packaging.utils" in asked, asked

# Bytecode elsewhere.
sys.pycache_prefix = "/nonexistent-prefix"
import packaging.specifiers

assert packaging.specifiers.__cached__.startswith("/nonexistent-prefix/"), packaging.specifiers.__cached__
sys.pycache_prefix = None

# A module that closes every file while packs are open, and takes their numbers for files of its own.
import closes_all  # beside this file

assert closes_all.taken and all(os.read(fd, 4) == b"mine" for fd in closes_all.taken)

# Many threads.
import threading

todo = """json.tool xml.dom.minidom email.mime.text wsgiref.simple_server concurrent.futures.thread multiprocessing.pool
    unittest.mock html.parser packaging.markers tomllib""".split()
todo = [name for name in todo if importlib.util.find_spec(name)]
problems = []


def load(names):
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append((name, error))


threads = [threading.Thread(target=load, args=(todo[at:] + todo[:at],)) for at in range(len(todo))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not problems, problems
assert not files(), files()
print("done")
