"""Closes every file while `pydoc` is being executed from a pack, and takes their numbers."""

import builtins
import os
import sys

taken = []
real = builtins.__import__


def hooked(name, globals=None, *rest):
    if globals is not None and globals.get("__name__") == "pydoc" and not taken:
        os.closerange(3, 64)
        for _ in range(16):
            fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
            os.write(fd, b"mine")
            os.lseek(fd, 0, os.SEEK_SET)
            taken.append(fd)
    return real(name, globals, *rest)


for name in ("pydoc", "platform", "urllib.parse", "tokenize", "pkgutil"):
    sys.modules.pop(name, None)
builtins.__import__ = hooked
try:
    import pydoc  # noqa: F401
finally:
    builtins.__import__ = real
