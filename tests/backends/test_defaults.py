"""torch's default dtype and default device decide nothing: every allocation says what it wants, and where."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from defaults import DEFAULTS, PATTERNS, check
from torch.utils._device import _device_constructors

import longspan
import longspan_plugins

SOURCES = [Path(package.__file__).parent for package in (longspan, longspan_plugins)]
FACTORIES = {function.__name__ for function in _device_constructors()} | {"from_numpy", "frombuffer", "from_file"}
SAME_MEMORY = {"frombuffer"}
"""What takes no device, as it allocates nothing."""


def unnamed(source: str) -> list[int]:
    """The lines on which torch makes a tensor of a dtype or on a device that is not named there."""
    tree = ast.parse(source)
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            wanted = {"dtype"} if node.func.attr in SAME_MEMORY else {"dtype", "device"}
            if wanted <= {keyword.arg for keyword in node.keywords}:
                named.add(node.func)
    found = []
    for node in ast.walk(tree):
        is_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        if is_torch and node.attr in FACTORIES and node not in named:
            found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [node.lineno for alias in node.names if alias.name in FACTORIES]
    return found


def test_every_allocation_names_its_dtype_and_its_device():
    files = [path for folder in SOURCES for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path}:{line}" for path in files for line in unnamed(path.read_text())]
    assert not found, "pass dtype= and device= there:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(3)",
        "torch.zeros(2, dtype=torch.int64)",
        "torch.arange(4, device=x.device)",
        "torch.tensor([1, 2])",
        "torch.frombuffer(b'')",
        "(torch.empty if covered else torch.zeros)(3, dtype=x.dtype, device=x.device)",
        "make = torch.ones",
        "from torch import full",
    ],
)
def test_the_rule_finds_what_is_not_named(source):
    assert unnamed(source)
    assert not unnamed("torch.empty(3, dtype=x.dtype, device=x.device), x.new_empty(3), torch.zeros_like(x)")


BACKENDS = [
    *("cpu_fused", "cpu_fused float16", "sdpa", "sdpa float16", "reference", "block_sparse_batched", "torch_sparse"),
    "flex",
]
ALL = len(PATTERNS)
SERVED = {"torch_sparse": ALL - 1, "block_sparse_batched": ALL - 1, "flex": 2}
"""Those that draw no dropout serve all but that."""


@pytest.mark.parametrize(("dtype", "device"), DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_change_no_bit(backend, dtype, device):
    assert check(backend, dtype, device) == SERVED.get(backend, ALL)


@pytest.mark.parametrize("compiler", [None, "/bin/false"], ids=["native", "composed"])
def test_a_process_that_begins_under_other_defaults_computes_the_same(compiler, tmp_path):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if compiler:
        environ.update(CC=compiler, LONGSPAN_CACHE=str(tmp_path))
    program = [sys.executable, str(Path(__file__).parent / "defaults.py"), "cpu_fused"]
    done = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_default_device_takes_the_tensors_of_whoever_names_none():
    """What the tests above rest on."""
    with torch.device("meta"):
        assert torch.empty(1).is_meta and torch.arange(3).is_meta
