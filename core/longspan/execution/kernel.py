"""The contract with a kernel: what it may be given, what it must return, and whose an exception is.

A kernel that reads memory by its address is run for ordinary calls alone: tensors with memory of their own, and nobody
between them and the kernel who looks on. Fake tensors, wrappers, distributed tensors, what torch.func hands on, and
plain tensors while a graph is recorded go through the operators, which torch dispatches.

What a kernel returns is checked the first time it runs: a wrong shape would broadcast and go unnoticed. An exception
that a plugin raises keeps its type, and gets a note that names the backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from longspan.errors import LongspanError, PluginError
from longspan.lowering.masked import Slab
from longspan.memory.workspace import Workspace
from longspan.numerics import blockwise
from longspan.spec.backend import Forward, Kernel

__all__ = [
    "CheckedKernel",
    "ForwardModeError",
    "MaskedKernel",
    "check_gradients",
    "check_result",
    "in_hook",
    "note_kernel",
    "refuse_forward_mode",
    "refuse_tangents",
    "undisturbed",
    "undisturbed_gradient",
]

PLAN = "`longspan explain` lists who else fits"

LEASED = 2**19
"""Elements from which on a mask's memory is kept from call to call: fresh pages would cost as much as writing it."""

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


class CheckedKernel:
    """A kernel with what the core knows about the dense problem that it was made for.

    `bare` is its forward, for tensors whose last dimension has no gaps, once a result of it was checked.
    """

    __slots__ = ("_backward", "_backward_checked", "_forward", "backend", "bare", "gqa", "is_causal", "scale")

    def __init__(
        self, kernel: Kernel, backend: str, *, scale: float, gqa: bool = True, is_causal: bool = False
    ) -> None:
        self._forward, self._backward, self.backend = kernel.forward, kernel.backward, backend
        self.bare: Forward | None = None
        self._backward_checked = False
        self.gqa, self.is_causal, self.scale = gqa, is_causal, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """`(out, lse)` of tensors whose last dimension has no gaps; what the kernel returns is checked once."""
        try:
            result = self._forward(query, key, value, **given)
        except Exception as error:
            note_kernel(error, self.backend)
            raise
        if self.bare is None:
            check_result(self.backend, result, query)
            self.bare = self._forward
        return result

    def differentiates(self, dlse: Tensor | None) -> bool:
        """Whether the kernel's own backward serves: there is one, and the lse has no gradient of its own."""
        return self._backward is not None and dlse is None

    def backward(self, *tensors: Tensor, dlse: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`(dquery, dkey, dvalue)` from `(dout, query, key, value, out, lse)`; the core's where the kernel has none."""
        if self._backward is None or dlse is not None:
            return blockwise.backward(*tensors, is_causal=self.is_causal, scale=self.scale, dlse=dlse, **given)
        try:
            result = self._backward(*tensors, **given)
        except Exception as error:
            note_kernel(error, self.backend)
            raise
        if not self._backward_checked:
            check_gradients(self.backend, result, tensors[1:4])
            self._backward_checked = True
        return result


class MaskedKernel(CheckedKernel):
    """Dense attention under the mask of one slab of a masked layout, made when it runs, in memory from a workspace."""

    __slots__ = ("_memory", "slab")

    def __init__(self, kernel: Kernel, backend: str, *, slab: Slab, memory: Workspace, **known: Any) -> None:
        super().__init__(kernel, backend, **known)
        self.slab, self._memory = slab, memory

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        """The kernel's forward under the mask."""
        with self._mask(query) as mask:
            try:
                return super().forward(query, key, value, mask=mask, **given)
            finally:
                del mask  # else the memory behind it would not come back

    def backward(self, *tensors: Tensor, dlse: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's backward under the mask, or the core's."""
        with self._mask(tensors[0]) as mask:
            try:
                if not self.differentiates(dlse):  # the core's takes what is seen
                    mask = mask == 0
                return super().backward(*tensors, dlse=dlse, mask=mask, **given)
            finally:
                del mask

    @contextmanager
    def _mask(self, like: Tensor) -> Iterator[Tensor]:
        """`(1, 1, queries, keys)` of this tensor's dtype, where it is."""
        rows, columns = self.slab.shape
        cpu = torch.device("cpu")
        if rows * columns < LEASED:
            yield self.slab.fill(torch.empty(rows, columns, dtype=like.dtype, device=cpu)).to(like.device)
            return
        with self._memory.temporary("mask", (rows, columns), like.dtype, cpu, always=True) as memory:
            yield self.slab.fill(memory).to(like.device)


def check_result(backend: str, result: Any, query: Tensor) -> None:
    """Refuse what is not `(out, lse)` of the kernel contract.

    Raises:
        PluginError: names the backend, what its kernel returned and what the contract wants.
    """
    lse_dtypes = (torch.float64,) if query.dtype == torch.float64 else (torch.float32, torch.float64)
    wanted = f"out {tuple(query.shape)} {query.dtype} and lse {tuple(query.shape[:3])} {lse_dtypes[0]}"
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(x, Tensor) for x in result):
        got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__
    else:
        out, lse = result
        right = out.shape == query.shape and out.dtype == query.dtype and _lies_like(query, out, lse)
        if right and lse.shape == query.shape[:3] and lse.dtype in lse_dtypes:
            return
        wanted += _place(query)
        got = f"out {tuple(out.shape)} {out.dtype}{_place(out)} and lse {tuple(lse.shape)} {lse.dtype}{_place(lse)}"
    raise PluginError(f"{backend}'s kernel returned {got}; want {wanted}. Next: fix the kernel")


def check_gradients(backend: str, result: Any, inputs: tuple[Tensor, ...]) -> None:
    """Refuse what is not `(dquery, dkey, dvalue)` in the shapes of query, key and value.

    Raises:
        PluginError: names the backend, what its backward returned and what the contract wants.
    """
    wanted = " and ".join(str(tuple(x.shape)) for x in inputs)
    if isinstance(result, tuple | list) and len(result) == 3 and all(isinstance(x, Tensor) for x in result):
        alike = all(x.shape == like.shape and x.is_floating_point() for x, like in zip(result, inputs, strict=True))
        if alike and _lies_like(inputs[0], *result):
            return
        wanted += _place(inputs[0])
        got = " and ".join(f"{tuple(x.shape)} {x.dtype}{_place(x)}" for x in result)
    else:
        got = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else type(result).__name__
    raise PluginError(f"{backend}'s backward returned {got}; want gradients {wanted}. Next: fix the kernel")


def _lies_like(like: Tensor, *tensors: Tensor) -> bool:
    return all(x.device == like.device and x.layout is torch.strided for x in tensors)


def _place(tensor: Tensor) -> str:
    return f" on {tensor.device}" + ("" if tensor.layout is torch.strided else f" ({tensor.layout})")


def note_kernel(error: Exception, backend: str) -> None:
    """Note on an exception that a backend's kernel raised it."""
    _note(error, f"raised by the kernel of longspan's backend {backend!r}; {PLAN}")


@contextmanager
def in_hook(backend: str, hook: str) -> Iterator[None]:
    """Note on an exception that a backend's hook raised it; longspan's own say whose they are."""
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        _note(error, f"raised by {hook} of longspan's backend {backend!r}; {PLAN}")
        raise


def _note(error: Exception, text: str) -> None:
    if text not in getattr(error, "__notes__", ()):  # one kernel may have called another
        error.add_note(text)
