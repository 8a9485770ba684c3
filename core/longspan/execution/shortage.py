"""Out of memory: what the arena keeps for later is given back, and the call is run once more, which is said.

That is safe since a call changes nothing that it was given: it computes new tensors from old ones, with the same
dropout. A call is not cut into smaller ones, and no other backend takes its place: that would change what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from longspan.errors import warn_caller
from longspan.memory.arena import buffer_arena

__all__ = ["give_back", "once_more", "spared"]

Result = TypeVar("Result")
WORDS = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch's allocators say it where they raise a bare RuntimeError, that of the CPU among them."""
ADVICE = "Next: fewer batch entries or heads a call, longspan.checkpoint in training, or less beside it on the device"


def give_back(error: Exception) -> int:
    """Bytes that the arena gave back as a call ran out of memory; 0 where it did not, or nothing could be given.

    In the latter case the error gets a note that says what to do. While a CUDA graph is captured nothing is given back.
    """
    if not _is_shortage(error):
        return 0
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
    if not capturing and (freed := buffer_arena().give_back()):
        return freed
    error.add_note(f"longspan's arena kept no memory that it could give back. {ADVICE}")
    return 0


def once_more(call: Callable[[], Result], freed: int) -> Result:
    """Run a call again, out of the `except` block, as until then the failed one holds its memory; says so either way.

    Args:
        call: what ran out of memory.
        freed: what `give_back` gave back.
    """
    gave = f"longspan's arena gave back {freed / 2**20:,.0f} MiB"
    try:
        result = call()
    except Exception as error:
        if _is_shortage(error):
            error.add_note(f"{gave}, and the call was run again: in vain. {ADVICE}")
        raise
    warn_caller(f"a call ran out of memory; {gave}, and the call was run again. {ADVICE}", UserWarning)
    return result


def spared(call: Callable[[], Result]) -> Result:
    """Run a call, and where it runs out of memory and the arena can give some back, once more."""
    try:
        return call()
    except Exception as error:
        if not (freed := give_back(error)):
            raise
    return once_more(call, freed)


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
