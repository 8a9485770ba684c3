"""What the author of a backend imports: the mark of a hook, the values that hooks take and return, what kernels share.

Every name is public and stays. What only a user needs is in `longspan`, what tests a backend in `longspan.testing`.
"""

from longspan.errors import ArgumentError, LongspanError, PluginError, PluginWarning
from longspan.lowering.blocks import BlockLayout
from longspan.lowering.layout import Call, Heads, Layout, Rows
from longspan.memory import compiled
from longspan.memory.cache import LayoutStore
from longspan.memory.folders import cache_folder
from longspan.memory.workspace import Allocator, Workspace
from longspan.numerics import blockwise, nonfinite
from longspan.numerics.dropout import Dropout
from longspan.numerics.merge import merge_
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.dilated import Dilated
from longspan.patterns.topk.pattern import TopKBlocks
from longspan.patterns.window import SlidingWindow
from longspan.planning.verification import Verification
from longspan.registry.hookspecs import hookimpl
from longspan.spec.backend import BufferSpec, Capabilities, Kernel, Reason
from longspan.spec.device import Device
from longspan.spec.installing import install_line
from longspan.spec.pattern import Dense, Pattern
from longspan.spec.problem import Problem

__all__ = [
    # hooks, and what they take and return
    "hookimpl",
    "Problem",
    "Device",
    "Capabilities",
    "Reason",
    "Kernel",
    "BufferSpec",
    "Workspace",
    "Allocator",
    "LayoutStore",
    "Layout",
    "Call",
    "Heads",
    "Rows",
    "BlockLayout",
    # patterns
    "Pattern",
    "Dense",
    "Dilated",
    "SlidingWindow",
    "BlockSparse",
    "BlockCSR",
    "HeadBlocks",
    "TopKBlocks",
    # what kernels share
    "Dropout",
    "blockwise",
    "merge_",
    "nonfinite",
    "compiled",
    "cache_folder",
    "install_line",
    # errors, and what `Plan.verify` returns
    "ArgumentError",
    "LongspanError",
    "PluginError",
    "PluginWarning",
    "Verification",
]
