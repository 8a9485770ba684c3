"""What holds for every test: files that longspan keeps go to a folder of the run, and never to the user's own.

`--longspan-backend NAME` reruns these tests on one backend; the tests of choosing a backend then have no say.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["longspan.testing.pytest_plugin"]

COMPUTING = {
    "test_attention_exact.py",
    "test_backends.py",
    "test_checkpoint.py",
    "test_dropout.py",
    "test_no_leak.py",
}
"""The files whose subject is what attention computes. The others choose backends themselves, or need none."""


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is collected, as modules of tests list backends when they are imported."""
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
