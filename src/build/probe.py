"""Tells what a Python installation is, as one JSON object. Arguments: "brief", or "full" to try every extension module."""

import importlib.util
import json
import os
import platform
import sys
import sysconfig

version = "%d.%d.%d" % sys.version_info[:3]
if sys.version_info.releaselevel != "final":
    version += {"alpha": "a", "beta": "b", "candidate": "rc"}[sys.version_info.releaselevel]
    version += str(sys.version_info.serial)
out = {
    "implementation": sys.implementation.name,
    "version": version,
    "prefix": sys.prefix,
    "base_prefix": sys.base_prefix,
    "base_executable": getattr(sys, "_base_executable", sys.executable),
    "soabi": sysconfig.get_config_var("SOABI"),
    "sys_platform": sys.platform,
}
if sys.argv[1] == "full":
    info = sys.implementation.version
    implementation_version = "%d.%d.%d" % info[:3]
    if info.releaselevel != "final":
        implementation_version += info.releaselevel[0] + str(info.serial)
    out.update(
        exec_prefix=sys.exec_prefix,
        executable=sys.executable,
        magic=importlib.util.MAGIC_NUMBER.hex(),
        platlibdir=getattr(sys, "platlibdir", "lib"),
        stdlib=sysconfig.get_path("stdlib"),
        include=sysconfig.get_path("include"),
        platinclude=sysconfig.get_config_var("INCLUDEPY"),
        multiarch=sysconfig.get_config_var("MULTIARCH"),
        pyconfig=sysconfig.get_config_h_filename(),
        wheel_pkg_dir=sysconfig.get_config_var("WHEEL_PKG_DIR"),
        libdir=sysconfig.get_config_var("LIBDIR"),
        soname=sysconfig.get_config_var("INSTSONAME") if sysconfig.get_config_var("Py_ENABLE_SHARED") else None,
        sysconfigdata=sysconfig._get_sysconfigdata_name(),
        libc=list(platform.libc_ver()),
        markers=dict(
            implementation_name=sys.implementation.name,
            implementation_version=implementation_version,
            os_name=os.name,
            platform_machine=platform.machine(),
            platform_python_implementation=platform.python_implementation(),
            platform_release=platform.release(),
            platform_system=platform.system(),
            platform_version=platform.version(),
            python_full_version=platform.python_version(),
            python_version=".".join(platform.python_version_tuple()[:2]),
            sys_platform=sys.platform,
        ),
    )
    failed = {}
    for directory in [p for p in sys.path if p.endswith("lib-dynload")]:
        for name in sorted(os.listdir(directory)):
            module = name.split(".", 1)[0]
            # Test helpers are no part of what a program can ask for, and some abort on import.
            if not name.endswith(".so") or module.startswith(("_test", "_xx", "xx", "_ctypes_test")):
                continue
            try:
                __import__(module)
            except BaseException as error:
                failed[module] = "%s: %s" % (type(error).__name__, error)
    for module in ("ssl", "sqlite3", "ctypes", "zlib", "bz2", "lzma", "hashlib", "socket", "readline", "curses"):
        try:
            __import__(module)
        except BaseException as error:
            failed.setdefault(module, "%s: %s" % (type(error).__name__, error))
    mapped = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            parts = line.rstrip("\n").split(None, 5)
            if len(parts) == 6 and parts[5].startswith("/"):
                mapped.add(parts[5])
    out.update(failed=failed, mapped=sorted(mapped))
print(json.dumps(out))
