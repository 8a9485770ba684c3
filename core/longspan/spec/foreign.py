"""Arguments that a function does not have: other libraries' words for longspan's own, and misspelt ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from longspan.errors import ArgumentError, nearest

__all__ = ["UnknownArgument", "unknown_argument"]

RENAMED = {
    "alpha": "scale",
    "attention_dropout": "dropout_p",
    "attn_dropout": "dropout_p",
    "attn_implementation": "backend",
    "causal": "is_causal",
    "cu_seq_lens": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
    "cu_seqlens_kv": "cu_seqlens",
    "cu_seqlens_q": "cu_seqlens",
    "dropout": "dropout_p",
    "dropout_rate": "dropout_p",
    "gqa": "enable_gqa",
    "impl": "backend",
    "implementation": "backend",
    "kernel": "backend",
    "offset": "query_offset",
    "position_offset": "query_offset",
    "q_offset": "query_offset",
    "return_logsumexp": "return_lse",
    "return_softmax_lse": "return_lse",
    "scaling": "scale",
    "seed": "dropout_seed",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "start_pos": "query_offset",
}
"""Words that mean what one argument of longspan's does."""

_WINDOW = (
    "pattern=longspan.SlidingWindow(left, right)",
    "count the tokens before and after the query, its own key not among them",
)
_MASK = (
    "a pattern, is_causal or cu_seqlens: longspan takes no mask as a tensor",
    "is_causal=True for a triangle, cu_seqlens=(0, end_1, ...) for packed documents, longspan.SlidingWindow(left) for "
    "a band, longspan.BlockSparse for the rest",
)
_PADDING = (
    "cu_seqlens",
    "put the sequences one after the other and pass cu_seqlens=(0, end_1, end_2, ...); tokens after the last end are "
    "padding",
)
_SCORES = (
    "scores that are scaled and nothing else",
    "leave it out, or use torch's flex_attention for scores of your own",
)
_WEIGHTS = (
    "return_lse=True, as no weights are kept",
    "compute those you need as torch.exp(scale * query @ key.mT - lse[..., None])",
)
_LENGTHS = ("the boundaries alone", "leave it out: it follows from cu_seqlens")
_DILATED = ("pattern=longspan.Dilated(segment_lengths, dilation_rates)", "e.g. longspan.Dilated((2048, 4096), (1, 2))")
_ORDER = ("tensors of (batch, heads, seq, head_dim)", "pass a transposed view, x.transpose(1, 2), which costs nothing")

ALTERNATIVES = {
    "alibi_slopes": _SCORES,
    "attention_mask": _MASK,
    "attn_bias": _MASK,
    "attn_mask": _MASK,
    "bias": _MASK,
    "block_mask": (
        "pattern=longspan.from_block_mask(block_mask)",
        "pass pattern=longspan.from_block_mask(block_mask), which reads FlexAttention's BlockMask",
    ),
    "block_size": ("a pattern with blocks", "e.g. pattern=longspan.local_blocks(1024, block_size=128)"),
    "deterministic": ("torch's own switch", "torch.use_deterministic_algorithms(True)"),
    "dilated_ratio": _DILATED,
    "dilation": _DILATED,
    "dilation_rate": _DILATED,
    "dilation_rates": _DILATED,
    "input_layout": _ORDER,
    "key_padding_mask": _PADDING,
    "layout": _ORDER,
    "lengths": _PADDING,
    "local_window_size": _WINDOW,
    "logits_soft_cap": _SCORES,
    "mask": _MASK,
    "max_seqlen": _LENGTHS,
    "max_seqlen_k": _LENGTHS,
    "max_seqlen_q": _LENGTHS,
    "need_weights": _WEIGHTS,
    "output_attentions": _WEIGHTS,
    "padding_mask": _PADDING,
    "return_attn_probs": _WEIGHTS,
    "score_mod": _SCORES,
    "segment_length": _DILATED,
    "segment_lengths": _DILATED,
    "seqlens": _PADDING,
    "sliding_window": _WINDOW,
    "softcap": _SCORES,
    "src_key_padding_mask": _PADDING,
    "tensor_layout": _ORDER,
    "training": ("dropout_p", "pass dropout_p=0.0 where nothing is to be dropped"),
    "window": _WINDOW,
    "window_size": _WINDOW,
}
"""Words for which there is no one argument: what serves in their place, and what to do."""

FUNCTIONS = {
    **dict.fromkeys(
        ("pattern", "is_causal", "scale", "dropout_p", "enable_gqa", "cu_seqlens", "query_offset"),
        "longspan.Problem.like and longspan.attention",
    ),
    "backend": "longspan.plan, longspan.explain and longspan.attention",
    "device": "longspan.explain",
    "dropout_seed": "longspan.attention and of calling a plan",
    "pattern_cache": "longspan.plan",
    "return_lse": "longspan.attention",
}
"""Which functions have an argument of longspan's."""


class UnknownArgument(ArgumentError, TypeError):
    """An argument that the function does not have; the message has longspan's word for it."""


def unknown_argument(function: str, given: Mapping[str, object], own: Collection[str]) -> UnknownArgument:
    """What to raise where a function was given arguments that it does not have.

    Args:
        function: its name, as a user writes it.
        given: the arguments that it does not have; the first is answered.
        own: those that it has.
    """
    word, value = next(iter(given.items()))
    meant = word.lower()
    if meant not in {*own, *RENAMED, *ALTERNATIVES, *FUNCTIONS}:
        meant = nearest(meant, own) or nearest(meant, [*RENAMED, *ALTERNATIVES, *FUNCTIONS], 0.8)
    got = f"an argument that {function} does not have"
    if meant in ALTERNATIVES and meant not in own:
        return UnknownArgument(word, got, *ALTERNATIVES[meant])
    meant = RENAMED.get(meant, meant) if meant not in own else meant
    if meant in own:
        plain = isinstance(value, bool | int | float | str)
        return UnknownArgument(word, got, meant, f"pass {meant}={value!r}" if plain else f"pass {meant}=...")
    if meant in FUNCTIONS:
        return UnknownArgument(word, got, f"{meant} as an argument of {FUNCTIONS[meant]}", f"pass {meant} there")
    return UnknownArgument(word, got, f"one of {', '.join(own)}", "leave it out, or see help(longspan.attention)")
