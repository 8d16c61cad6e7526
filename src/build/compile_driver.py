"""Compiles Python files to bytecode that is the same on every machine.

stdin:  JSON lines {"src": path, "out": directory, "stem": base name, "name": co_filename, "mtime": int, "group": int}
stdout: JSON lines {"ok": n, "failed": [[name, error], ...]} per chunk, then {"done": true}
usage:  python -I -S -B compile_driver.py JOBS TOGETHER

What makes bytecode differ, and what is done against it (each seen by experiment):
- hash order of frozenset constants: PYTHONHASHSEED=0, which -I ignores, hence the second exec below
- which one-character strings are interned (marshal tells): all are interned before the first fork
- what was compiled before in the same process: a fresh child compiles TOGETHER files of one group (a wheel), in order of
  name, so that these are always the same ones; with 1, every file has a child of its own
- address-based hashes (Python <= 3.10): the caller turns address randomisation off
"""

import os
import sys

if sys.flags.hash_randomization or not sys.flags.no_site:
    for key in list(os.environ):
        if key.startswith("PYTHON"):
            del os.environ[key]
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, "-s", "-S", "-B"] + sys.argv)

here = os.path.dirname(os.path.abspath(sys.argv[0]))
sys.path[:] = [p for p in sys.path if p and os.path.abspath(p) != here]

import encodings.ascii, encodings.latin_1, encodings.utf_8
import gc, io, itertools, json, linecache, select, tokenize, traceback, warnings
from importlib._bootstrap_external import _code_to_timestamp_pyc

CHUNK = 64
TAG = sys.implementation.cache_tag
KEEP = [sys.intern(chr(i)) for i in range(256)] + [sys.intern("")]
warnings.simplefilter("ignore")


def pyc_path(job):
    return "%s/%s.%s.pyc" % (job["out"], job["stem"], TAG)


def compile_one(job):
    with open(job["src"], "rb") as source:
        data = source.read()
    code = compile(data, str(job["name"]), "exec", dont_inherit=True, optimize=0)
    pyc = bytes(_code_to_timestamp_pyc(code, job["mtime"] & 0xFFFFFFFF, len(data) & 0xFFFFFFFF))
    os.makedirs(job["out"], exist_ok=True)
    with open(pyc_path(job), "xb") as out:
        out.write(pyc)


def compile_in_child(jobs):
    """Returns [[name, error], ...] of those that did not compile, or None when the child died."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            failed = []
            for job in jobs:
                try:
                    compile_one(job)
                except BaseException as error:
                    failed.append([job["name"], ("%s: %s" % (type(error).__name__, error))[:2000]])
            with open(write, "wb") as pipe:
                pipe.write(json.dumps(failed).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return json.loads(answer.decode())
    return None


def run_chunk(chunk, write):
    failed = []
    for jobs in chunk:
        errors = compile_in_child(jobs)
        if errors is None:
            # One of them kills the compiler: each alone then, as always when these come together.
            errors = []
            for job in jobs:
                if os.path.exists(pyc_path(job)):
                    os.unlink(pyc_path(job))
                alone = compile_in_child([job])
                errors.extend([[job["name"], "the compiler died"]] if alone is None else alone)
        failed.extend(errors)
    total = sum(map(len, chunk))
    out = json.dumps({"ok": total - len(failed), "failed": failed}).encode() + b"\n"
    while out:
        out = out[os.write(write, out):]


def main():
    jobs = [json.loads(line) for line in sys.stdin.buffer if line.strip()]
    parallel, together = int(sys.argv[1]), int(sys.argv[2])
    jobs.sort(key=lambda job: (job["group"], job["name"]))
    runs = []
    for _, group in itertools.groupby(jobs, key=lambda job: job["group"]):
        group = list(group)
        runs.extend(group[i:i + together] for i in range(0, len(group), together))
    # A chunk is what is told of at once.
    size = max(1, CHUNK // together)
    chunks = [runs[i:i + size] for i in range(0, len(runs), size)]
    # The longest first, so that nobody waits for the last one alone.
    chunks.sort(key=lambda chunk: -sum(os.path.getsize(job["src"]) for jobs in chunk for job in jobs))
    # Whatever is imported on first use must be there before the first fork.
    compile("# -*- coding: latin-1 -*-\nx = 1\n".encode(), "<warm>", "exec", dont_inherit=True)
    try:
        compile(b"x =", "<warm>", "exec")
    except SyntaxError as error:
        str(error)
    json.loads(json.dumps({"ok": 0, "failed": [["x", "y"]]}))
    gc.collect()
    gc.freeze()
    running = {}
    while chunks or running:
        while chunks and len(running) < parallel:
            chunk = chunks.pop(0)
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(read)
                    for other in running:
                        os.close(other)
                    run_chunk(chunk, write)
                    code = 0
                finally:
                    os._exit(code)
            os.close(write)
            running[read] = (pid, chunk)
        for fd in select.select(list(running), [], [])[0]:
            pid, chunk = running.pop(fd)
            with open(fd, "rb") as pipe:
                answer = pipe.read()
            status = os.waitpid(pid, 0)[1]
            try:
                json.loads(answer.decode())
            except ValueError:
                error = "the compiler died with wait status %d" % status
                answer = json.dumps({"ok": 0, "failed": [[job["name"], error] for jobs in chunk for job in jobs]}).encode() + b"\n"
            sys.stdout.write(answer.decode())
            sys.stdout.flush()
    sys.stdout.write(json.dumps({"done": True}) + "\n")


main()
