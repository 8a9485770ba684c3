"""Threads, a fork and a spawned process beside broken packages; a third party's backend runs in each.

usage: processes.py REPORT.json
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

import longspan as ls
from longspan.testing import oracle

torch.set_num_threads(1)
X = torch.arange(1 * 2 * 9 * 4, dtype=torch.float64).reshape(1, 2, 9, 4).sin()
PATTERNS = (ls.Dense(), ls.Dilated((4, 9), (1, 2)), ls.SlidingWindow(2, 1), ls.SlidingWindow(3, 0))


def in_threads(count=16):
    """All plan at once, before anything was discovered: half of them by name, with all patterns."""
    go = threading.Barrier(count)

    def work(number):
        pattern = PATTERNS[number // 2 % len(PATTERNS)]
        go.wait(60)
        made = ls.plan(ls.Problem.like(X, X, X, pattern), backend="good" if number % 2 else None)
        out, _ = made(X, X, X)
        rows = [(row.name, row.distribution, row.state) for row in ls.backends()]
        want = oracle(X, X, X, pattern)
        return made.backend, (out - want).abs().max().item(), rows

    with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(count) as pool:
        warnings.simplefilter("always")
        done = list(pool.map(work, range(count)))
    texts = [str(one.message) for one in said if issubclass(one.category, ls.PluginWarning)]
    return {
        "named": [backend for backend, _, _ in done[1::2]],
        "auto": [backend for backend, _, _ in done[::2]],
        "errors": [error for _, error, _ in done],
        "ledgers": len({tuple(rows) for _, _, rows in done}),
        "warnings": texts,
    }


def run_here(made):
    """In another process: a plan that came from elsewhere, and one of our own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    mine = ls.attention(X, X, X, PATTERNS[1], backend="good")
    theirs, _ = made(X, X, X)
    auto = ls.attention(X, X, X, PATTERNS[1])
    good = torch.equal(mine, theirs) and torch.allclose(mine, auto, atol=1e-12)
    return good, made.backend, sorted(row.name for row in ls.backends())


def in_a_fork(made):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # what hangs would hang for ever
        good, backend, _ = run_here(made)
        os._exit(0 if good and backend == "good" else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    found = {"threads": in_threads()}
    made = ls.plan(ls.Problem.like(X, X, X, PATTERNS[1]), backend="good")
    found["fork"] = in_a_fork(made)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found["spawn"] = pool.apply_async(run_here, (made,)).get(120)
    found["names"] = sorted(row.name for row in ls.backends())
    found["cuda"] = torch.cuda.is_initialized()
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
