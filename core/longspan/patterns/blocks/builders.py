"""Builders of block-sparse patterns. What counts tokens is exact to the token, whatever the block size."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.errors import FURTHEST, ArgumentError, brief, check_integer, check_number, is_integer
from longspan.patterns.blocks.primitives import Dilation, GlobalBlocks, GlobalTokens, Hierarchy, Strides
from longspan.patterns.blocks.rules import Local
from longspan.patterns.blocks.sampling import Drawn
from longspan.patterns.blocks.sparse import BlockSparse

__all__ = [
    "bigbird",
    "dilated_blocks",
    "global_blocks",
    "global_tokens",
    "hierarchical_blocks",
    "local_blocks",
    "longformer",
    "random_blocks",
    "strided_blocks",
]


LISTED = 2**16
"""Global blocks of one pattern, at most: each is kept by its number, and so many see all but everything."""


def local_blocks(left: int, right: int = 0, block_size: int = 128) -> BlockSparse:
    """Query `i` sees keys `i - left` to `i + right`, in tokens, both ends included, as `SlidingWindow(left, right)`."""
    check_integer("left", left)
    check_integer("right", right)
    return BlockSparse(block_size, Local(left, right))


def global_blocks(blocks: int | Sequence[int] = 1, block_size: int = 128) -> BlockSparse:
    """Blocks that see everything and that everything sees.

    Args:
        blocks: how many blocks from the start; or their numbers, where negative ones count from the last block of keys.
        block_size: tokens a block.
    """
    if isinstance(blocks, int):
        if check_integer("blocks", blocks, 1) > LISTED:
            fix = "longspan.Dense(), or a larger block_size"
            raise ArgumentError("blocks", f"{brief(blocks)} blocks", f"at most {LISTED:,} global blocks", fix)
        blocks = tuple(range(blocks))
    return BlockSparse(block_size, GlobalBlocks(_numbers("blocks", blocks), block_size))


def global_tokens(positions: Sequence[int] = (0,), block_size: int = 128) -> BlockSparse:
    """Tokens that see everything and that everything sees; negative positions count from the last key."""
    return BlockSparse(block_size, GlobalTokens(_numbers("positions", positions)))


def strided_blocks(stride: int, block_size: int = 128) -> BlockSparse:
    """Every `stride`-th block, counted from the query's own block, to both sides.

    The strided half of Sparse Transformers (Child et al., 2019, arXiv 1904.10509, section 4.2), in blocks.
    """
    check_integer("stride", stride, 1)
    return BlockSparse(block_size, Strides(stride, block_size))


def dilated_blocks(reach: int, rate: int, block_size: int = 128) -> BlockSparse:
    """The query's own block, and on either side `reach` blocks at distances `rate`, `2 * rate`, ... in blocks.

    A sliding window with gaps (Longformer, Beltagy et al., 2020, arXiv 2004.05150, section 3.1), in blocks.
    """
    check_integer("reach", reach)
    check_integer("rate", rate, 1)
    return BlockSparse(block_size, Dilation(reach, rate, block_size))


def hierarchical_blocks(near: int = 4, block_size: int = 128) -> BlockSparse:
    """Fine near, coarse far, in O(near * log(N)) blocks a row.

    Of the blocks at a distance below `near` blocks from the query's own, all; of those from there to twice as far,
    every 2nd; from there to four times as far, every 4th; and so on, to both sides. Multiples of the step are kept.
    """
    check_integer("near", near, 1)
    return BlockSparse(block_size, Hierarchy(near, block_size))


def random_blocks(density: float, block_size: int = 128, seed: int = 0) -> BlockSparse:
    """In every block row `round(density * columns)` distinct blocks, at least one, drawn at random.

    A row's blocks depend on the seed, the row's number and the number of columns alone, on every platform. All heads
    share them; `per_head` with other seeds gives each head its own. `is_causal` drops those after the query.

    Args:
        density: share of the block columns, above 0 and at most 1.
        block_size: tokens a block.
        seed: any integer.
    """
    if not 0 < check_number("density", density) <= 1:
        raise ArgumentError("density", repr(density), "a share above 0 and at most 1", "e.g. random_blocks(0.1)")
    return BlockSparse(block_size, Drawn(float(density), _seed(seed), block_size))


def bigbird(
    window: int = 3,
    random: int = 3,
    global_numbers: Sequence[int] = (0, -1),
    block_size: int = 64,
    seed: int = 0,
) -> BlockSparse:
    """BigBird's block pattern (Zaheer et al., 2020, arXiv 2007.14062, section 2 and appendix D).

    Args:
        window: blocks of the sliding window, the query's own in the middle; odd.
        random: random blocks a row (all blocks, where there are fewer).
        global_numbers: the global blocks, by number, negative ones counted from the last.
        block_size: tokens a block.
        seed: of the random blocks.
    """
    check_integer("window", window, 1)
    check_integer("random", random)
    if window % 2 == 0:
        raise ArgumentError("window", window, "an odd number of blocks, the query's own in the middle", "e.g. window=3")
    pattern = BlockSparse(block_size, Dilation(window // 2, 1, block_size))
    if random:
        pattern = pattern | BlockSparse(block_size, Drawn(random, _seed(seed), block_size))
    return pattern | global_blocks(global_numbers, block_size) if len(global_numbers) else pattern


def longformer(window: int, positions: Sequence[int] = (0,), block_size: int = 128) -> BlockSparse:
    """Longformer's pattern (Beltagy et al., 2020, arXiv 2004.05150, section 3.1): a window and global tokens.

    Args:
        window: tokens of the sliding window, `window // 2` to either side; even.
        positions: of the tokens that see everything and that everything sees.
        block_size: tokens a block.
    """
    check_integer("window", window)
    if window % 2:
        raise ArgumentError("window", window, "an even number of tokens, half of it to either side", "e.g. window=512")
    pattern = local_blocks(window // 2, window // 2, block_size)
    return pattern | global_tokens(positions, block_size) if len(positions) else pattern


def _numbers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ArgumentError(name, brief(values), "a non-empty sequence of integers", f"e.g. {name}=(0, -1)")
    for number in values:
        if not is_integer(number):
            raise ArgumentError(name, brief(tuple(values)), "integers", f"replace {brief(number)}")
        if abs(number) > FURTHEST:
            raise ArgumentError(name, brief(number), "positions of at most 2**62", "leave it out")
    return tuple(values)


def _seed(seed: object) -> int:
    if not is_integer(seed):
        raise ArgumentError("seed", repr(seed), "an integer", "e.g. seed=0")
    return seed
