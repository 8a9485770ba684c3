"""FlashAttention 3: the `flash_attn_3` package (Hopper)."""

from __future__ import annotations

from longspan.plugin import Kernel, Problem
from longspan_plugins.flash.library import Library
from longspan_plugins.flash.package import kernel_of

__all__ = ["LIBRARY"]


def _kernel(problem: Problem) -> Kernel:
    import flash_attn_interface as package

    return kernel_of(problem, package._flash_attn_forward, package._flash_attn_backward)


LIBRARY = Library("FlashAttention 3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3"), (9, 9), _kernel)
