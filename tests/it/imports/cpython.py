"""Runs CPython's own tests, as `python -m test` does, on a file system that nobody may write.

cpython.py TEST...
"""

import os
import sys

try:
    from test.support import os_helper
except ImportError:  # before Python 3.10
    import test.support as os_helper


def unlink(path, *args, **kwargs):
    """Unlinking what is not there is EROFS on a file system that is mounted read-only; the tests clean up so."""
    if not os.path.lexists(path):
        raise FileNotFoundError(2, os.strerror(2), path)
    real(path, *args, **kwargs)


real, os_helper._unlink = os_helper._unlink, unlink
import _envfabric

print("active" if _envfabric.start() else "plain", flush=True)
from test.libregrtest.main import main

sys.argv = ["test", *sys.argv[1:]]
main()
