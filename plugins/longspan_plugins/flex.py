"""torch's FlexAttention, for dense attention and sliding windows.

On CUDA it is compiled. On a CPU compiled FlexAttention returns no log-sum-exp, so it runs uncompiled there and holds
all scores at once; problems too large for that are refused. Its own backward takes no joint log-sum-exp (and there is
none on a CPU), so the core's blockwise backward serves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from longspan.plugin import Capabilities, Kernel, Problem, Reason, SlidingWindow, hookimpl

SCORES = 2**26
"""Query-key pairs, over batch and heads, that are held at once on a CPU."""


class _Tracer:
    """Lets one thread at a time into FlexAttention: it traces each call's functions, with state that threads share."""

    def __init__(self) -> None:
        self.free = RLock()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.free = RLock()  # the fork may have copied one that another thread held


_TRACER = _Tracer()


@hookimpl
def longspan_capabilities() -> Capabilities:
    """Dense and windowed attention, whose backward is the core's."""
    return Capabilities(
        devices=("cpu", "cuda>=8.0"),
        dtypes=("float16", "bfloat16", "float32"),
        patterns=("dense", "window"),
        causal=True,
        gqa=True,
        contains_nonfinite=("cpu",),
        head_dim_min=16,
        head_dim_max=256,
        head_dim_multiple=16,
        opt_in=True,
    )


@hookimpl
def longspan_unsupported(problem: Problem) -> Iterable[Reason]:
    """What would not fit in memory uncompiled."""
    pairs = problem.batch * problem.heads * problem.q_len * problem.kv_len
    if problem.device.type == "cpu" and pairs > SCORES and problem.pattern.kind in ("dense", "window"):
        want = f"at most {SCORES:,} on a CPU, where compiled FlexAttention returns no log-sum-exp"
        yield Reason("size", "q_len x kv_len", f"{pairs:,} scores", want, "backend='sdpa'")


@hookimpl
def longspan_kernel(problem: Problem) -> Kernel:
    """FlexAttention with the problem's mask; on a CPU, NaN and inf among values reach only the rows that see them."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    visible = _visible(problem)
    if problem.device.type == "cpu":
        _hear_torch_out()
    run: Any = torch.compile(flex_attention, dynamic=False) if problem.device.type != "cpu" else flex_attention

    @lru_cache(maxsize=8)
    def mask_for(q_len: int, kv_len: int, device: torch.device) -> Any:
        assert visible is not None  # asked for only then
        return create_block_mask(visible, None, None, q_len, kv_len, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        with _TRACER.free:
            mask = None if visible is None else mask_for(query.shape[2], key.shape[2], query.device)
            out, aux = run(
                query,
                key,
                value,
                block_mask=mask,
                scale=problem.scale,
                enable_gqa=query.shape[1] != key.shape[1],
                return_aux=AuxRequest(lse=True),
            )
        return out, aux.lse.to(torch.float32)

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = query.detach(), key.detach(), value.detach()
        finite = value.isfinite()
        if visible is None or bool(finite.all()):
            return attend(query, key, value)
        # A masked weight of 0 times NaN is NaN: attend to the finite values, then find who saw another.
        out, lse = attend(query, key, torch.where(finite, value, 0.0))
        seen, _ = attend(torch.zeros_like(query), torch.zeros_like(key), (~finite).to(value.dtype))
        return out.masked_fill(seen > 0, torch.nan), lse

    return Kernel(forward)


@cache
def _hear_torch_out() -> None:
    """Have torch say here, once a process and to nobody, that FlexAttention runs uncompiled: as it has to, on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        nothing = torch.zeros(1, 1, 16, 16, dtype=torch.float32, device="cpu")
        flex_attention(nothing, nothing, nothing)


def _visible(problem: Problem) -> Callable[..., Tensor] | None:
    """The mask function: `(batch, head, query, key) -> bool`, or None where every query sees every key."""
    pattern, is_causal = problem.pattern, problem.is_causal
    if isinstance(pattern, SlidingWindow):
        left, right = pattern.left, 0 if is_causal else pattern.right
        return lambda _b, _h, q, k: (k >= q - left) & (k <= q + right)
    return (lambda _b, _h, q, k: k <= q) if is_causal else None
