"""Lines that install what is missing: for this Python, and by names that an index knows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

__all__ = ["extra_line", "install_line", "own_line", "pip"]

OWN = "longspan"


def pip() -> str:
    """How pip of this Python is called: `pip` where a shell would find it, else by way of the interpreter's path."""
    in_path = shutil.which("pip")
    ours = Path(sys.executable).parent
    return "pip" if in_path and Path(in_path).parent == ours else f"{shlex.quote(sys.executable)} -m pip"


def install_line(*requirements: str) -> str:
    """The line that installs packages for this Python, as a reason's `fix`: `pip install 'acme-kernels>=2'`.

    Args:
        requirements: as pip takes them; quoted for the shell here.
    """
    return " ".join([pip(), "install", *map(shlex.quote, requirements)])


def extra_line(extra: str) -> str:
    """The line that installs what one of longspan's extras asks for, by the packages' own names.

    An extra's own name would need an index that has longspan.
    """
    try:
        listed = requires(OWN) or []
    except PackageNotFoundError:  # run from a folder that was never installed
        listed = []
    named = re.compile(rf"""^(?P<what>[^;]+?)\s*;.*\bextra\s*==\s*['"]{re.escape(extra)}['"]""")
    return install_line(*(match["what"] for line in listed if (match := named.match(line))))


def own_line() -> str:
    """The line that installs longspan again from where it came (PEP 610): a folder, file, repository or index."""
    try:
        origin: dict[str, Any] = json.loads(distribution(OWN).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url = str(origin.get("url", ""))
    again = [pip(), "install", "--force-reinstall", "--no-deps"]
    if not url:
        return " ".join([*again, OWN])
    if "vcs_info" in origin:
        checkout = origin["vcs_info"]
        return " ".join([*again, shlex.quote(f"{checkout['vcs']}+{url}@{checkout['commit_id']}")])
    source = url2pathname(urlparse(url).path) if url.startswith("file:") else url
    editable = ["-e"] if origin.get("dir_info", {}).get("editable") else []
    return " ".join([*again, *editable, shlex.quote(source)])
