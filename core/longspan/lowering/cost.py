"""What a block-sparse layout costs as blocks and as dense attention under a mask, as far as a device's costs are known.

Short query tiles starve a kernel: its time for a pair grows with `1 / height`. The numbers are fitted to the `sdpa`
backend on two AVX-512 cores (`longspan bench block-sparse --parts tiles`, raw in docs/benchmarks), in times of dense
attention. On other devices short tiles run side by side, and blocks are always taken.
"""

from __future__ import annotations

from attrs import frozen

from longspan.lowering.blocks import BlockLayout
from longspan.lowering.masked import masked_pairs
from longspan.spec.backend import Capabilities
from longspan.spec.problem import Problem

__all__ = ["Costs", "model"]


@frozen
class Costs:
    """Modelled times, in those of dense attention: of the blocks, and of dense attention under a mask."""

    blocks: float
    masked: float

    @property
    def is_masked(self) -> bool:
        """Whether the mask is cheaper."""
        return self.masked < self.blocks

    def __str__(self) -> str:
        return f"{self.blocks:.2f} of dense attention's time as blocks, {self.masked:.2f} under a mask"


@frozen
class _Tile:
    """Time for a pair in tiles of `height` queries: `usual + short / height`, masked ones `partial` more."""

    usual: float
    short: float
    partial: float

    def cost(self, full: float, partial: float, height: int) -> float:
        """For so many pairs in full and in partial blocks."""
        return full * (self.usual + self.short / height) + partial * (self.usual + self.partial + self.short / height)


_FORWARD = _Tile(1.3, 12.0, 2.0)
_BACKWARD = {False: _Tile(1.3, 28.0, 2.0), True: _Tile(1.7, 75.0, 2.0)}
"""By whether the dtype is a half precision one."""
_SHARE = {False: 2.5, True: 1.5}
"""The backward's time over the forward's, dense."""
_MASKED = (1.17, 1.1)
"""A pair under a mask, forward and backward."""
_LAUNCH = 40_000
"""A launch, in pairs."""


def model(problem: Problem, layout: BlockLayout, can: Capabilities) -> Costs | None:
    """The costs of both; None where the device's are not known, or the backend takes no mask: blocks, then."""
    if not can.mask or problem.device.type != "cpu" or not layout.pairs:
        return None
    shared = 1 if problem.dropout_p else problem.heads // problem.kv_heads  # heads that share keys make taller tiles
    full, partial = layout.computed
    launches = sum(len(group.columns) for groups in layout.groups.values() for group in groups)
    is_half = problem.dtype in ("float16", "bfloat16")
    tiles = [(_FORWARD, _MASKED[0], 1.0)]
    tiles += [(_BACKWARD[is_half], _MASKED[1], _SHARE[is_half])] * problem.requires_grad
    height, launch = layout.block_size * shared, _LAUNCH / problem.batch
    dense = layout.possible * sum(share for *_, share in tiles)
    blocks = sum(share * (tile.cost(full, partial, height) + launches * launch) for tile, _, share in tiles)
    pairs = masked_pairs(layout)
    return Costs(blocks / dense, sum(share * (pairs * masked + launch) for _, masked, share in tiles) / dense)
