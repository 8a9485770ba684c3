"""The support matrix: what every built-in backend declares, as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable

from longspan.spec.backend import BackendInfo, Capabilities

__all__ = ["HEADINGS", "matrix_cells", "render_matrix"]

HEAD = """# Support matrix

Generated from the backends' own `Capabilities` by `longspan matrix --output docs/support_matrix.md`; a test fails when
it is stale. What a backend does not run natively, the core lowers to its dense kernel.
"""


HEADINGS = (
    "backend",
    "devices",
    "dtypes",
    "native patterns",
    "arguments",
    "backward",
    "keeps NaN apart",
    "head_dim",
    "auto",
)


def render_matrix(rows: Iterable[BackendInfo]) -> str:
    """Markdown: one line a loaded backend, and one for each that is not, with the reason."""
    loaded = [row for row in rows if row.capabilities is not None]
    lines = [HEAD, f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, *cells in matrix_cells(loaded):
        lines.append(f"| {' | '.join([f'`{name}`', *cells])} |")
    lines += ["", *(f"- `{row.name}`: {row.description}" for row in loaded), ""]
    return "\n".join(lines)


def matrix_cells(rows: Iterable[BackendInfo]) -> list[tuple[str, ...]]:
    """The cells below `HEADINGS`, of each loaded backend."""
    return [
        (
            row.name,
            ", ".join(can.devices),
            ", ".join(can.dtypes),
            ", ".join(can.patterns),
            ", ".join(_arguments(can)),
            "native" if can.backward else "the core's",
            ", ".join(can.contains_nonfinite),
            _head_dim(can),
            _auto(row, can),
        )
        for row in rows
        if (can := row.capabilities) is not None
    ]


def _arguments(can: Capabilities) -> list[str]:
    names = ("causal", "mask", "gqa", "dropout", "documents", "window", "query_offset", "deterministic")
    return [name for name in names if getattr(can, name)]


def _head_dim(can: Capabilities) -> str:
    text = f"{can.head_dim_min} to {can.head_dim_max}" if can.head_dim_max else f"from {can.head_dim_min}"
    return text + (f", multiples of {can.head_dim_multiple}" if can.head_dim_multiple > 1 else "")


def _auto(row: BackendInfo, can: Capabilities) -> str:
    if not can.exact:
        return "never: an approximation"
    if can.experimental:
        return "never: experimental"
    return "by name only" if row.opt_in else f"yes, tier {can.tier}"
