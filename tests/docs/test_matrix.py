"""The support matrix and the hooks: what is documented is what is there."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import longspan
from longspan.registry import hookspecs
from longspan.tools.cli.matrix import render_matrix

ROOT = Path(__file__).resolve().parents[2]
HOOKS = [name for name in vars(hookspecs) if name.startswith("longspan_")]


def test_the_support_matrix_is_fresh():
    rows = [row for row in longspan.backends() if row.distribution == "longspan"]
    if lacking := [f"{row.name} lacks {lack}" for row in rows for lack in row.lacks]:
        pytest.skip(f"made where nothing is lacking; here {'; '.join(lacking)}")
    written = (ROOT / "docs" / "support_matrix.md").read_text(encoding="utf-8")
    assert written == render_matrix(rows), "stale. Next: longspan matrix --output docs/support_matrix.md"


def test_every_built_in_backend_is_in_the_matrix():
    rows = [row for row in longspan.backends() if row.distribution == "longspan"]
    assert len(rows) >= 8
    assert all(row.state == "loaded" for row in rows), [row.error for row in rows]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_signature(hook):
    signature = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"`{hook}({signature})`" in (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_tested(hook):
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(f"def {hook}(" in test.read_text(encoding="utf-8") for test in tests)
