"""Runs the command line in terminals and pipes: an interpreter that has imported it once and forks for each command.

A line of JSON in, one out. In: `args`, `width` (of a terminal; 0: pipes), `environ`, `encoding`, `setup` (Python that
the child runs first), `interrupt` (text after which the child gets Ctrl-C), `leaves` (nobody reads its stdout). Out:
`out`, `err` (what came, as latin-1; a terminal's is all in `out`), `code`.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import signal
import struct
import sys
import termios
import traceback

import torch

from longspan.tools.cli import main


def child(task: dict, ends: tuple[int, int]) -> None:
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM"):
        os.environ.pop(name, None)
    os.environ |= {"TERM": "xterm-256color", **task.get("environ", {})}
    encoding = task.get("encoding", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = io.TextIOWrapper(open(number, "wb", 0, closefd=False), encoding, write_through=True)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    code = 99
    try:
        exec(task.get("setup", ""), {})
        main(task["args"])
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def run(task: dict) -> dict:
    if width := task["width"]:
        mine, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        reading, writing = {mine: "out"}, (theirs, theirs)
    else:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        reading, writing = {out: "out", err: "err"}, (out_end, err_end)
    process = os.fork()
    if not process:
        os.setsid()
        for end in reading:
            os.close(end)
        child(task, writing)
    for end in set(writing):
        os.close(end)
    if task.get("leaves"):
        os.close(out)
        del reading[out]
    found = {"out": b"", "err": b""}
    wanted = task.get("interrupt", "").encode()
    while reading:
        for end in select.select(list(reading), [], [])[0]:
            try:
                data = os.read(end, 65536)
            except OSError:  # a terminal whose other side is closed
                data = b""
            found[reading[end]] += data
            if not data:
                del reading[end]
                os.close(end)
        if wanted and wanted in found["out"]:
            os.kill(process, signal.SIGINT)
            wanted = b""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {**{name: data.decode("latin-1") for name, data in found.items()}, "code": code}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
