"""FlashAttention-3's Python interface (its ``flash_attn_interface`` module; Shah et al., "FlashAttention-3: Fast and Accurate
Attention with Asynchrony and Low-precision", 2024) on strobe.

``strobe.install_as("flash_attn_interface")`` puts it where packages that look for FlashAttention-3 find it. Mind the order of
arguments: the fourth is the scale, not dropout, which FlashAttention-3 does not have. num_splits, pack_gqa and sm_margin are
hints to its scheduler and have no effect here. The log-sum-exp is float32, natural log, -inf on a row that sees no key.

Arguments and errors are those of ``strobe.flash_attn.flash_attn_interface``; qv, the descales, attention_chunk and everything of a
KV cache raise NotImplementedError.
"""

import torch
from torch import Tensor

from . import _extras
from ._attention import attention_with_options as attention
from .flash_attn.flash_attn_interface import _mask_arguments, _options, _varlen_options, maybe_contiguous


def __getattr__(name: str):
    if name in ("flash_attn_with_kvcache", "get_scheduler_metadata"):
        raise AttributeError(f"strobe has no {name} yet: decoding from a KV cache is not supported")
    raise AttributeError(f"module 'flash_attn_interface' has no attribute {name!r}")


def _refuse(**given) -> None:
    for name, value in given.items():
        if value is not None and not (isinstance(value, int) and value == 0):
            raise NotImplementedError(f"{name}: is not supported by strobe; leave it at its default")


def _call(q, k, v, return_attn_probs, options):
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    return attention(q, k, v, return_lse=return_attn_probs, **options)


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of dense batches, differentiable in q, k and v.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), Hk dividing H.
        v: (B, Sk, Hk, Dv).
        others, errors: as at the head of this module.

    Returns:
        out (B, Sq, H, Dv); with ``return_attn_probs`` (out, softmax_lse (B, H, Sq)).
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    options = _options(q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, None, deterministic=deterministic)
    return _call(q, k, v, return_attn_probs, options)


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """``flash_attn_func`` with qkv: (B, S, 3, H, D), or (B, S, H + 2 Hk, D) with num_heads_q = H."""
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    elif num_heads_q is None:
        raise ValueError("num_heads_q: is not given; (B, S, H + 2 Hk, D) needs it")
    else:
        num_heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, num_heads_k, num_heads_k), dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention over sequences behind one another, differentiable in q, k and v.

    Args:
        q: (Tq, H, D).
        k: (Tk, Hk, D), Hk dividing H.
        v: (Tk, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], possibly none.
        max_seqlen_q, max_seqlen_k: the longest sequence of each.
        seqused_q, seqused_k: (B) int32, how many rows of each sequence count.
        others, errors: as at the head of this module.

    Returns:
        out (Tq, H, Dv); with ``return_attn_probs`` (out, softmax_lse (H, Tq)).
    """
    _refuse(qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    options = _varlen_options(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, None,
        deterministic=deterministic, seqused_q=seqused_q, seqused_k=seqused_k,
    )  # fmt: skip
    return _call(q, k, v, return_attn_probs, options)


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Merges N splits over keys, as ``strobe.merge``; not differentiable.

    Args:
        out_partial: (N, B, S, H, D) or (N, T, H, D), float32.
        lse_partial: (N, B, S, H) or (N, T, H), float32.
        out: written if given.
        out_dtype: float32 if None.

    Returns:
        (out, lse) without N.

    Raises:
        ValueError: shapes, dtypes or numbers of splits that do not fit.
    """
    merged, lse = _extras.merge(out_partial, lse_partial.transpose(-1, -2).contiguous())
    merged = merged if out_dtype is None else merged.to(out_dtype)
    lse = lse.transpose(-1, -2)
    return (merged if out is None else out.copy_(merged)), lse


def _any_layout(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size, **others) -> dict:
    """The keyword arguments of a call whose q and k may each be dense or varlen."""
    rows_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    rows_k = k.shape[1] if cu_seqlens_k is None else max_seqlen_k
    sequences = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k,
    }  # fmt: skip
    return {**_mask_arguments(causal, window_size, rows_k, rows_q), **sequences, **others}


@torch.no_grad()
def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, out_accum, softmax_lse_accum) below autograd; the last two are empty."""
    _refuse(
        k_new=k_new, v_new=v_new, qv=qv, cu_seqlens_k_new=cu_seqlens_k_new, page_table=page_table, kv_batch_idx=kv_batch_idx,
        leftpad_k=leftpad_k, rotary_cos=rotary_cos, rotary_sin=rotary_sin, seqlens_rotary=seqlens_rotary,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
    )  # fmt: skip
    options = _any_layout(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale=softmax_scale,
        softcap=softcap, seqused_q=seqused_q, seqused_k=seqused_k,
    )  # fmt: skip
    result, lse = attention(*(maybe_contiguous(x) for x in (q, k, v)), return_lse=True, **options)
    if out is not None:
        result = out.copy_(result)
    return result, lse, lse.new_empty((0,)), lse.new_empty((0,))


@torch.no_grad()
def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, rowsum(dout * out)), into the given buffers if there are any."""
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty_like(x) if d is None else d for d, x in ((dq, q), (dk, k), (dv, v)))
    options = _any_layout(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size, softmax_scale=softmax_scale,
        softcap=softcap, seqused_q=sequed_q, seqused_k=sequed_k, deterministic=deterministic,
    )  # fmt: skip
    _extras.attention_backward(dout, q, k, v, out, softmax_lse, dq=dq, dk=dk, dv=dv, **options)
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()
    return dq, dk, dv, delta
