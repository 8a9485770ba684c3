"""`longspan plot`: a picture of which blocks of the attention matrix a pattern keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attrs import frozen
from torch import Tensor

import longspan
from longspan.errors import ArgumentError
from longspan.patterns.blocks.csr import BlockCSR, HeadBlocks
from longspan.patterns.blocks.sparse import BlockSparse
from longspan.patterns.dilated import Dilated
from longspan.patterns.window import SlidingWindow
from longspan.spec.installing import extra_line
from longspan.spec.pattern import Dense, Pattern
from longspan.tools.cli import output

__all__ = ["Branch", "cell_blocks", "dilated_heads", "dilated_shares", "picture", "plot"]

CELLS = 1024
"""Cells of a picture, each way, at most."""
DPI = 240
"""Dots an inch, so that no cell of a picture five inches wide is lost."""
SHOWN = 16
"""Layouts that are drawn where the heads differ, at most."""
Branch = tuple[int, int, int]
"""Segment length, dilation rate and offset: positions `p` with `p mod length mod rate == offset` see one another."""
FULL, PARTIAL, WHITE = (0.12, 0.30, 0.47), (0.94, 0.58, 0.22), (1.0, 1.0, 1.0)


def plot(
    pattern: Annotated[
        str, typer.Argument(help="e.g. 'blocks:128:local:1000,0|global:0', window:512,0 or dilated:2048/1,4096/2.")
    ],
    target: Annotated[Path, typer.Option("--output", help="Write the picture to this file: .png, .svg or .pdf.")],
    tokens: Annotated[int, typer.Option(help="Length of the sequence.", min=1)] = 8192,
    causal: Annotated[bool, typer.Option("--causal", help="Key position <= query position.")] = False,
    heads: Annotated[int | None, typer.Option(help="How many heads; those that are alike share a picture.")] = None,
    block_size: Annotated[int, typer.Option(help="For patterns that have no blocks of their own.", min=1)] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was drawn as JSON.")] = False,
) -> None:
    """Draw the blocks that a pattern keeps: full ones in one colour, partial ones in another.

    Heads that see the same share a picture. Of a dilated pattern each block is the paler, the less of it is kept.
    """
    output.check_writable(target)
    parsed = longspan.parse_pattern(pattern)
    if isinstance(parsed, Dilated):
        spec, panels = parsed.spec, _dilated(parsed, tokens, causal, heads, block_size)
    else:
        blocks = _block_sparse(parsed, block_size)
        spec, panels = blocks.spec, _panels(blocks.csr(tokens, is_causal=causal, heads=heads or blocks.heads or 1))
    with output.quiet_stdout():
        _draw(panels, spec, tokens, target)
    if as_json:
        facts = [{"heads": list(panel.heads), **panel.facts} for panel in panels]
        print(json.dumps({"pattern": spec, "tokens": tokens, "causal": causal, "layouts": facts}, indent=2))
        return
    for panel in panels:
        output.say(panel.text)
    output.say(f"written to {target}")


@frozen
class Panel:
    """Of which heads, `(rows, columns, 3)` colours (None: not drawn), the share of pairs that is kept, what to say."""

    heads: tuple[int, ...]
    image: Tensor | None
    density: float
    step: int
    text: str
    facts: dict[str, Any]


def _panels(blocks: HeadBlocks) -> list[Panel]:
    panels = []
    for number, layout in enumerate(blocks.layouts):
        facts = {
            "blocks": layout.nnz,
            "full": int((layout.mask_ids == 0).sum()),
            "masks": len(layout.masks),
            "density": layout.density,
            "bytes": layout.nbytes,
        }
        mine = tuple(head for head, own in enumerate(blocks.of_head) if own == number)
        image = picture(layout) if number < SHOWN else None
        panels.append(Panel(mine, image, layout.density, cell_blocks(layout), repr(layout), facts))
    return panels


def _dilated(pattern: Dilated, tokens: int, causal: bool, heads: int | None, block_size: int) -> list[Panel]:
    """A picture for each group of heads that see the same; every offset has its turn unless `heads` says how many."""
    branches = len(pattern.segment_lengths)
    count = heads or (branches if pattern.heads == "grouped" else max(pattern.dilation_rates))
    panels: list[Panel] = []
    for own, offsets in dilated_heads(pattern, count).items():
        step = max(1, -(-tokens // (block_size * CELLS)))
        cell = block_size * step
        shares = dilated_shares(offsets, tokens, cell, causal)
        kept, full = shares > 0, shares >= 1
        size = torch.full((shares.shape[0],), cell, dtype=torch.float64, device="cpu")
        size[-1] = tokens - cell * (shares.shape[0] - 1)
        density = float((shares * (size[:, None] * size[None, :])).sum() / tokens**2)
        facts = {"blocks": int(kept.sum()), "full": int(full.sum()), "block_size": cell, "density": density}
        text = (
            f"heads {', '.join(map(str, own))}: {facts['blocks']:,} of {shares.numel():,} blocks of {cell} hold some "
            f"pairs, {facts['full']:,} all; {density:.2%} of all pairs"
        )
        image = _coloured(kept, full, 0.25 + 0.75 * shares) if len(panels) < SHOWN else None
        panels.append(Panel(own, image, density, step, text, facts))
    return panels


def dilated_heads(pattern: Dilated, heads: int) -> dict[tuple[int, ...], tuple[Branch, ...]]:
    """Heads that run the same branches, and these branches; the first head's come first.

    Raises:
        ArgumentError: too few heads for the pattern.
    """
    pattern.check(heads)
    pairs = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    alike: dict[tuple[Branch, ...], list[int]] = {}
    for head in range(heads):
        if pattern.heads == "grouped":
            group = _group(head, heads, len(pairs))
            length, rate = pairs[group]
            own: tuple[Branch, ...] = ((length, rate, group % rate),)
        elif pattern.offset == "modulo":
            own = tuple((length, rate, head % rate) for length, rate in pairs)
        else:
            own = tuple((length, rate, head // -(-heads // rate)) for length, rate in pairs)
        alike.setdefault(own, []).append(head)
    return {tuple(numbers): own for own, numbers in alike.items()}


def _group(head: int, heads: int, groups: int) -> int:
    """Groups follow each other; those before the remainder's end have one head more."""
    size, more = divmod(heads, groups)
    return head // (size + 1) if head < more * (size + 1) else (head - more) // size


