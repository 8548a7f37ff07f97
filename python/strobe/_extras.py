"""The functions beside ``strobe.attention``: a swap for torch's SDPA, gradients into given buffers, merging, dropout masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, _ops
from ._attention import _as_rng_state, _four_dimensional, _max_seqlen, _positions, attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, computed by strobe.

    Args:
        query, key, value: (B, H, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv), or without B; float32, bfloat16 or float16, any
            strides.
        attn_mask: broadcastable to (B, H, Sq, Sk); bool (True takes part), or float32 or the dtype of query, which is added.
        dropout_p: probability of dropping an attention weight, in steps of 2^-16.
        is_causal: query i sees keys j <= i (top-left alignment, as in torch); excludes attn_mask.
        scale: factor on query @ key^T; 1 / sqrt(D) if None.
        enable_gqa: allow Hk < H.

    Returns:
        (B, H, Sq, Dv), a transposed view of strobe's (B, Sq, H, Dv).

    Raises:
        ValueError, RuntimeError: as ``strobe.attention``; ValueError also for is_causal beside attn_mask, and for Hk < H
            without enable_gqa.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: is given beside is_causal; give one of them")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != query.dim() or x.dim() not in (3, 4):
            like = "" if x is query else f", query has {query.dim()}"
            raise ValueError(f"{name}: has {x.dim()} dimensions{like}; it must be (B, H, S, D) or (H, S, D)")
    batched = query.dim() == 4
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(f"key: has {key.shape[1]} heads, query has {query.shape[1]}; set enable_gqa for grouped heads")
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        if not batched and bias.dim() == 3:
            bias = bias.unsqueeze(0)
    out = attention(
        *(_unit_stride(x.transpose(1, 2)) for x in (query, key, value)),
        softmax_scale=scale,
        causal=is_causal,
        positions=(0, 0) if is_causal and query.shape[2] != key.shape[2] else None,
        bias=bias,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    return out if batched else out.squeeze(0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None = None,
    accumulate: bool = False,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | tuple[int, int] | None = None,
    positions: tuple[int, int] | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> None:
    """The backward of ``strobe.attention`` into buffers of the caller, for code that does its own differentiation.

    ``out`` and ``lse`` may be those of the whole sequence while k and v are a block of it (ring attention).

    Args:
        dout: the gradient of out, shape of out, dtype of q.
        q, k, v: the forward's: (B, Sq, H, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv), or varlen.
        out: (B, Sq, H, Dv) or (Tq, H, Dv), float32 or the dtype of q.
        lse: (B, H, Sq) or (H, Tq), float32, natural log, -inf on a row that sees no key.
        dlse: the gradient of lse, shape of lse, float32; zero if None.
        dq, dk, dv: written; shapes of q, k, v; the dtype of q, or float32 (all three alike).
        dbias: written if given; shape of bias.
        accumulate: add to dq, dk and dv, which are float32 then.
        others: as ``strobe.attention``; dropout needs the forward's rng_state.

    Raises:
        ValueError, RuntimeError: as ``strobe.attention``; ValueError also for buffers that overlap.

    The algorithm is FlashAttention-2's (Dao, 2023): probabilities are computed again from lse.
    """
    _ops.attention_backward_into(
        dq, dk, dv, dbias, accumulate, dout, dlse, q, k, v, out, lse, softmax_scale, causal, *window_size, softcap,
        None if bias is None else _four_dimensional(bias), alibi_slopes, cu_seqlens_q, cu_seqlens_k,
        _max_seqlen("q", cu_seqlens_q, max_seqlen_q), _max_seqlen("k", cu_seqlens_k, max_seqlen_k), seqused_q, seqused_k,
        dropout_p, None if rng_state is None else _as_rng_state(rng_state), *_positions(positions), deterministic,
        _native.implementation_index(implementation),
    )  # fmt: skip


def merge(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the result over each: out = sum_i exp(lse_i - lse) out_i, where
    exp(lse) = sum_i exp(lse_i) (Rabe, Staats, "Self-attention Does Not Need O(n^2) Memory", 2021).

    Args:
        outs: N tensors (B, Sq, H, Dv) or (Tq, H, Dv) of one shape and dtype, or one with a leading axis of N. float32 keeps
            the rounding of the parts out of the result (``out_dtype=torch.float32``).
        lses: N tensors (B, H, Sq) or (H, Tq), float32, or one with a leading axis of N.

    Returns:
        (out, lse) of the shape and dtype of one part. Not differentiable: the backward of each part takes the merged
        out and lse.

    Raises:
        ValueError: shapes, dtypes or numbers of parts that do not fit.
    """
    stacked = [x if isinstance(x, Tensor) else torch.stack(list(x)) for x in (outs, lses)]
    return _ops.lse_merge(*stacked)


def dropout_mask(
    rng_state: Tensor | tuple[int, int],
    dropout_p: float,
    shape: tuple[int, int, int, int],
    device: Any = "cpu",
) -> Tensor:
    """The dropout mask of a call: bool (B, H, Sq, Sk), True where the attention weight is kept.

    Args:
        rng_state: (seed, offset) as two ints or the (2) int64 tensor that the call returned.
        dropout_p: the call's.
        shape: (B, H, Sq, Sk); of a varlen call the maximal lengths.
        device: where to compute it. Philox4x32-7 (Salmon et al., SC 2011) gives the same bits everywhere.

    Raises:
        ValueError: a dropout_p outside [0, 1), or a rng_state of another shape or dtype.
    """
    keep = torch.empty(tuple(shape), dtype=torch.uint8, device=device)
    _ops.dropout_mask_into(keep, _as_rng_state(rng_state).cpu(), dropout_p)
    return keep.view(torch.bool)
