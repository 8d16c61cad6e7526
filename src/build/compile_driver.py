"""Compiles Python files to bytecode that is the same on every machine.

stdin:  JSON lines {"src": path, "out": directory, "stem": base name, "name": co_filename, "mtime": int}
stdout: JSON lines {"ok": n, "failed": [[name, error], ...]} per chunk, then {"done": true}
usage:  python -I -S -B compile_driver.py JOBS

What makes bytecode differ, and what is done against it (each seen by experiment):
- hash order of frozenset constants: PYTHONHASHSEED=0, which -I ignores, hence the second exec below
- which one-character strings are interned (marshal tells): all are interned before the first fork
- what was compiled before in the same process: every file is compiled in a child of its own
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
import gc, io, json, linecache, select, tokenize, traceback, warnings
from importlib._bootstrap_external import _code_to_timestamp_pyc

CHUNK = 64
TAG = sys.implementation.cache_tag
KEEP = [sys.intern(chr(i)) for i in range(256)] + [sys.intern("")]
warnings.simplefilter("ignore")


def compile_one(job):
    with open(job["src"], "rb") as source:
        data = source.read()
    code = compile(data, str(job["name"]), "exec", dont_inherit=True, optimize=0)
    pyc = bytes(_code_to_timestamp_pyc(code, job["mtime"] & 0xFFFFFFFF, len(data) & 0xFFFFFFFF))
    os.makedirs(job["out"], exist_ok=True)
    with open("%s/%s.%s.pyc" % (job["out"], job["stem"], TAG), "xb") as out:
        out.write(pyc)


def compile_in_child(job):
    """Returns None, or what went wrong."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            try:
                compile_one(job)
                code = 0
            except BaseException as error:
                text = "%s: %s" % (type(error).__name__, error)
                os.write(write, text.encode("utf-8", "replace")[:4000])
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return None
    return text.decode("utf-8", "replace") or "the compiler died with wait status %d" % status


def run_chunk(chunk, write):
    failed = []
    for job in chunk:
        error = compile_in_child(job)
        if error is not None:
            failed.append([job["name"], error])
    out = json.dumps({"ok": len(chunk) - len(failed), "failed": failed}).encode() + b"\n"
    while out:
        out = out[os.write(write, out):]


def main():
    jobs = [json.loads(line) for line in sys.stdin.buffer if line.strip()]
    jobs.sort(key=lambda job: job["name"])
    chunks = [jobs[i:i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    parallel = int(sys.argv[1])
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
                answer = json.dumps({"ok": 0, "failed": [[job["name"], error] for job in chunk]}).encode() + b"\n"
            sys.stdout.write(answer.decode())
            sys.stdout.flush()
    sys.stdout.write(json.dumps({"done": True}) + "\n")


main()
