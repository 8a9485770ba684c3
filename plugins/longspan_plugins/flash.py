"""The FlashAttention family behind one name: the FA4, FA3 or FA2 package, whichever is installed and takes the device.

Dao et al., arXiv 2205.14135, 2307.08691, 2407.08608. The first of `LIBRARIES` that is there and takes a problem serves.
torch's own flash operator is one of those of `sdpa`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, hookimpl, install_line

Function = Callable[..., Any]


@frozen
class Library:
    """One library of the family. Nothing is imported before a kernel is made.

    `distribution` gives the version; `modules` must be found; `majors` are the lowest and the highest major version of
    the CUDA capabilities that it has kernels for; `functions` of the module `interface` are its low-level forward and
    backward, which either writes its gradients into tensors or returns them.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    majors: tuple[int, int]
    interface: str
    functions: tuple[str, str] = ("_flash_attn_forward", "_flash_attn_backward")
    gradients_returned: bool = False

    def kernel(self, problem: Problem) -> Kernel:
        """Its kernel for a dense problem."""
        package = import_module(self.interface)
        forward, backward = (getattr(package, name) for name in self.functions)
        return _kernel_of(problem, forward, backward, self.gradients_returned)

    @property
    def version(self) -> str | None:
        """The version that is installed; None where a module of the library is missing."""
        try:
            if any(find_spec(module) is None for module in self.modules):
                return None
            return version(self.distribution)
        except (ImportError, PackageNotFoundError, ValueError):
            return None

    def takes(self, problem: Problem) -> bool:
        """Whether it has kernels for the problem's device, a recent one where its capability is not known."""
        major, _ = problem.device.capability or (8, 0)
        return self.majors[0] <= major <= self.majors[1]


LIBRARIES = (
    Library(  # the CuTe DSL kernels, for Hopper and Blackwell
        "FlashAttention 4",
        "flash-attn-4",
        ("flash_attn.cute",),
        (9, 10),
        "flash_attn.cute.interface",
        ("_flash_attn_fwd", "_flash_attn_bwd"),
        gradients_returned=True,
    ),
    Library(
        "FlashAttention 3", "flash_attn_3", ("flash_attn_interface", "flash_attn_3"), (9, 9), "flash_attn_interface"
    ),
    Library(
        "FlashAttention 2",
        "flash-attn",
        ("flash_attn", "flash_attn_2_cuda"),
        (8, 12),
        "flash_attn.flash_attn_interface",
    ),
)
"""Best first."""


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Half precision on CUDA devices from Ampere on, with a native backward."""
    return Capabilities(
        devices=("cuda>=8.0",),
        dtypes=("float16", "bfloat16"),
        patterns=("dense",),
        causal=True,
        gqa=True,
        backward=True,
        head_dim_min=8,
        head_dim_max=256,
        head_dim_multiple=8,
        deterministic=True,
        tier=30,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """No package that has kernels for the device; and masking comes before scaling in these kernels."""
    if serving(problem) is None:
        wanted = [library.distribution for library in LIBRARIES if library.takes(problem)]
        want = f"the package {' or '.join(wanted)}" if wanted else "an older device"
        fix = install_line("flash-attn", "--no-build-isolation") if "flash-attn" in wanted else ""
        yield Reason("package", "flash", "not installed", want, fix)
    if problem.scale <= 0:
        yield Reason("scale", "scale", str(problem.scale), "a positive number", "scale the query instead")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """The kernel of the best library here; `serving` names it."""
    library = serving(problem)
    assert library is not None  # a problem that none serves is refused
    return evolve(library.kernel(problem), library=f"{library.name} {library.version}")


def serving(problem: Problem) -> Library | None:
    """The installed library that serves a problem, if there is one."""
    return next((library for library in LIBRARIES if library.takes(problem) and library.version is not None), None)


def _kernel_of(problem: Problem, forward: Function, backward: Function, gradients_returned: bool = False) -> Kernel:
    """A kernel from a package's low-level forward and backward.

    Args:
        problem: the dense problem.
        forward: `(q, k, v, ...) -> (out, lse, ...)`, tensors `(batch, seq, heads, head_dim)`.
        backward: takes the joint out and lse by name.
        gradients_returned: the backward returns its gradients; else it writes them into `dq`, `dk`, `dv`.
    """
    words = {
        "dropout_p": 0.0,
        "softmax_scale": problem.scale,
        "causal": problem.is_causal,
        "is_causal": problem.is_causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
        "return_lse": True,
        "deterministic": problem.deterministic,
    }
    if gradients_returned:  # FA4 takes None for no window
        words |= {"window_size_left": None, "window_size_right": None}
    forward_words, backward_words = _taken(forward, words), _taken(backward, words)

    def run_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = forward(q, k, v, **forward_words)
        return out.transpose(1, 2), lse

    def run_backward(
        dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        do, q, k, v, o = (x.transpose(1, 2) for x in (dout, query, key, value, out))
        given = {"dout": do, "q": q, "k": k, "v": v, "out": o, "lse": lse, "softmax_lse": lse.contiguous()}
        if gradients_returned:
            dq, dk, dv, *_ = backward(**_taken(backward, given), **backward_words)
        else:
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            backward(**_taken(backward, given), dq=dq, dk=dk, dv=dv, **backward_words)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return Kernel(run_forward, run_backward)


def _taken(function: Function, words: dict[str, Any]) -> dict[str, Any]:
    """Those of the words that the function has parameters for."""
    function = getattr(function, "_init_fn", function)  # a custom operator keeps its Python function there
    names = inspect.signature(function).parameters
    return {name: value for name, value in words.items() if name in names}
