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

from longspan import blockwise, compiled, containment
from longspan.arena import ArenaStats, BufferArena
from longspan.attention import attention
from longspan.block_builders import (
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
from longspan.block_csr import BlockCSR, HeadBlocks
from longspan.block_layout import BlockLayout
from longspan.block_mask import from_block_mask, layout_from, to_block_mask
from longspan.block_sparse import BlockSparse, per_head
from longspan.buffers import Allocator, Workspace
from longspan.cache import PatternCache
from longspan.cache_entry import CacheStats
from longspan.checkpoint import checkpoint
from longspan.defaults import buffer_arena, pattern_cache
from longspan.discovery import registry as _registry
from longspan.dropout import Dropout
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
from longspan.explain import explain
from longspan.folders import cache_folder
from longspan.hookspecs import hookimpl
from longspan.installing import install_line
from longspan.layout import Layout
from longspan.merge import merge_
from longspan.patterns import Dense, Dilated, Pattern, SlidingWindow, parse_pattern
from longspan.plan import Plan, plan
from longspan.policy import use
from longspan.spec import (
    BackendInfo,
    BufferSpec,
    Capabilities,
    Device,
    Kernel,
    Problem,
    Reason,
    Resolution,
    Verdict,
)
from longspan.topk_blocks import TopKBlocks
from longspan.topk_choice import BlockChoice
from longspan.topk_scoring import BlockScoring

if _TYPE_CHECKING:
    from longspan import testing

backends = _registry.backends
refresh = _registry.refresh
register = _registry.register
unregister = _registry.unregister

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """`longspan.testing`, imported when it is first used."""
    if name == "testing":
        return _import_module("longspan.testing")
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
    "parse_pattern",
    "pattern_cache",
    "per_head",
    "plan",
    "random_blocks",
    "refresh",
    "register",
    "strided_blocks",
    "testing",
    "to_block_mask",
    "unregister",
    "use",
]