def dilated_shares(branches: tuple[Branch, ...], tokens: int, cell: int, is_causal: bool) -> Tensor:
    """`(cells, cells)`, float32: the share of each cell's pairs that some branch keeps; cells of `cell` tokens a side.

    Queries of a cell that stand alike in every branch see the same keys, so that each kind is looked at once.
    """
    position = torch.arange(tokens, dtype=torch.int64, device="cpu")
    segments = torch.stack([position // length for length, _, _ in branches])
    chosen = torch.stack([position % length % rate == offset for length, rate, offset in branches])
    kind = torch.where(chosen, segments, -1)  # (branches, tokens): the segment that a position takes part in, if any
    count = -(-tokens // cell)
    sizes = torch.full((count,), cell, dtype=torch.float32, device="cpu")
    sizes[-1] = tokens - cell * (count - 1)
    shares = torch.zeros(count, count, dtype=torch.float32, device="cpu")
    for row in range(count):
        mine = kind[:, row * cell : (row + 1) * cell]
        kinds, members = torch.unique(mine, dim=1, return_counts=True)
        keys = kind[:, : (row + 1) * cell] if is_causal else kind
        seen = torch.zeros(count * cell, dtype=torch.float32, device="cpu")
        seen[: keys.shape[1]] = members.float() @ _alike(kinds, keys).float()
        kept = seen.view(count, cell).sum(1)
        if is_causal:
            kept[row] = _alike(mine, mine).tril().sum()
        shares[row] = kept / (sizes[row] * sizes)
    return shares


def _alike(queries: Tensor, keys: Tensor) -> Tensor:
    """`(queries, keys)`: whether some branch has both in one segment; a key that two branches show counts once."""
    together = torch.zeros(queries.shape[1], keys.shape[1], dtype=torch.bool, device="cpu")
    for asking, shown in zip(queries, keys, strict=True):
        together |= (asking[:, None] == shown[None, :]) & (asking >= 0)[:, None]
    return together


def _block_sparse(pattern: Pattern, block_size: int) -> BlockSparse:
    if isinstance(pattern, Dense):
        return BlockSparse(block_size, "all")
    if isinstance(pattern, SlidingWindow):
        return BlockSparse(block_size, f"local:{pattern.left},{pattern.right}")
    if not isinstance(pattern, BlockSparse):
        raise ArgumentError(
            "pattern",
            repr(pattern.spec),
            "a pattern whose blocks are known beforehand: of blocks, dilated, a window or dense",
            "e.g. blocks:128:local:1000,0",
        )
    return pattern


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
    weights = torch.cat([torch.tensor([size], dtype=torch.int64, device="cpu"), layout.masks.sum((1, 2))])[
        layout.mask_ids
    ]
    shape = (rows, columns)
    nothing = torch.zeros(rows * columns, dtype=torch.float32, device="cpu")
    kept = nothing.index_add(0, cell, weights.float() / size).view(shape)
    full = nothing.index_add(0, cell, (layout.mask_ids == 0).float()).view(shape)
    height = (layout.rows - torch.arange(rows, dtype=torch.int64, device="cpu") * step).clamp_(max=step)
    width = (layout.columns - torch.arange(columns, dtype=torch.int64, device="cpu") * step).clamp_(max=step)
    blocks = height[:, None] * width[None, :]
    if step == 1:
        return _coloured(kept > 0, full == blocks, torch.ones_like(kept))
    return _coloured(kept > 0, full == blocks, (0.5 + 0.5 * (kept / blocks)).clamp_(max=1.0))


def _coloured(some: Tensor, full: Tensor, share: Tensor) -> Tensor:
    """`(rows, columns, 3)`: cells that hold some, the paler the smaller their share; full ones in their own colour."""
    white, partial, blue = (
        torch.tensor(colour, dtype=torch.float32, device="cpu") for colour in (WHITE, PARTIAL, FULL)
    )
    image = white.repeat(*some.shape, 1)
    pale = torch.lerp(white, partial, share[..., None])
    image[some] = pale[some]
    image[some & full] = blue
    return image


def _draw(panels: list[Panel], title: str, tokens: int, target: Path) -> None:
    figures = _matplotlib()
    shown = [(panel, panel.image) for panel in panels if panel.image is not None]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = figures.Figure(figsize=(1 + 5 * across, 1 + 5 * down), layout="constrained")
    figure.suptitle(title if len(title) <= 100 else title[:97] + "...", fontsize="small")
    for number, (panel, image) in enumerate(shown):
        axes = figure.add_subplot(down, across, number + 1)
        extent = (0, tokens, tokens, 0)
        axes.imshow(image.tolist(), extent=extent, interpolation="nearest", aspect="auto")
        mine = [str(head) for head in panel.heads]
        alone = len(panels) == 1 and len(mine) == 1
        heads = "" if alone else f"heads {', '.join(mine[:8])}{', ...' if len(mine) > 8 else ''}: "
        cells = f", {panel.step} x {panel.step} blocks a cell" if panel.step > 1 else ""
        axes.set_title(f"{heads}{panel.density:.2%} of all pairs{cells}", fontsize="small")
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
        fix = extra_line("plot")
        raise ArgumentError("longspan plot", "no matplotlib in this Python", "matplotlib, to draw with", fix) from error
    return matplotlib.figure
