
# Appended by envfabric: paths of the build follow the interpreter to where it is now.
def _relocate(v=build_time_vars, old=@OLD@, roots=@ROOTS@, bare=("prefix", "exec_prefix")):
    import os, re, sys
    new = os.path.normpath(sys.base_prefix)
    if new == old:
        return
    rx = re.compile(re.escape(old) + ("(?:" + "|".join(roots) + ")" if roots else "") + r"(?![\w.+-])")
    for k, s in list(v.items()):
        if isinstance(s, str):
            v[k] = new if k in bare and s == old else rx.sub(lambda m: new + m.group(0)[len(old):], s)


_relocate()
del _relocate
