"""The house: few packages, on few floors, whose imports all run down; and one door each for users and for backends."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import longspan
from longspan import plugin
from longspan.registry import hookspecs

ROOT = Path(longspan.__file__).parent
FACADE = ("__init__.py", "__main__.py")
"""What stands before the house, and imports from everywhere."""


def imported(path, module):
    """The modules, and the names in them, that a file imports: `longspan.spec.device.Device`, say."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, node.module or ""]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def graph():
    """For each entry of the root, those that its modules import, wherever in a module that stands."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] + ".py" in FACADE:
            continue
        below = found.setdefault(parts[0], set())
        for name in imported(path, ".".join(["longspan", *parts])):
            first, _, rest = name.partition(".")
            if first == "longspan":
                below.add(rest.partition(".")[0])
    entries = set(found)
    return {entry: (below & entries) - {entry} for entry, below in found.items()}, found


def floors(entries):
    """The floor of each entry, one above the highest of those that it imports."""
    floor = {}
    for entry in TopologicalSorter(entries).static_order():
        floor[entry] = 1 + max((floor[below] for below in entries[entry]), default=0)
    return floor


def test_the_root_holds_at_most_twelve_entries():
    entries = sorted(path.name for path in ROOT.iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__")
    assert len([entry for entry in entries if entry not in FACADE]) <= 12, entries


def test_imports_run_down_at_most_eight_floors():
    entries, _ = graph()
    assert "execution" in entries["planning"] and "errors" in entries["spec"], "imports are read at all"
    floor = floors(entries)
    assert max(floor.values()) <= 8, floor
    assert floor["errors"] == 1 and floor["tools"] == max(floor.values())


def test_a_cycle_would_be_found():
    with pytest.raises(CycleError):
        floors({"spec": {"memory"}, "memory": {"patterns"}, "patterns": {"spec"}})


def test_only_tools_come_in_by_the_front_door():
    """`from longspan import Problem`: below the tools, it would be a circle."""
    _, found = graph()
    assert sorted(entry for entry, below in found.items() if below & set(longspan.__all__) - set(found)) == ["tools"]


def test_what_hooks_take_and_return_is_in_the_plugins_door():
    hooks = [hook for name, hook in vars(hookspecs).items() if name.startswith("longspan_")]
    words = {
        word for hook in hooks for text in inspect.getfullargspec(hook).annotations.values() for word in names(text)
    }
    assert {"Problem", "LayoutStore", "Workspace", "Kernel"} <= words
    assert words - {"Any", "Callable", "Iterable", "None"} <= set(plugin.__all__)


def names(annotation):
    return re.findall(r"[A-Za-z_]+", annotation if isinstance(annotation, str) else "")


def test_both_doors_lead_to_the_same_things():
    assert set(plugin.__all__) <= set(vars(plugin)) and len(set(plugin.__all__)) == len(plugin.__all__)
    shared = set(plugin.__all__) & set(longspan.__all__)
    assert len(shared) > 20
    assert all(getattr(plugin, name) is getattr(longspan, name) for name in shared)
