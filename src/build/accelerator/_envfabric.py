"""Makes imports from a mount of Environment Fabric cheaper once an interpreter imports more than a few modules.

Run by `_envfabric.pth` when an interpreter starts. What does the work is in `_envfabric_imports`; loading it costs more
than the few imports of a short script are worth. ENVFABRIC_IMPORTS=off in the environment switches all of it off.
"""


def _prepare():
    import sys
    import posix

    value = b"" if sys.flags.ignore_environment else posix.environ.get(b"ENVFABRIC_IMPORTS", b"")
    gil = getattr(sys, "_is_gil_enabled", None)
    usual = not sys.flags.verbose and not sys.flags.optimize and (gil is None or gil())
    if not usual or value.lower() in (b"off", b"0", b"no", b"false"):
        return lambda: False
    from _frozen_importlib_external import FileFinder

    usually = FileFinder.find_spec
    searches_left = 12  # what `python -c pass` makes is less
    active = None
    now = usually  # never asked of the class: whoever wraps this function stands there

    def find_spec(self, fullname, target=None):
        nonlocal searches_left
        searches_left -= 1
        if searches_left < 0:
            start()
        return now(self, fullname, target)

    def start():
        nonlocal active, now
        if active is None:
            active = False
            # If somebody else has changed it since, that stays as it is.
            if FileFinder.find_spec is find_spec:
                FileFinder.find_spec = usually
                try:
                    import _envfabric_imports

                    active = _envfabric_imports.install()
                except Exception:  # a program must run, come what may
                    pass
                now = FileFinder.find_spec
        return active

    find_spec.__code__ = find_spec.__code__.replace(co_filename=usually.__code__.co_filename)
    FileFinder.find_spec = find_spec
    return start


#: Starts now instead of soon; true when imports are accelerated in this interpreter.
start = _prepare()
