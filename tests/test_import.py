"""`import longspan` costs little beyond `import torch`: what only some programs need is imported when they need it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from longspan.planning.operators import serve_dtensors

PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import longspan
longspan.Problem(batch=1, heads=1, q_len=1, head_dim=1)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def brought():
    """The modules that `import longspan` brings beyond those of `import torch`."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_import_leaves_the_compiler_out(brought):
    """`torch._dynamo` takes longer to import than torch itself."""
    assert "longspan.registry.policy" in brought
    assert [name for name in brought if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))] == []


def test_the_import_leaves_distributed_tensors_out(brought):
    assert [name for name in brought if name.startswith("torch.distributed.tensor")] == []


def test_distributed_tensors_are_served_by_a_function_that_a_tracer_runs():
    """The mark is set by hand, as torch's own function imports the compiler: it has to stay the same mark."""

    @torch.compiler.assume_constant_result
    def marked():
        return ""

    assert vars(marked).items() <= vars(serve_dtensors).items()
    assert vars(marked), "torch marks the function itself"


def test_the_import_leaves_the_command_line_and_the_tests_tools_out(brought):
    heavy = {"typer", "rich", "pytest", "hypothesis", "longspan.tools.cli", "longspan_plugins"}
    assert heavy & set(brought) == set()
