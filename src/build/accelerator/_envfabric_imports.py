"""Imports from a mount of Environment Fabric with fewer questions to it.

CPython's own finder and loader ask the file system some ten times for each module, and what the kernel does not cache
(open, close, isatty) goes to the daemon of the mount. Where a directory is one of this environment's, which never change,
this finds modules in a table of names that the mount makes from the environment's catalogs, and reads bytecode from the
pack of its layer, which is opened once for many modules.

Nothing else changes: finders, loaders, specs and modules are of the types, and have the values, that they have without.
A module is taken from a pack only if its source file, looked at then, is that very file: same device, same inode. Where
anything is unusual (an overlay, something mounted over a file, another loader, a patched importlib, a namespace package,
two wheels with one name) CPython's own code does it.

`_envfabric` starts it.
"""

import sys

_watched = []  # a weak reference is of use as long as somebody holds it


def install():
    """Replaces the finder and the executor of source files; false where this is not a mount that offers packs."""
    import _frozen_importlib as bootstrap
    import _frozen_importlib_external as external
    import _imp
    import marshal
    import posix
    from _thread import get_ident
    from _weakref import ref
    from time import perf_counter as now

    FileFinder, SourceFileLoader = external.FileFinder, external.SourceFileLoader
    ExtensionFileLoader, ModuleSpec = external.ExtensionFileLoader, bootstrap.ModuleSpec
    find_usually, exec_usually = FileFinder.find_spec, external._LoaderBasics.exec_module
    get_code, get_data, path_stats = SourceFileLoader.get_code, SourceFileLoader.get_data, SourceFileLoader.path_stats
    cache_from_source = external.cache_from_source
    if any(f.__module__ != cache_from_source.__module__ for f in (find_usually, exec_usually, get_code, get_data)):
        return False  # somebody was here before
    stat, fstat, open_, close, pread = posix.stat, posix.fstat, posix.open, posix.close, posix.pread
    loads, fix_filename, call = marshal.loads, _imp._fix_co_filename, bootstrap._call_with_frames_removed
    loaders = [(suffix, loader) for loader, suffixes in external._get_supported_file_loaders() for suffix in suffixes]
    suffixes = frozenset(external.EXTENSION_SUFFIXES)
    tag = sys.implementation.cache_tag
    header = external.MAGIC_NUMBER + bytes(4) + (946684800).to_bytes(4, "little")  # of bytecode: every file has one mtime

    def read(name):
        fd = open_(folder + name, posix.O_RDONLY)
        try:
            return loads(pread(fd, fstat(fd).st_size, 0))
        finally:
            close(fd)

    # Of a Python older than 3.11 the base prefix is a link.
    folder = sys.base_prefix + "/../.imports/"
    try:
        form, device, site, libraries, file_bases, dir_bases, site_names = read("index")
    except OSError:
        return False  # another file system, or a mount that does not offer it
    if form != 1:
        return False
    site_ino, site_path = site

    layers = {}  # number of a layer: {directory: its table as bytes}
    tables = {}  # number of a layer, directory: (row, {name: entry})
    roots = []  # paths of site-packages and the standard library, with their directory in a layer, and the layer's number
    found = {}  # path of a source: number of its layer, where in its pack, how long, length of the source; () if not there
    threads = {}  # thread: [how many modules are being executed, {number of a layer: (its open pack, device, inode)}]
    looked_at = set()  # paths of directories in which something was found
    nothing = (0, {})

    def table(layer, directory):
        known = tables.get((layer, directory))
        if known is None:
            whole = layers.get(layer)
            if whole is None:
                whole = layers[layer] = read("%d.index" % layer)
            packed = whole.get(directory)
            known = tables[layer, directory] = nothing if packed is None else loads(packed)
        return known

    def place_of(finder):
        """What is known of a finder's directory: (layer, directory, its names, inode); None where nothing is."""
        if type(finder) is not FileFinder:
            return None
        try:
            here = stat(finder.path)
            if here.st_dev != device:
                return None
            if here.st_ino == site_ino:
                return None, site_path, site_names, site_ino
            library = libraries.get(here.st_ino)
            if library is not None:
                return 0, library, table(0, library)[1], here.st_ino
            for root, layer, directory in roots:
                if finder.path.startswith(root):
                    below = finder.path[len(root) :]
                    if layer is None:
                        layer = site_names[below.partition("/")[0]]
                    if layer < 0:
                        return None  # several layers have it
                    directory += "/" + below
                    row, names = table(layer, directory)
                    if here.st_ino == dir_bases[layer] + row:
                        return layer, directory, names, here.st_ino
        except (OSError, KeyError, ValueError, EOFError, TypeError):
            pass
        return None

    for path in sys.path:
        try:
            here = stat(path)
        except (OSError, ValueError, TypeError):
            continue
        if here.st_dev == device and here.st_ino == site_ino:
            roots.append((path + "/", None, site_path))
        elif here.st_dev == device and here.st_ino in libraries:
            roots.append((path + "/", 0, libraries[here.st_ino]))

    def find_spec(self, fullname, target=None):
        known = self.__dict__
        if "_envfabric" in known:
            place = known["_envfabric"]
        else:
            place = known["_envfabric"] = place_of(self)
        if place is None or self._loaders != loaders or sys.pycache_prefix is not None:
            return find_usually(self, fullname, target)
        layer, directory, names, ino = place
        path = self.path
        tail = fullname.rpartition(".")[2]
        entry = names.get(tail)
        try:
            if entry is None:
                here = stat(path)
                if here.st_ino == ino and here.st_dev == device:
                    return None
                return find_usually(self, fullname, target)
            if layer is None:
                if entry < 0:
                    return find_usually(self, fullname, target)
                layer = entry
                entry = table(layer, directory)[1][tail]
            kind, row = entry[:2]
            base = path + "/" + tail
            if kind == 0:
                file, cached = base + ".py", "%s/__pycache__/%s.%s.pyc" % (path, tail, tag)
            elif kind == 1:
                file, cached = base + "/__init__.py", "%s/__pycache__/__init__.%s.pyc" % (base, tag)
            elif kind == 2 and entry[2] in suffixes:
                file, cached = base + entry[2], None
            else:
                spec = find_usually(self, fullname, target)
                if spec is not None and type(spec.loader) is SourceFileLoader:
                    found[spec.origin] = ()  # what it imports is in the pack nevertheless
                return spec
            if path in looked_at:
                there = stat(file)
            else:
                # Where the kernel knows nothing yet, one listing tells it about all files of the directory.
                looked_at.add(path)
                before = now()
                there = stat(file)
                if now() - before > 2e-5:
                    posix.listdir(path)
        except (OSError, KeyError, ValueError, EOFError, TypeError):
            return find_usually(self, fullname, target)
        if there.st_ino != file_bases[layer] + row or there.st_dev != device:
            return find_usually(self, fullname, target)
        loader = ExtensionFileLoader(fullname, file) if kind == 2 else SourceFileLoader(fullname, file)
        spec = ModuleSpec(fullname, loader, origin=file)
        spec._set_fileattr = True
        spec._cached = cached
        if kind == 1:
            spec.submodule_search_locations = [base]
        if kind != 2:
            found[file] = layer, entry[2], entry[3], there.st_size
        return spec

    def code_of(path, where, packs):
        if not where:
            return None
        layer, offset, length, source_length = where
        try:
            pack = packs.get(layer)
            if pack is None:
                if len(packs) >= 48:
                    let_go(packs.pop(next(iter(packs))))
                fd = open_(folder + "%d.pack" % layer, posix.O_RDONLY)
                about = fstat(fd)
                pack = packs[layer] = fd, about.st_dev, about.st_ino
            data = pread(pack[0], length, offset)
            # Also when somebody closed what was opened here, and the number is another file's by now.
            if data[:12] != header or data[12:16] != source_length.to_bytes(4, "little"):
                return None
            code = loads(memoryview(data)[16:])
            fix_filename(code, path)
        except (OSError, ValueError, EOFError, TypeError, OverflowError):
            return None
        return code

    def let_go(pack):
        fd, dev, ino = pack
        try:
            about = fstat(fd)
            if about.st_ino == ino and about.st_dev == dev:
                close(fd)
        except OSError:
            pass

    def ended(thread, state):
        """A module has been executed; with the outermost one, packs are closed."""
        state[0] -= 1
        if not state[0]:
            threads.pop(thread, None)
            for pack in state[1].values():
                let_go(pack)

    def exec_module(self, module):
        loader = type(self)
        where = found.pop(self.path, None) if loader is SourceFileLoader else None
        if (
            where is None
            or module.__name__ != self.name
            or loader.get_code is not get_code
            or loader.get_data is not get_data
            or loader.path_stats is not path_stats
            or external.cache_from_source is not cache_from_source
            or sys.pycache_prefix is not None
        ):
            return exec_usually(self, module)
        me = get_ident()
        state = threads.get(me)
        if state is None:
            state = threads[me] = [0, {}]
        state[0] += 1
        try:
            code = code_of(self.path, where, state[1])
            if code is None:
                exec_usually(self, module)
            else:
                call(exec, code, module.__dict__)
        finally:
            ended(me, state)

    # This may run in the middle of an import, with modules being executed that are not counted. The outermost of them
    # ends when nobody holds its code any more.
    frame, code = sys._getframe(), None
    while frame is not None:
        if frame.f_code is exec_usually.__code__:
            code = frame.f_locals.get("code")
        frame = frame.f_back
    if code is not None:
        me = get_ident()
        state = threads[me] = [1, {}]
        _watched.append(ref(code, lambda _: ended(me, state)))

    # To everybody who looks at frames (tracebacks, warnings) these are importlib's own, and are left out like them.
    def as_importlib(function, like):
        code = function.__code__.replace(co_filename=like.__code__.co_filename)
        made = type(function)(code, external.__dict__, like.__name__, function.__defaults__, function.__closure__)
        made.__qualname__, made.__doc__ = like.__qualname__, like.__doc__
        return made

    FileFinder.find_spec = as_importlib(find_spec, find_usually)
    external._LoaderBasics.exec_module = as_importlib(exec_module, exec_usually)
    return True
