"""The support matrix: what every built-in backend declares, as a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable

from longspan.spec import BackendInfo, Capabilities

__all__ = ["render_matrix"]

HEAD = """# Support matrix

Generated from the backends' own `Capabilities` by `longspan matrix --output docs/support_matrix.md`; a test fails when
it is stale. What a backend does not run natively, the core lowers to its dense kernel.
"""


def render_matrix(rows: Iterable[BackendInfo]) -> str:
    """Markdown: one line a loaded backend, and one for each that is not, with the reason."""
    loaded = [(row, row.capabilities) for row in rows if row.capabilities is not None]
    lines = [
        HEAD,
        "| backend | devices | dtypes | native patterns | arguments | backward | keeps NaN apart | head_dim | auto |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, can in loaded:
        cells = (
            f"`{row.name}`",
            ", ".join(can.devices),
            ", ".join(can.dtypes),
            ", ".join(can.patterns),
            ", ".join(_arguments(can)),
            "native" if can.backward else "the core's",
            ", ".join(can.contains_nonfinite),
            _head_dim(can),
            _auto(row, can),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- `{row.name}`: {row.description}" for row, _ in loaded), ""]
    return "\n".join(lines)


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
