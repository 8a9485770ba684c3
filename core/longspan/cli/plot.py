"""`longspan plot`: a picture of which blocks of the attention matrix a pattern keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import longspan
from longspan.block_csr import BlockCSR, HeadBlocks
from longspan.block_sparse import BlockSparse
from longspan.cli import output
from longspan.errors import ArgumentError
from longspan.patterns import Dense, SlidingWindow

__all__ = ["cell_blocks", "picture", "plot"]

CELLS = 1024
"""Cells of a picture, each way, at most."""
DPI = 240
"""Dots an inch, so that no cell of a picture five inches wide is lost."""
SHOWN = 16
"""Layouts that are drawn where the heads differ, at most."""
FULL, PARTIAL, WHITE = (0.12, 0.30, 0.47), (0.94, 0.58, 0.22), (1.0, 1.0, 1.0)


def plot(
    pattern: Annotated[str, typer.Argument(help="e.g. 'blocks:128:local:1000,0|global:0' or window:512,0.")],
    target: Annotated[Path, typer.Option("--output", help="Write the picture to this file: .png, .svg or .pdf.")],
    tokens: Annotated[int, typer.Option(help="Length of the sequence.", min=1)] = 8192,
    causal: Annotated[bool, typer.Option("--causal", help="Key position <= query position.")] = False,
    heads: Annotated[int | None, typer.Option(help="How many heads; those that are alike share a picture.")] = None,
    block_size: Annotated[int, typer.Option(help="For patterns that have no blocks of their own.", min=1)] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was drawn as JSON.")] = False,
) -> None:
    """Draw the blocks that a pattern keeps: full ones in one colour, partial ones in another."""
    drawn = _block_sparse(pattern, block_size)
    blocks = drawn.csr(tokens, is_causal=causal, heads=heads or drawn.heads or 1)
    _draw(blocks, drawn.spec, target)
    facts = [
        {
            "heads": [head for head, mine in enumerate(blocks.of_head) if mine == number],
            "blocks": layout.nnz,
            "full": int((layout.tiles == 0).sum()),
            "masks": len(layout.masks),
            "density": layout.density,
            "bytes": layout.nbytes,
        }
        for number, layout in enumerate(blocks.layouts)
    ]
    if as_json:
        print(json.dumps({"pattern": drawn.spec, "tokens": tokens, "causal": causal, "layouts": facts}, indent=2))
        return
    for layout in blocks.layouts:
        output.say(repr(layout))
    output.say(f"written to {target}")


def _block_sparse(text: str, block_size: int) -> BlockSparse:
    parsed = longspan.parse_pattern(text)
    if isinstance(parsed, Dense):
        return BlockSparse(block_size, "all")
    if isinstance(parsed, SlidingWindow):
        return BlockSparse(block_size, f"local:{parsed.left},{parsed.right}")
    if not isinstance(parsed, BlockSparse):
        raise ArgumentError(
            "pattern", repr(text), "a pattern of blocks, a window or dense", "e.g. blocks:128:local:1000,0"
        )
    return parsed


def cell_blocks(layout: BlockCSR, cells: int = CELLS) -> int:
    """How many blocks, each way, one cell of a picture stands for."""
    return max(1, -(-max(layout.rows, layout.columns) // cells))


def picture(layout: BlockCSR, cells: int = CELLS) -> Tensor:
    """`(rows, columns, 3)` colours from 0 to 1, float32, of at most `cells` cells each way.

    A cell of nothing but full blocks has the one colour; any other cell that holds some has the other, the paler the
    less of it is kept. Where there are more blocks than cells, a cell stands for as many of them as need be.
    """
    step = cell_blocks(layout, cells)
    rows, columns = -(-layout.rows // step), -(-layout.columns // step)
    keys = layout.keys()
    cell = keys // max(1, layout.columns) // step * columns + keys % max(1, layout.columns) // step
    size = layout.block_size**2
    weights = torch.cat([torch.tensor([size], dtype=torch.int64, device="cpu"), layout.masks.sum((1, 2))])[layout.tiles]
    shape = (rows, columns)
    nothing = torch.zeros(rows * columns, dtype=torch.float32, device="cpu")
    kept = nothing.index_add(0, cell, weights.float() / size).view(shape)
    full = nothing.index_add(0, cell, (layout.tiles == 0).float()).view(shape)
    height = (layout.rows - torch.arange(rows, dtype=torch.int64, device="cpu") * step).clamp_(max=step)
    width = (layout.columns - torch.arange(columns, dtype=torch.int64, device="cpu") * step).clamp_(max=step)
    blocks = height[:, None] * width[None, :]
    share = (
        (0.5 + 0.5 * (kept / blocks)).clamp_(max=1.0)
        if step > 1
        else torch.ones(shape, dtype=torch.float32, device="cpu")
    )
    image = torch.tensor(WHITE, dtype=torch.float32, device="cpu").repeat(rows, columns, 1)
    some = kept > 0
    pale = torch.lerp(
        torch.tensor(WHITE, dtype=torch.float32, device="cpu"),
        torch.tensor(PARTIAL, dtype=torch.float32, device="cpu"),
        share[..., None],
    )
    image[some] = pale[some]
    image[some & (full == blocks)] = torch.tensor(FULL, dtype=torch.float32, device="cpu")
    return image


def _draw(blocks: HeadBlocks, title: str, target: Path) -> None:
    figures = _matplotlib()
    shown = blocks.layouts[:SHOWN]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = figures.Figure(figsize=(1 + 5 * across, 1 + 5 * down), layout="constrained")
    figure.suptitle(title if len(title) <= 100 else title[:97] + "...", fontsize="small")
    for number, layout in enumerate(shown):
        axes = figure.add_subplot(down, across, number + 1)
        start, end = layout.query_offset, layout.query_offset + layout.q_len
        image = picture(layout).tolist()
        axes.imshow(image, extent=(0, layout.kv_len, end, start), interpolation="nearest", aspect="auto")
        mine = [str(head) for head, its in enumerate(blocks.of_head) if its == number]
        heads = f"heads {', '.join(mine[:8])}{', ...' if len(mine) > 8 else ''}: " if len(blocks.of_head) > 1 else ""
        step = cell_blocks(layout)
        cells = f", {step} x {step} blocks a cell" if step > 1 else ""
        axes.set_title(f"{heads}{layout.density:.2%} of all pairs{cells}", fontsize="small")
        axes.set_xlabel("key position")
        axes.set_ylabel("query position")
        axes.ticklabel_format(style="plain")
    for name, colour in (("full", FULL), ("partial", PARTIAL)):
        figure.axes[0].plot([], [], "s", color=colour, label=name)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    try:
        figure.savefig(target, dpi=DPI)
    except OSError as error:
        raise ArgumentError("--output", f"{target}: {error.strerror}", "a file that can be written") from error
    except ValueError as error:  # matplotlib's word for a suffix that it does not know
        raise ArgumentError(
            "--output", f"{target}: {error}", "a picture format", "e.g. --output pattern.png"
        ) from error


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        fix = "pip install 'longspan[plot]'"
        raise ArgumentError("longspan plot", "no matplotlib in this Python", "matplotlib, to draw with", fix) from error
    return matplotlib.figure
