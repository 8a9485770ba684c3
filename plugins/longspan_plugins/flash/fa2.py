"""FlashAttention 2: the `flash-attn` package (Ampere and later)."""

from __future__ import annotations

from longspan.plugin import Kernel, Problem
from longspan_plugins.flash.library import Library
from longspan_plugins.flash.package import kernel_of

__all__ = ["LIBRARY"]


def _kernel(problem: Problem) -> Kernel:
    from flash_attn import flash_attn_interface as package

    return kernel_of(problem, package._flash_attn_forward, package._flash_attn_backward)


LIBRARY = Library("FlashAttention 2", "flash-attn", ("flash_attn", "flash_attn_2_cuda"), (8, 12), _kernel)
