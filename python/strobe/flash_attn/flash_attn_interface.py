"""The functions of FlashAttention-2 (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
2023): same names, arguments, defaults and results, computed by strobe.

Common arguments:
    q, k, v: float32, bfloat16 or float16, all alike, on one device, CPU or CUDA; any strides.
    cu_seqlens: (B + 1) int32 prefix sums of the sequence lengths in rows, starting with 0, on the device of q.
    max_seqlen: the longest sequence, in rows.
    dropout_p: probability of dropping an attention weight, in steps of 2^-16.
    softmax_scale: factor on q @ k^T; 1 / sqrt(D) if None.
    causal: query i sees keys j <= i + Sk - Sq (aligned bottom-right); with ``window_size`` the right side becomes 0.
    window_size: (left, right) in keys, both included, -1 for no bound; two ints or a tensor of two elements.
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, 2024); 0.0 for none.
    alibi_slopes: (H) or (B, H) float32 (Press et al., ALiBi, 2022); no gradient.
    deterministic: the backward gives the same bits each time.
    return_attn_probs: return (out, softmax_lse, S_dmask). softmax_lse is float32, natural log, (B, H, Sq), varlen (H, Tq), +inf on
        a row that sees no key. S_dmask, for tests only, is (B, H, Sq, Sk) with the lengths rounded up to 128:
        exp(score - row maximum), negative where dropped; empty without dropout.
Every function raises what ``strobe.attention`` raises: ValueError with the argument's name, RuntimeError where no implementation
serves the call; and NotImplementedError for block_table, leftpad_k.
"""

import torch
from torch import Tensor

from .. import _extras
from .._attention import attention_with_options as attention
from .._attention import new_rng_state
from . import _debug


def __getattr__(name: str):
    if name == "flash_attn_with_kvcache":
        raise AttributeError(
            "strobe has no flash_attn_with_kvcache yet: decoding from a KV cache is not supported; call flash_attn_func on the "
            "whole cache, with strobe.attention(..., seqused_k=...) where the lengths differ"
        )
    raise AttributeError(f"module 'flash_attn' has no attribute {name!r}")


def _get_block_size_n(device, head_dim, is_dropout, is_causal):
    """Keys that share one maximum in S_dmask: here all of them."""
    return 1 << 30


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    return (x + m - 1) // m * m


def _bound(width, seqlen_k: int) -> int:
    """A window bound as strobe takes it: what reaches past every key is none."""
    width = int(width)
    return -1 if width < 0 or width >= seqlen_k else width


def _mask_arguments(causal: bool, window_size, rows_k: int, rows_q: int) -> dict:
    left, right = window_size
    reach = max(int(rows_k), int(rows_q))
    return {"causal": causal, "window_size": (_bound(left, reach), -1 if causal else _bound(right, reach))}


def _options(rows_q, rows_k, softmax_scale, causal, window_size, softcap, alibi_slopes, **others) -> dict:
    """The keyword arguments of ``strobe.attention`` for a call with so many rows."""
    mask = _mask_arguments(causal, window_size, rows_k, rows_q)
    return {"softmax_scale": softmax_scale, **mask, "softcap": softcap, "alibi_slopes": alibi_slopes, **others}


def _varlen_options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *common, **others) -> dict:
    rows_q, rows_k = int(max_seqlen_q), int(max_seqlen_k)
    sequences = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": rows_q, "max_seqlen_k": rows_k}
    return _options(rows_q, rows_k, *common, **sequences, **others)


