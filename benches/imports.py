"""Starting Python and importing: warm, many at once, and as the first process after mounting."""

import subprocess
import time

from harness import Failed

AT_ONCE = 32


def libraries(ctx):
    """What is imported, with what the targets say of it warm."""
    return {"pandas": (1.20, 1.03)} | ({"torch": (1.12, 1.02)} if ctx.mode == "large" else {})


def rows(ctx, pair, passthrough=True):
    suffix = "" if passthrough else ", without passthrough"

    def limits(must, goal):
        return {"must": must, "goal": goal} if passthrough else {"goal": 1.10}

    def both(*arguments):
        return ctx.timed(pair.python, *arguments), ctx.timed(pair.venv_python, *arguments)

    yield from ctx.compare(
        f"`python -c pass`, warm{suffix}", *both("-c", "pass"), **limits(1.20, 1.05), runs=3 * ctx.runs
    )
    for library, warm in libraries(ctx).items():
        code = f"import {library}"
        ours, theirs = both("-c", code)
        yield from ctx.compare(f"`{code}`, warm{suffix}", ours, theirs, **limits(*warm))
    yield from ctx.compare(
        f"{AT_ONCE} processes at once, `import pandas`{suffix}",
        lambda: at_once(ctx, pair.python, "import pandas"), lambda: at_once(ctx, pair.venv_python, "import pandas"),
        **limits(1.25, 1.05), runs=min(3, ctx.runs),
    )
    for library in libraries(ctx):
        ours, theirs = both("-c", f"import {library}")
        yield from ctx.compare(
            f"`import {library}`, first process after mounting{suffix}",
            lambda ours=ours: (ctx.remount(), ours())[1], theirs, **limits(1.35, 1.15),
        )


def at_once(ctx, python, code):
    """Seconds until the last of many processes that start together has ended."""
    processes = []
    start = time.perf_counter()
    try:
        for _ in range(AT_ONCE):
            processes.append(subprocess.Popen([str(python), "-c", code], env=ctx.clean, cwd=ctx.dir,
                                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.kill()
            process.wait()
        raise
    took = time.perf_counter() - start
    if any(codes):
        raise Failed(f"{sum(map(bool, codes))} of {AT_ONCE} processes failed: {code}")
    return took
