"""What an ordinary call is: tensors with memory of their own, and nobody between them and a kernel who looks on.

A kernel that reads memory by its address is run for such calls alone. Fake tensors, wrappers, distributed tensors, what
torch.func hands on, and plain tensors while a graph is recorded go through the operators, which torch dispatches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import (  # noqa: PLC2701 - torch has no public way to ask these at so little cost
    DispatchKey,
    _dispatch_tls_is_dispatch_key_included,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import is_legacy_batchedtensor, maybe_current_level  # noqa: PLC2701 - as above
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from longspan.errors import LongspanError

__all__ = [
    "ForwardModeError",
    "refuse_forward_mode",
    "refuse_tangents",
    "undisturbed",
    "undisturbed_gradient",
]

_USUAL = frozenset((Tensor, Parameter))


class ForwardModeError(LongspanError, NotImplementedError):
    """A tangent of forward-mode differentiation, which no kernel carries."""


def undisturbed(query: Any, key: Any, value: Any) -> bool:
    """Whether a kernel may read these three where they lie: strided memory, no graph recorded, no transform, no mode.

    Asked at every call, it takes less than half a microsecond. In a traced graph the answer is no.
    """
    return (
        not is_compiling()  # first, for dynamo traces no more of it
        and (type(query) is type(key) is type(value) is Tensor or (_plain(query) and _plain(key) and _plain(value)))
        and query.layout is key.layout is value.layout is torch.strided
        and maybe_current_level() is None
        and not _len_torch_dispatch_stack()
        and not (_len_torch_function_stack() and _before_dispatch())
        and not _is_tracing()
        and forward_ad._current_level < 0
    )


def undisturbed_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor) -> bool:
    """The same question about the gradients that a backward is given: `is_grads_batched` maps those alone."""
    return (
        undisturbed(dout, out, out if dlse is None else dlse)
        and not is_legacy_batchedtensor(dout)
        and (dlse is None or not is_legacy_batchedtensor(dlse))
    )


def _before_dispatch() -> bool:
    """Whether a graph is recorded before autograd, always under a function mode; to ask costs more than all else."""
    return _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)


def _plain(tensor: Any) -> bool:
    """Whether it is a tensor, or of a subclass that adds nothing to how torch's operators treat its memory."""
    kind = type(tensor)
    return kind in _USUAL or (isinstance(tensor, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__)


def refuse_forward_mode(*_: Any) -> Any:
    """Say that there is no forward-mode derivative.

    Raises:
        ForwardModeError: always.
    """
    raise ForwardModeError(
        "longspan.attention has no forward-mode derivative: got a dual tensor; want tensors without a tangent. Next: "
        "differentiate in reverse (torch.func.vjp or jacrev), or write the attention with torch's operators there"
    )


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Refuse dual tensors: a kernel would compute their result and drop their tangent.

    torch.compile's tracer does not see tangents: it is refused altogether where there may be some.

    Raises:
        ForwardModeError: one of the tensors has a tangent.
    """
    if forward_ad._current_level < 0:
        return
    if is_compiling():
        refuse_forward_mode()
    unpack: Any = forward_ad.unpack_dual
    for tensor in tensors:
        if tensor is not None and unpack(tensor).tangent is not None:
            refuse_forward_mode()