def _infinite_where_empty(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def _minus_infinite_where_empty(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def _no_paging(block_table) -> None:
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not supported; pass them in one piece")


def _call(q, k, v, return_attn_probs, dropout_p, options):
    """One public call: out, or (out, softmax_lse, S_dmask)."""
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    slopes = options["alibi_slopes"]
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        options["alibi_slopes"] = slopes.detach()
    if not return_attn_probs:
        return attention(q, k, v, dropout_p=dropout_p, **options)
    out, lse, rng_state = attention(q, k, v, dropout_p=dropout_p, return_lse=True, return_rng_state=True, **options)
    return out, _infinite_where_empty(lse), _debug.s_dmask(q, k, dropout_p, rng_state, options)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of dense batches, differentiable in q, k and v.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hk, D), Hk dividing H.
        others, errors: as at the head of this module.

    Returns:
        out (B, Sq, H, D); with ``return_attn_probs`` (out, softmax_lse, S_dmask).
    """
    options = _options(
        q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic=deterministic
    )
    return _call(q, k, v, return_attn_probs, dropout_p, options)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """``flash_attn_func`` with kv: (B, Sk, 2, Hk, D)."""
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """``flash_attn_func`` with qkv: (B, S, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention over sequences behind one another, differentiable in q, k and v.

    Args:
        q: (Tq, H, D).
        k, v: (Tk, Hk, D), Hk dividing H.
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], possibly none.
        max_seqlen_q, max_seqlen_k: the longest sequence of each.
        others, errors: as at the head of this module.

    Returns:
        out (Tq, H, D); with ``return_attn_probs`` (out, softmax_lse, S_dmask).
    """
    _no_paging(block_table)
    options = _varlen_options(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic=deterministic,
    )  # fmt: skip
    return _call(q, k, v, return_attn_probs, dropout_p, options)


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """``flash_attn_varlen_func`` with kv: (Tk, 2, Hk, D)."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """``flash_attn_varlen_func`` with qkv: (T, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# ---- the functions below autograd, which context-parallel and ring-attention packages call by keyword -----------------------


@torch.no_grad()
def _forward(q, k, v, dropout_p, return_softmax, options):
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))
    rng_state = new_rng_state() if dropout_p > 0 else torch.zeros(2, dtype=torch.int64, device="cpu")
    out, lse = attention(q, k, v, dropout_p=dropout_p, rng_state=rng_state, return_lse=True, **options)
    s_dmask = _debug.s_dmask(q, k, dropout_p, rng_state, options) if return_softmax else q.new_empty((0,))
    return out, _infinite_where_empty(lse), s_dmask, rng_state


@torch.no_grad()
def _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, rng_state, options):
    dout, q, k, v, out = (maybe_contiguous(x) for x in (dout, q, k, v, out))
    if dropout_p > 0 and rng_state is None:
        raise ValueError("rng_state: is not given, but dropout_p is not 0; it is what the forward returned")
    _extras.attention_backward(
        dout, q, k, v, out, _minus_infinite_where_empty(softmax_lse), dq=dq, dk=dk, dv=dv, dropout_p=dropout_p,
        rng_state=None if rng_state is None else rng_state.cpu(), **options,
    )  # fmt: skip
    delta = (dout.float() * out.float()).sum(-1)
    return delta.transpose(-1, -2).contiguous()


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) without autograd; rng_state is (2) int64 on the CPU, zero without dropout."""
    window_size = (window_size_left, window_size_right)
    options = _options(q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _forward(q, k, v, dropout_p, return_softmax, options)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), (B, H, Sq) float32."""
    window_size = (window_size_left, window_size_right)
    options = _options(
        q.shape[1], k.shape[1], softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic=deterministic
    )
    return _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, rng_state, options)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``_flash_attn_forward`` for sequences behind one another; softmax_lse is (H, Tq)."""
    _no_paging(block_table)
    if leftpad_k is not None:
        raise NotImplementedError("leftpad_k: left-padded keys are not supported; start each sequence at its first key")
    window_size = (window_size_left, window_size_right)
    options = _varlen_options(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, alibi_slopes,
        seqused_k=seqused_k,
    )  # fmt: skip
    return _forward(q, k, v, dropout_p, return_softmax, options)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Writes dq, dk and dv; returns rowsum(dout * out), (H, Tq) float32."""
    window_size = (window_size_left, window_size_right)
    options = _varlen_options(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic=deterministic,
    )  # fmt: skip
    return _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, rng_state, options)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
