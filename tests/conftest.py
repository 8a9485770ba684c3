"""What holds for every test: files that longspan keeps go to a folder of the run, and never to the user's own.

Under `-n` (pytest-xdist) the processes share that folder, so that the C library is compiled once, and the cores.
`--longspan-backend NAME` reruns these tests on one backend; the tests of choosing a backend then have no say.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

import longspan as ls

pytest_plugins = ["longspan.testing.pytest_plugin", "starts"]

COMPUTING = {
    "test_attention_exact.py",
    "test_backends.py",
    "test_checkpoint.py",
    "test_dropout.py",
    "test_no_leak.py",
}
"""The files whose subject is what attention computes. The others choose backends themselves, or need none."""

MANY_THREADS = {"conformance", "docs", "sanitizers", "thirdparty"}
"""The folders whose tests take as many threads as torch does."""


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected, as modules of tests list backends when they are imported."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # the folder is that of the process above
        share = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(share)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))  # for the processes that tests start
        return
    cache, patch = tempfile.TemporaryDirectory(prefix="longspan-tests-"), pytest.MonkeyPatch()
    patch.setenv("LONGSPAN_CACHE", cache.name)
    config.add_cleanup(cache.cleanup)
    config.add_cleanup(patch.undo)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--longspan-backend") is None:
        return
    kept = [item for item in items if Path(item.path).name in COMPUTING]
    config.hook.pytest_deselected(items=[item for item in items if Path(item.path).name not in COMPUTING])
    items[:] = kept


def pytest_collection_finish() -> None:
    """Tens of thousands of test cases are no garbage: every `gc.collect()` of a test would look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def one_thread(request):
    """Thousands of small tensors: on a busy machine, threads that wait for one another cost minutes."""
    if request.path.parent.name in MANY_THREADS:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def register():
    """`ls.register(plugin, name)` that returns the name, undone at the end."""
    names = []

    def add(plugin, name):
        ls.register(plugin, name=name)
        names.append(name)
        return name

    yield add
    for name in reversed(names):
        ls.unregister(name)


@pytest.fixture
def give_away(monkeypatch):
    """`give_away(path)`: it belongs to another user from then on, or seems to where that takes root."""

    def give(path):
        try:
            os.chown(path, 4242, -1)
        except PermissionError:
            another = os.geteuid() + 1
            monkeypatch.setattr(os, "geteuid", lambda: another)

    return give
