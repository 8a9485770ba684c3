"""FlashAttention 4: the CuTe DSL kernels of `flash-attn-4` (Hopper and Blackwell)."""

from __future__ import annotations

from longspan.plugin import Kernel, Problem
from longspan_plugins.flash.library import Library
from longspan_plugins.flash.package import kernel_of

__all__ = ["LIBRARY"]


def _kernel(problem: Problem) -> Kernel:
    from flash_attn.cute import interface as package

    return kernel_of(problem, package._flash_attn_fwd, package._flash_attn_bwd, gradients_returned=True)


LIBRARY = Library("FlashAttention 4", "flash-attn-4", ("flash_attn.cute",), (9, 10), _kernel)
