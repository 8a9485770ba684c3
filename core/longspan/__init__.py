"""longspan: a registry of interchangeable attention backends for long sequences.

Say what to compute (a pattern), and longspan picks who computes it, says why, and gives the same answer and the same
gradients everywhere. `import longspan` imports no backend and initialises no CUDA.
"""

import warnings as _warnings
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

with _warnings.catch_warnings():  # torch says so on import where NumPy is missing; longspan does without
    _warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from longspan.errors import (
    ArgumentError,
    BackendUnavailable,
    DuplicateBackend,
    LongspanError,
    PluginError,
    PluginWarning,
    PolicyError,
    UnknownBackend,
)
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.layout import Layout
from longspan.memory.arena import ArenaStats, BufferArena, buffer_arena
from longspan.memory.cache import PatternCache, pattern_cache
from longspan.memory.cached_layout import CacheStats
from longspan.memory.folders import cache_folder
from longspan.memory.workspace import Allocator, Workspace
from longspan.numerics import blockwise
from longspan.numerics.dropout import Dropout
from longspan.numerics.merge import merge_
from longspan.patterns.blocks.builders import (
    bigbird,
    dilated_blocks,
    global_blocks,
    global_tokens,
    hierarchical_blocks,
    local_blocks,
    longformer,
    random_blocks,
    strided_blocks,
)
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.sparse import BlockSparse, per_head
from longspan.patterns.dilated import Dilated
from longspan.patterns.text import parse_pattern
from longspan.patterns.topk.choice import BlockChoice
from longspan.patterns.topk.pattern import TopKBlocks
from longspan.patterns.topk.scoring import BlockScoring
from longspan.patterns.window import SlidingWindow
from longspan.planning.attention import attention
from longspan.planning.checkpoint import checkpoint
from longspan.planning.plan import Plan, plan
from longspan.registry.discovery import registry as _registry
from longspan.registry.explain import explain
from longspan.registry.hookspecs import hookimpl
from longspan.registry.policy import use
from longspan.spec.backend import BackendInfo, BufferSpec, Capabilities, Kernel, Reason
from longspan.spec.device import Device
from longspan.spec.installing import install_line
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem
from longspan.spec.resolution import Resolution, Verdict

if _TYPE_CHECKING:
    from longspan import plugin, testing
    from longspan.memory import compiled
    from longspan.numerics import nonfinite
    from longspan.numerics import nonfinite as containment
    from longspan.patterns.blocks.flex import from_block_mask, layout_from, to_block_mask

backends = _registry.backends
refresh = _registry.refresh
register = _registry.register
unregister = _registry.unregister

__version__ = "0.1.0"


_LATER = {
    "compiled": "longspan.memory.compiled",
    "containment": "longspan.numerics.nonfinite",  # as it was called before
    "from_block_mask": "longspan.patterns.blocks.flex:from_block_mask",
    "layout_from": "longspan.patterns.blocks.flex:layout_from",
    "nonfinite": "longspan.numerics.nonfinite",
    "plugin": "longspan.plugin",
    "testing": "longspan.testing",
    "to_block_mask": "longspan.patterns.blocks.flex:to_block_mask",
}
"""Modules, and functions in them, that few programs need: imported when they are first used."""


def __getattr__(name: str) -> _Any:
    """What is imported when it is first used."""
    if name in _LATER:
        module, _, function = _LATER[name].partition(":")
        found = globals()[name] = getattr(_import_module(module), function) if function else _import_module(module)
        return found
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names: what `dir(longspan)` and a prompt's completion show."""
    return sorted([*__all__, "__version__"])


__all__ = [
    "Allocator",
    "ArenaStats",
    "ArgumentError",
    "BackendInfo",
    "BackendUnavailable",
    "BlockCSR",
    "BlockChoice",
    "BlockLayout",
    "BlockScoring",
    "BlockSparse",
    "BufferArena",
    "BufferSpec",
    "CacheStats",
    "Capabilities",
    "Dense",
    "Device",
    "Dilated",
    "Dropout",
    "DuplicateBackend",
    "HeadBlocks",
    "Kernel",
    "Layout",
    "LongspanError",
    "Pattern",
    "PatternCache",
    "Plan",
    "PluginError",
    "PluginWarning",
    "PolicyError",
    "Problem",
    "Reason",
    "Resolution",
    "SlidingWindow",
    "TopKBlocks",
    "UnknownBackend",
    "Verdict",
    "Workspace",
    "attention",
    "backends",
    "bigbird",
    "blockwise",
    "containment",
    "buffer_arena",
    "cache_folder",
    "checkpoint",
    "compiled",
    "dilated_blocks",
    "explain",
    "from_block_mask",
    "global_blocks",
    "global_tokens",
    "hierarchical_blocks",
    "hookimpl",
    "install_line",
    "layout_from",
    "local_blocks",
    "longformer",
    "merge_",
    "nonfinite",
    "parse_pattern",
    "pattern_cache",
    "per_head",
    "plan",
    "plugin",
    "random_blocks",
    "refresh",
    "register",
    "strided_blocks",
    "testing",
    "to_block_mask",
    "unregister",
    "use",
]
