"""The demonstration's inputs: a text's bytes are the tokens, and fixed, seeded projections make query, key and value.

No weights are trained, but the scores have a realistic spread.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from attrs import field, frozen
from torch import Tensor

from longspan.errors import ArgumentError

__all__ = ["Text", "embed", "read_text"]

WIDTH = 64
SPREAD = 2.0
"""Standard deviation of the scaled scores: softmax is then neither flat nor a single key, as in a trained model."""
ANOTHER = "name a text file, or leave TEXT out to read the Python standard library's own sources"


@frozen
class Text:
    """Bytes of a text as tokens: `tokens` is `(n,)`, uint8; `source` says where they come from."""

    source: str
    tokens: Tensor = field(repr=False, eq=False)

    def __len__(self) -> int:
        return len(self.tokens)


def read_text(path: Path | None, count: int) -> Text:
    """The first `count` bytes of a file, or of the standard library's sources where `path` is None; fewer if it ends.

    Raises:
        ArgumentError: no tokens asked for, or the file is missing, a directory, unreadable or empty.
    """
    if count < 1:
        raise ArgumentError("--tokens", str(count), "a number of at least 1", "e.g. --tokens 131072, or leave it out")
    if path is None:
        return _standard_library(count)
    data = _read(path, count)
    if not data:
        raise ArgumentError("TEXT", f"{str(path)!r}, an empty file", "a file with at least one byte", ANOTHER)
    return Text(str(path), _tensor(data))


def _read(path: Path, count: int) -> bytes:
    want = "a text file that can be read"
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise ArgumentError("TEXT", f"{str(path)!r}, which does not exist", want, ANOTHER) from None
    except IsADirectoryError:
        raise ArgumentError("TEXT", f"{str(path)!r}, a directory", want, ANOTHER) from None
    except PermissionError:
        got = f"{str(path)!r}, which may not be read"
        raise ArgumentError("TEXT", got, want, f"give yourself the right to read it, or {ANOTHER}") from None
    except (OSError, ValueError) as error:  # too long a name, a broken disk, a null byte in the name
        raise ArgumentError("TEXT", f"{str(path)!r} ({error})", want, ANOTHER) from None


def _standard_library(count: int) -> Text:
    """The library's `.py` files one after the other, by name, so that the same Python gives the same tokens."""
    root = Path(sysconfig.get_path("stdlib"))
    data, first, last = bytearray(), "", ""
    for path in _sources(root):
        try:
            data += path.read_bytes()[: count - len(data)]
        except OSError:  # one file that cannot be read does not spoil the others
            continue
        first, last = first or path.name, path.relative_to(root).as_posix()
        if len(data) >= count:
            break
    if not data:
        got = f"nothing, and no readable .py file is in the standard library's folder {str(root)!r}"
        raise ArgumentError("TEXT", got, "a text file", "name a text file")
    version = sysconfig.get_python_version()
    files = first if first == last else f"{first} to {last}"
    return Text(f"the Python {version} standard library's sources, {files}", _tensor(bytes(data)))


def _sources(root: Path) -> Iterator[Path]:
    installed = {"site-packages", "dist-packages"}  # not the library's own
    for path in sorted(root.rglob("*.py")):
        if not installed.intersection(path.relative_to(root).parts):
            yield path


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def embed(
    tokens: Tensor, *, heads: int, head_dim: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed bytes, add where they stand, and project to query, key and value.

    Everything is computed in float32 on the CPU, so that one seed poses one problem on every device.

    Args:
        tokens: `(n,)`, uint8.
        heads: attention heads.
        head_dim: width of each.
        seed: of the embedding and the projections.
        dtype: of the result.
        device: of the result.

    Returns:
        Query, key and value, each `(1, heads, n, head_dim)`: transposed views of `(1, n, heads, head_dim)`, which is
        what a model's projections give.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    hidden = normal(256, WIDTH)[tokens.long()] + _positions(len(tokens))
    hidden = torch.nn.functional.layer_norm(hidden, (WIDTH,))

    def project(scale: float) -> Tensor:
        weights = normal(WIDTH, heads * head_dim) * (scale / math.sqrt(WIDTH))
        rows = (hidden @ weights).to(device, dtype)
        return rows.view(1, len(tokens), heads, head_dim).transpose(1, 2)

    return project(SPREAD), project(1.0), project(1.0)


def _positions(count: int) -> Tensor:
    """The sinusoids of "Attention is all you need" (arXiv 1706.03762, section 3.5), `(count, WIDTH)`."""
    rates = torch.exp(torch.arange(0, WIDTH, 2, dtype=torch.float32, device="cpu") * (-math.log(10_000.0) / WIDTH))
    angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * rates.double()
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1).float()
