"""Several short runs in this site for the price of one import: each in a fork that has discovered nothing yet.

usage: forks.py REPORT.json, with the runs as JSON on stdin: {name: {"cli": [...] or "code": "...", "env": {...}}}
"""

import json
import os
import sys
import tempfile
import traceback

import torch

import longspan
from longspan.tools.cli import main

torch.set_num_threads(1)
assert longspan.registry.discovery.registry.generation == 0, "a fork would inherit what was discovered"


def child(run, folder):
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_CREAT | os.O_WRONLY), number)
    os.environ.update(run.get("env", {}))
    code = 0
    try:
        main(run["cli"]) if "cli" in run else exec(run["code"], {"ls": longspan, "torch": torch})
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001 - shown, and judged by whoever reads the report
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{folder}/imported", "w") as file:
        json.dump(sorted(name for name in sys.modules if name.startswith("acme")), file)
    os._exit(code)


with tempfile.TemporaryDirectory() as top:
    children = {}
    for name, run in json.load(sys.stdin).items():  # all at once: most of them wait for a slow import
        os.mkdir(f"{top}/{name}")
        if not (pid := os.fork()):
            child(run, f"{top}/{name}")
        children[name] = pid
    found = {}
    for name, pid in children.items():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = {"imported": "[]"}  # not written by what was killed
        for part in os.listdir(f"{top}/{name}"):
            with open(f"{top}/{name}/{part}") as file:
                texts[part] = file.read()
        found[name] = {"code": code, **texts, "imported": json.loads(texts["imported"])}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
