"""What each system call says of a read-only tree, one line for each: its name, a tab, and what came of it.

Run on a mount and on a copy of it on a local disk, mounted read-only: what differs is a difference of the mount.
usage: probes.py TREE SCRATCH; files of SCRATCH, which is on neither file system, are written to.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import select
import stat
import struct
import subprocess
import sys

tree, scratch = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = -100, 0x1000, 0x400
told = []


def name(code):
    return errno.errorcode.get(code, str(code))


def call(function, *args):
    """The result of a function of the C library, or the error."""
    of_c = [os.fsencode(a) if isinstance(a, str) else a for a in args]
    function.restype = ctypes.c_long if function is libc.syscall else ctypes.c_int
    result = function(*[ctypes.c_long(a) if isinstance(a, int) else a for a in of_c])
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def probe(what, function, *args, **kwargs):
    try:
        result = function(*args, **kwargs)
    except OSError as error:
        result = name(error.errno)
    except (ValueError, BufferError) as error:
        result = type(error).__name__
    else:
        if isinstance(result, bytes):
            result = f"{len(result)} bytes {hashlib.sha256(result).hexdigest()[:8]}" if len(result) > 40 else result
        result = "done" if result is None else result
    told.append((what, str(result)))


def opened(path, flags=os.O_RDONLY, mode=0o600, **kwargs):
    fd = os.open(path, flags, mode, **kwargs)
    os.close(fd)


def with_fd(path, function, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    try:
        return function(fd)
    finally:
        os.close(fd)


def watch(path, mask=0xFFF):
    fd = call(libc.inotify_init1, os.O_CLOEXEC)
    try:
        return fd, call(libc.inotify_add_watch, fd, path, mask)
    except OSError:
        os.close(fd)
        raise


def watched():
    fd, _ = watch(small, 0x20 | 0x10 | 0x1)
    opened(small)
    seen = [event[1] for event in struct.iter_unpack("iIII", os.read(fd, 4096))]
    os.close(fd)
    return sorted(seen)


def by_handle(path):
    buffer = ctypes.create_string_buffer(struct.pack("i", 128), 136)
    call(libc.name_to_handle_at, AT_FDCWD, path, buffer, ctypes.byref(ctypes.c_int()), 0)
    fd = call(libc.open_by_handle_at, root, buffer, os.O_RDONLY)
    same = os.path.sameopenfile(fd, os.open(path, os.O_RDONLY))
    os.close(fd)
    return same


os.chdir(tree)
site = "lib/python3.11/site-packages"
small, big, empty = f"{site}/alpha/__init__.py", f"{site}/alpha/data/big.bin", f"{site}/alpha/empty.py"
script, folder, link = "bin/alpha", f"{site}/alpha", f"{site}/alpha/alias"
dangling, loop, dirlink, missing = f"{site}/links/dangling", f"{site}/links/loop", f"{site}/links/dir", f"{site}/missing"
long_name = "n" * 256
things = [("file", small), ("rendered file", "pyvenv.cfg"), ("large file", big), ("script", script), ("directory", folder), ("link", link),
          ("dangling link", dangling), ("loop", loop), ("link to a directory", dirlink), ("nothing", missing),
          ("the root", "."), ("below a file", f"{small}/x"), ("below nothing", f"{missing}/x"),
          ("below a loop", f"{loop}/x"), ("file and a slash", f"{small}/"), ("link to a directory and a slash", f"{dirlink}/"),
          ("long name", long_name), ("long name below nothing", f"{missing}/{long_name}"),
          ("long name below a file", f"{small}/{long_name}"), ("empty path", ""), ("long path", "x/" * 2048),
          ("long path of this", "./" * 2047 + "."), ("directory above", "lib/.."), ("this in a file", f"{small}/."),
          ("above in nothing", f"{missing}/..")]

# Opening.
flags = {"read": os.O_RDONLY, "write": os.O_WRONLY, "read and write": os.O_RDWR, "truncate": os.O_RDONLY | os.O_TRUNC,
         "write and truncate": os.O_WRONLY | os.O_TRUNC, "append": os.O_WRONLY | os.O_APPEND, "create": os.O_RDONLY | os.O_CREAT,
         "create and write": os.O_WRONLY | os.O_CREAT, "create anew": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
         "no link": os.O_NOFOLLOW, "directory": os.O_DIRECTORY, "path": os.O_PATH, "path of a link": os.O_PATH | os.O_NOFOLLOW,
         "temporary": os.O_TMPFILE | os.O_RDWR, "synchronous": os.O_SYNC, "without access time": os.O_NOATIME,
         "no waiting": os.O_NONBLOCK, "path and write": os.O_PATH | os.O_WRONLY, "both ways": 3}
for what, path in things:
    for how, flag in flags.items():
        probe(f"open {what}: {how}", opened, path, flag)
root = os.open(".", os.O_RDONLY)
file_fd = os.open(small, os.O_RDONLY)
probe("openat of a directory", opened, small, dir_fd=root)
probe("openat of a file", opened, "x", dir_fd=file_fd)
for how, resolve in {"no links": 4, "beneath": 8, "in root": 16, "no other mounts": 1}.items():
    for what, path in [("file", small), ("link", link), ("missing", "x"), ("absolute", "/etc/passwd")]:
        how_struct = struct.pack("QQQ", os.O_RDONLY | os.O_CLOEXEC, 0, resolve)
        probe(f"openat2 {how}: {what}", lambda: os.close(call(libc.syscall, 437, root, path, how_struct, 24)))

# Every call that changes something.
now = struct.pack("qqqq", 0, (1 << 30) - 1, 0, (1 << 30) - 1)
omit = struct.pack("qqqq", 0, (1 << 30) - 2, 0, (1 << 30) - 2)
for what, path in things:
    probe(f"mkdir {what}", os.mkdir, path)
    probe(f"rmdir {what}", os.rmdir, path)
    probe(f"unlink {what}", os.unlink, path)
    probe(f"mknod fifo {what}", os.mknod, path, 0o600 | stat.S_IFIFO)
    probe(f"mknod file {what}", os.mknod, path, 0o600 | stat.S_IFREG)
    probe(f"mknod device {what}", os.mknod, path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    probe(f"symlink {what}", os.symlink, "x", path)
    probe(f"link to {what}", os.link, small, path)
    probe(f"link of {what}", os.link, path, f"{site}/new")
    probe(f"link of what is behind {what}", call, libc.linkat, AT_FDCWD, path, AT_FDCWD, f"{site}/new", AT_SYMLINK_FOLLOW)
    probe(f"rename {what}", os.rename, path, f"{site}/new")
    probe(f"rename to {what}", os.rename, small, path)
    probe(f"rename directory to {what}", os.rename, folder, path)
    probe(f"rename {what} to itself", os.rename, path, path)
    for how, flag in {"no replace": 1, "exchange": 2, "whiteout": 4, "all": 7}.items():
        probe(f"renameat2 {how} {what}", call, libc.renameat2, AT_FDCWD, path, AT_FDCWD, f"{site}/new", flag)
        probe(f"renameat2 {how} {what} and a file", call, libc.renameat2, AT_FDCWD, path, AT_FDCWD, empty, flag)
    probe(f"rename {what} away", os.rename, path, f"{scratch}/away")
    probe(f"chmod {what}", os.chmod, path, 0o700)
    probe(f"chown {what}", os.chown, path, 1, 1)
    probe(f"lchown {what}", os.lchown, path, 1, 1)
    probe(f"chown of nothing {what}", os.chown, path, -1, -1)
    probe(f"utimensat {what}", os.utime, path, (1, 1))
    probe(f"utimensat now {what}", call, libc.utimensat, AT_FDCWD, path, now, 0)
    probe(f"utimensat omit {what}", call, libc.utimensat, AT_FDCWD, path, omit, 0)
    probe(f"utimensat no link {what}", os.utime, path, (1, 1), follow_symlinks=False)
    probe(f"truncate {what}", os.truncate, path, 0)
    probe(f"truncate to less than nothing {what}", call, libc.truncate, path, -1)
    for space in ["user", "trusted", "security", "system", "nowhere"]:
        probe(f"setxattr {space} {what}", os.setxattr, path, f"{space}.x", b"y")
        probe(f"removexattr {space} {what}", os.removexattr, path, f"{space}.x")
    probe(f"acl {what}", os.setxattr, path, "system.posix_acl_access", b"\2\0\0\0")
with open(f"{scratch}/other", "w") as other:
    other.write("x")
probe("link from elsewhere", os.link, f"{scratch}/other", f"{site}/new")
probe("rename from elsewhere", os.rename, f"{scratch}/other", f"{site}/new")
probe("unlinkat directory", call, libc.unlinkat, AT_FDCWD, folder, 0x200)
probe("rmdir of this", os.rmdir, f"{folder}/.")
probe("rmdir of what is above", os.rmdir, f"{folder}/data/..")
for what, path in [("file", small), ("large file", big), ("directory", folder)]:
    fd = os.open(path, os.O_RDONLY)
    probe(f"write {what}", os.write, fd, b"x")
    probe(f"pwrite {what}", os.pwrite, fd, b"x", 0)
    probe(f"ftruncate {what}", os.ftruncate, fd, 0)
    probe(f"fallocate {what}", call, libc.fallocate, fd, 0, 0, 10)
    probe(f"punch {what}", call, libc.fallocate, fd, 3, 0, 10)
    probe(f"posix_fallocate {what}", os.posix_fallocate, fd, 0, 10)
    probe(f"fchmod {what}", os.fchmod, fd, 0o700)
    probe(f"fchown {what}", os.fchown, fd, 1, 1)
    probe(f"futimens {what}", os.utime, fd, (1, 1))
    probe(f"fsetxattr {what}", os.setxattr, fd, "user.x", b"y")
    probe(f"fremovexattr {what}", os.removexattr, fd, "user.x")
    probe(f"fsync {what}", os.fsync, fd)
    probe(f"fdatasync {what}", os.fdatasync, fd)
    probe(f"syncfs {what}", call, libc.syncfs, fd)
    probe(f"sync_file_range {what}", call, libc.sync_file_range, fd, 0, 0, 0)
    probe(f"posix_fadvise {what}", os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_WILLNEED)
    probe(f"readahead {what}", call, libc.readahead, fd, 0, 4096)
    probe(f"linkat of a descriptor {what}", call, libc.linkat, fd, b"", AT_FDCWD, f"{site}/new", AT_EMPTY_PATH)
    probe(f"clone from {what}", lambda: with_fd(f"{scratch}/other", lambda to: fcntl.ioctl(to, 0x40049409, fd), os.O_RDWR))
    probe(f"clone to {what}", lambda: with_fd(f"{scratch}/other", lambda of: fcntl.ioctl(fd, 0x40049409, of)))
    probe(f"ioctl get flags {what}", lambda: bool(fcntl.ioctl(fd, 0x80086601, b"\0" * 8)))
    probe(f"ioctl set flags {what}", fcntl.ioctl, fd, 0x40086602, b"\0" * 8)
    probe(f"ioctl of a terminal {what}", os.isatty, fd)
    probe(f"ioctl bytes left {what}", lambda: struct.unpack("i", fcntl.ioctl(fd, 0x541B, b"\0" * 4))[0])
    probe(f"ioctl unknown {what}", fcntl.ioctl, fd, 0xABCD, b"\0" * 8)
    os.close(fd)

# Who may do what.
for what, path in things:
    for how, mode in {"F": os.F_OK, "R": os.R_OK, "W": os.W_OK, "X": os.X_OK, "RX": 5, "RW": 6}.items():
        probe(f"access {how} {what}", lambda: call(libc.faccessat, AT_FDCWD, path, mode, 0))
    probe(f"access of the link {what}", lambda: call(libc.syscall, 439, AT_FDCWD, path, os.R_OK, 0x100))
    probe(f"stat {what}", lambda: stat.filemode(os.stat(path).st_mode))
    probe(f"lstat {what}", lambda: stat.filemode(os.lstat(path).st_mode))
    probe(f"readlink {what}", os.readlink, path)
    probe(f"chdir {what}", lambda: with_fd(path, lambda fd: os.chdir(fd)) or os.chdir(tree))
    os.fchdir(root)
    probe(f"chdir by path {what}", os.chdir, path)
    os.fchdir(root)
    probe(f"listing {what}", lambda: sorted(os.listdir(path)))
    probe(f"statfs {what}", lambda: os.statvfs(path).f_namemax)
    probe(f"execute {what}", lambda: subprocess.run([f"./{path}"], capture_output=True).stdout)
    probe(f"getxattr {what}", os.getxattr, path, "user.missing")
    probe(f"getxattr of a list {what}", os.getxattr, path, "system.posix_acl_access")
    probe(f"handle {what}", lambda: call(libc.name_to_handle_at, AT_FDCWD, path, ctypes.create_string_buffer(b"\x80\0\0\0", 136),
                                         ctypes.byref(ctypes.c_int()), 0))
    probe(f"inotify {what}", lambda: os.close(watch(path)[0]))


probe("inotify tells of an open and a close", watched)

# What is told of a file.
for what, path in [("file", small), ("large file", big), ("script", script), ("empty file", empty), ("directory", folder), ("link", link), ("rendered file", "pyvenv.cfg")]:
    told_of = os.lstat(path)
    for field in ["st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_blksize"]:
        if field == "st_size" and what == "directory":
            continue
        probe(f"{field} {what}", getattr, told_of, field)
    probe(f"blocks for its bytes {what}", lambda: told_of.st_blocks * 512 >= told_of.st_size or what in ["link", "directory"])
    before = told_of.st_atime_ns
    if what != "link":
        with_fd(path, lambda fd: os.listdir(fd) if what == "directory" else os.read(fd, 10))
    probe(f"reading leaves the access time {what}", lambda: os.lstat(path).st_atime_ns == before)
    buffer = ctypes.create_string_buffer(256)
    call(libc.statx, AT_FDCWD, path, 0x100, 0xFFF, buffer)
    mask, _, attributes = struct.unpack_from("IIQ", buffer.raw)
    probe(f"statx has the basic fields {what}", lambda: mask & 0x7FF == 0x7FF)
    probe(f"statx has a time of birth {what}", lambda: bool(mask & 0x800))
    probe(f"statx attributes {what}", lambda: attributes & 0x34)
    probe(f"statx has a mount {what}", lambda: buffer.raw[144:152] != b"\0" * 8 or bool(mask & 0x1000) or True)
probe("statx of an unknown mask", call, libc.statx, AT_FDCWD, small, 0, 0x80000000, ctypes.create_string_buffer(256))
probe("read-only", lambda: bool(os.statvfs(".").f_flag & os.ST_RDONLY))
probe("read-only by descriptor", lambda: bool(os.fstatvfs(file_fd).f_flag & os.ST_RDONLY))
probe("names", lambda: os.statvfs(".").f_namemax)

# Directories.
libc.opendir.restype = libc.readdir.restype = libc.fdopendir.restype = ctypes.c_void_p


class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("length", ctypes.c_uint16), ("kind", ctypes.c_uint8),
                ("name", ctypes.c_char * 256)]


def all_of(dir):
    """What is still to be read: where each stands, its name and kind."""
    found = []
    while True:
        at = libc.telldir(ctypes.c_void_p(dir))
        entry = libc.readdir(ctypes.c_void_p(dir))
        if not entry:
            return found
        entry = ctypes.cast(entry, ctypes.POINTER(Dirent)).contents
        found.append((at, entry.name, entry.kind, entry.ino))


libc.telldir.restype = ctypes.c_long
for what, path in [("small", folder), ("large", f"{site}/many"), ("root", ".")]:
    dir = libc.opendir(os.fsencode(path))
    first = all_of(dir)
    probe(f"readdir {what}", lambda: hashlib.sha256(b"".join(sorted(n for _, n, _, _ in first))).hexdigest()[:8])
    probe(f"readdir meets each once {what}", lambda: len({n for _, n, _, _ in first}) == len(first))
    kinds = {4: stat.S_ISDIR, 8: stat.S_ISREG, 10: stat.S_ISLNK}
    probe(f"kinds {what}", lambda: all(kinds[k](os.lstat(os.path.join(path, os.fsdecode(n))).st_mode) for _, n, k, _ in first))
    ino = lambda n: os.lstat(os.path.join(path, os.fsdecode(n))).st_ino
    probe(f"inode numbers {what}", lambda: all(ino(n) == i for _, n, _, i in first if path != "." or n != b".."))
    libc.rewinddir(ctypes.c_void_p(dir))
    probe(f"rewinddir {what}", lambda: all_of(dir) == first)

    def seek(at):
        libc.seekdir(ctypes.c_void_p(dir), ctypes.c_long(first[at][0]))
        return [n for _, n, _, _ in all_of(dir)] == [n for _, n, _, _ in first[at:]]

    probe(f"seekdir {what}", lambda: all(seek(at) for at in range(0, len(first), max(1, len(first) // 20))))
    libc.closedir(ctypes.c_void_p(dir))
fd = os.open(folder, os.O_RDONLY)
probe("read of a directory", os.read, fd, 10)
probe("pread of a directory", os.pread, fd, 10, 0)
probe("getdents64 into too little", call, libc.syscall, 217, fd, ctypes.create_string_buffer(10), 10)
probe("getdents64 of a file", call, libc.syscall, 217, file_fd, ctypes.create_string_buffer(100), 100)
probe("mmap of a directory", lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ))
probe("lseek of a directory", lambda: os.lseek(fd, 0, os.SEEK_SET))
probe("listing by descriptor", lambda: sorted(os.listdir(fd)))
os.close(fd)

# Bytes.
for what, path in [("file", small), ("large file", big), ("empty file", empty), ("rendered file", "pyvenv.cfg")]:
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    probe(f"all of {what}", os.pread, fd, size + 10, 0)
    probe(f"read of nothing {what}", os.read, fd, 0)
    for where, at in [("the last byte", max(size - 1, 0)), ("the end", size), ("behind the end", size + 1), ("far behind", 1 << 40),
                      ("the last place", (1 << 63) - 1), ("before the beginning", -1)]:
        probe(f"pread at {where} {what}", os.pread, fd, 10, at)
    probe(f"preadv {what}", lambda: os.preadv(fd, [bytearray(3), bytearray(1000)], 5))
    for how, whence in [("set", os.SEEK_SET), ("end", os.SEEK_END), ("data", os.SEEK_DATA), ("hole", os.SEEK_HOLE), ("unknown", 9)]:
        for where, at in [("to the beginning", 0), ("to 5", 5), ("to its size", size), ("behind it", size + 1), ("before", -1)]:
            probe(f"lseek {how} {where} {what}", os.lseek, fd, at, whence)
    os.lseek(fd, 0, os.SEEK_SET)
    for how, kind in [("private", mmap.MAP_PRIVATE), ("shared", mmap.MAP_SHARED)]:
        for rights in [1, 3, 5, 7]:

            def mapped():
                with mmap.mmap(fd, max(size, 1), kind, rights) as part:
                    if rights & 2 and size:
                        part[0] = 7
                    return hashlib.sha256(part[:size]).hexdigest()[:8]

            probe(f"mmap {how} {rights} {what}", mapped)
    probe(f"unchanged {what}", os.pread, fd, size, 0)

    def advise():
        with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as part:
            part.madvise(mmap.MADV_WILLNEED)
            part.madvise(22)

    probe(f"madvise populate {what}", advise)

    def through_pipe(move):
        reader, writer = os.pipe()
        moved = move(writer)
        os.close(writer)
        read = os.read(reader, 65536)
        os.close(reader)
        return read if moved == len(read) else f"{moved} but {len(read)}"

    probe(f"splice {what}", through_pipe, lambda to: os.splice(fd, to, 5000, offset_src=0))
    probe(f"sendfile {what}", through_pipe, lambda to: os.sendfile(to, fd, 0, 5000))
    probe(f"splice into {what}", lambda: os.splice(os.pipe()[0], fd, 10))

    def copied():
        with open(f"{scratch}/copied", "w+b") as to:
            while os.copy_file_range(fd, to.fileno(), 1 << 20):
                pass
            return open(f"{scratch}/copied", "rb").read()

    os.lseek(fd, 0, os.SEEK_SET)
    probe(f"copy_file_range {what}", copied)
    probe(f"copy_file_range into {what}", lambda: with_fd(f"{scratch}/other", lambda of: os.copy_file_range(of, fd, 1)))
    probe(f"poll {what}", lambda: select.select([fd], [], [], 0)[0] == [fd])
    os.close(fd)


for what, path in [("file", small), ("large file", big), ("directory", folder)]:
    probe(f"by the handle {what}", lambda: by_handle(path))

# Locks.
for what, path in [("file", small), ("large file", big), ("rendered file", "pyvenv.cfg")]:
    one, two = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    probe(f"flock shared {what}", fcntl.flock, one, fcntl.LOCK_SH)
    probe(f"flock shared twice {what}", fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    probe(f"flock beside a shared one {what}", fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    probe(f"flock alone {what}", fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    probe(f"flock beside it {what}", fcntl.flock, one, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(two)
    probe(f"flock after it {what}", fcntl.flock, one, fcntl.LOCK_SH | fcntl.LOCK_NB)
    probe(f"lock to read {what}", fcntl.lockf, one, fcntl.LOCK_SH | fcntl.LOCK_NB)
    probe(f"lock to write {what}", fcntl.lockf, one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ask = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    child = f"import fcntl, sys; f = open(sys.argv[1], 'rb'); print(fcntl.fcntl(f, fcntl.F_GETLK, bytes.fromhex('{ask.hex()}'))[0])"
    probe(f"a lock that another process sees {what}", lambda: subprocess.run([sys.executable, "-c", child, path], capture_output=True).stdout)
    probe(f"lock of the open file {what}", fcntl.fcntl, one, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
    os.close(one)
    one = os.open(path, os.O_RDONLY)
    probe(f"lease to read {what}", fcntl.fcntl, one, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    probe(f"lease to write {what}", fcntl.fcntl, one, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    os.close(one)

for what, result in told:
    # Numbers of the tree and paths of this run are not what is compared.
    print(f"{what}\t{result}".replace(tree, "TREE").replace("\n", " "))
