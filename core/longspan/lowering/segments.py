"""Which dense segments make up the segments of a dilated branch, or a sliding window, in one document."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from longspan.lowering.layout import Rows

__all__ = ["Span", "Segment", "dilated_segments", "window_segments"]


@frozen
class Span:
    """One document: where it starts in query and key storage, and which positions of it are there."""

    query_start: int  # index of position `first` in the query tensor
    key_start: int  # index of position 0 in the key tensor
    first: int  # position of the first query
    queries: int
    keys: int

    @property
    def end(self) -> int:
        """The position after the last query."""
        return self.first + self.queries

    def query_rows(self, position: int, length: int, stride: int = 1, count: int = 1, period: int = 0) -> Rows:
        """Queries from this position on."""
        return Rows(self.query_start + position - self.first, length, stride, count, period)

    def key_rows(self, position: int, length: int, stride: int = 1, count: int = 1, period: int = 0) -> Rows:
        """Keys from this position on."""
        return Rows(self.key_start + position, length, stride, count, period)


@frozen
class Segment:
    """A dense segment: a dense call without its heads. `first`: none before it wrote to its rows."""

    queries: Rows
    keys: Rows
    is_causal: bool = False
    first: bool = False
    flipped: bool = False


def dilated_segments(span: Span, w: int, r: int, s: int, is_causal: bool) -> Iterator[Segment]:
    """Positions `p` with `(p mod w) mod r == s` attend among themselves in each segment of `w`."""
    low, high = span.first, span.end
    whole = range(-(-low // w), max(min(high, span.keys) // w, -(-low // w)))  # segments with all queries, all keys
    if whole and (rows := len(range(s, w, r))):
        start = whole.start * w + s
        grid = (start, rows, r, len(whole), w)
        yield Segment(span.query_rows(*grid), span.key_rows(*grid), is_causal and rows > 1, True)
    for number in range(low // w, -(-high // w)):
        if number not in whole:
            yield from _edge_segment(span, number * w, w, r, s, is_causal)


def _edge_segment(span: Span, start: int, w: int, r: int, s: int, is_causal: bool) -> Iterator[Segment]:
    """One segment that lacks some of its queries or keys: its kept rows are numbered 0, 1, ... from `start + s`."""
    end = start + w
    skipped = len(range(start + s, min(max(span.first, start), end), r))  # kept rows before the first query
    wanted = len(range(start + s, min(span.end, end), r)) - skipped
    known = len(range(start + s, min(span.keys, end), r))

    def queries(first: int, count: int) -> Rows:
        return span.query_rows(start + s + (skipped + first) * r, count, r)

    def keys(first: int, count: int) -> Rows:
        return span.key_rows(start + s + first * r, count, r)

    if wanted <= 0 or known <= 0:
        return
    if not is_causal or wanted == 1:
        yield Segment(queries(0, wanted), keys(0, min(known, skipped + 1) if is_causal else known), first=True)
        return
    before = min(skipped, known)  # keys that every query sees
    if before:
        yield Segment(queries(0, wanted), keys(0, before), first=True)
    square = min(known - skipped, wanted)
    if square > 0:
        yield Segment(queries(0, square), keys(skipped, square), square > 1, not before)
        if square < wanted:  # queries beyond the last key see all of them
            yield Segment(queries(square, wanted - square), keys(skipped, square), first=not before)


def window_segments(span: Span, left: int, right: int, is_causal: bool) -> Iterator[Segment]:
    """Query `i` sees keys `i - left` to `i + right`.

    In a tile of `left + right` queries the first half of the keys is a causal square upside down (query `x` sees key
    `y >= x`), the second half a causal square: exactly the window's pairs, none masked away between them. All inner
    tiles are two batched calls; tiles that lack keys are cut into rectangles and smaller squares.
    """
    left, right = min(left, span.end), 0 if is_causal else min(right, span.keys)
    tile = left + right
    if tile == 0:  # every query sees itself
        count = min(span.end, span.keys) - span.first
        if count > 0:
            yield Segment(
                span.query_rows(span.first, 1, 1, count, 1), span.key_rows(span.first, 1, 1, count, 1), first=True
            )
        return
    starts = range(span.first, span.end, tile)
    inner = [a for a in starts if a >= left and a + right + tile <= span.keys and a + tile <= span.end]
    if inner:
        grid = (tile, 1, len(inner), tile)
        queries = span.query_rows(inner[0], *grid)
        yield Segment(queries, span.key_rows(inner[0] - left, *grid), tile > 1, True, tile > 1)
        yield Segment(queries, span.key_rows(inner[0] + right, *grid), tile > 1)
    for a in starts:
        if not inner or not inner[0] <= a <= inner[-1]:
            yield from _edge_tile(span, a, min(tile, span.end - a), left, right)


def _edge_tile(span: Span, a: int, rows: int, left: int, right: int) -> Iterator[Segment]:
    """A tile of `rows` queries from position `a` on whose keys may begin or end early. Everything merges."""

    def segment(
        row: int, count: int, key: int, keys: int, square: bool = False, flipped: bool = False
    ) -> Iterator[Segment]:
        if count > 0 and keys > 0:
            square = square and count > 1
            yield Segment(span.query_rows(a + row, count), span.key_rows(key, keys), square, False, square and flipped)

    low, high = max(0, a - left), min(span.keys, a + rows - 1 + right + 1)
    if rows == 1:
        yield from segment(0, 1, low, high - low)
        return
    middle = min(a + right, span.keys)  # keys before it: the upside-down half; from it on: the causal half
    skipped = low - (a - left)  # keys of the first half that do not exist: queries up to there see all that do
    square = min(max(0, rows - skipped), middle - low)
    yield from segment(0, min(skipped, rows), low, middle - low)
    yield from segment(skipped, square, low, square, True, True)
    yield from segment(skipped, square, low + square, middle - low - square)
    square = min(rows, span.keys - middle)
    yield from segment(0, square, middle, square, True)
    yield from segment(square, rows - square, middle, square)
