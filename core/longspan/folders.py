"""Where longspan and its backends keep files of their own."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(name: str) -> Path:
    """The folder `name` in `$LONGSPAN_CACHE`, `$XDG_CACHE_HOME/longspan` or `~/.cache/longspan`; not created here."""
    if own := os.environ.get("LONGSPAN_CACHE", "").strip():
        base = Path(own).expanduser()
    elif shared := os.environ.get("XDG_CACHE_HOME", "").strip():
        base = Path(shared).expanduser() / "longspan"
    else:
        base = Path("~/.cache/longspan").expanduser()
    return base / name
