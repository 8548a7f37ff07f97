"""FlashAttention-2's algorithm in Triton, as a peer that is compiled from Python: forward, and a backward in two passes.

Tensors are dense (B, S, H, D) with one number of heads, S a multiple of 128, D a power of two. The log-sum-exp is kept in base 2.
"""

import torch
import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634


@triton.jit
def _forward_step(acc, row_sum, row_max, q, k_ptr, v_ptr, row_stride, rows, start, factor, MASKED: tl.constexpr, BN: tl.constexpr):
    """One block of keys under the online softmax."""
    cols = start + tl.arange(0, BN)
    k = tl.load(k_ptr + start * row_stride)
    s = tl.dot(q, k)
    if MASKED:
        s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
    p = tl.exp2(s * factor - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    v = tl.load(v_ptr + start * row_stride)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
    return acc, row_sum, new_max


@triton.jit
def _forward_kernel(
    Q, K, V, O, L, factor, seqlen, heads, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    block = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)  # longest rows first
    head = tl.program_id(1)
    row_stride = heads * D
    base = (head // heads).to(tl.int64) * seqlen * row_stride + (head % heads) * D
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    q = tl.load(Q + base + rows[:, None] * row_stride + dims[None, :])
    k_ptr = K + base + tl.arange(0, BN)[None, :] * row_stride + dims[:, None]
    v_ptr = V + base + tl.arange(0, BN)[:, None] * row_stride + dims[None, :]
    acc = tl.zeros((BM, D), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    unmasked = block * BM if CAUSAL else seqlen
    for start in range(0, unmasked, BN):
        acc, row_sum, row_max = _forward_step(acc, row_sum, row_max, q, k_ptr, v_ptr, row_stride, rows, start, factor, False, BN)
    if CAUSAL:
        for start in range(unmasked, unmasked + BM, BN):
            acc, row_sum, row_max = _forward_step(acc, row_sum, row_max, q, k_ptr, v_ptr, row_stride, rows, start, factor, True, BN)
    out = acc / row_sum[:, None]
    tl.store(O + base + rows[:, None] * row_stride + dims[None, :], out.to(O.dtype.element_ty))
    tl.store(L + head.to(tl.int64) * seqlen + rows, row_max + tl.log2(row_sum))


@triton.jit
def _delta_kernel(O, dO, Delta, seqlen, heads, D: tl.constexpr, BM: tl.constexpr):
    """rowsum(dO * O)"""
    head = tl.program_id(1)
    row_stride = heads * D
    base = (head // heads).to(tl.int64) * seqlen * row_stride + (head % heads) * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    where = base + rows[:, None] * row_stride + tl.arange(0, D)[None, :]
    product = tl.load(O + where).to(tl.float32) * tl.load(dO + where).to(tl.float32)
    tl.store(Delta + head.to(tl.int64) * seqlen + rows, tl.sum(product, 1))


@triton.jit
def _key_step(dk, dv, k, v, q_ptr, do_ptr, L, Delta, row_stride, cols, start, factor, MASKED: tl.constexpr, BM: tl.constexpr):
    """One block of queries; everything transposed, so that dK and dV take their left operand from registers."""
    rows = start + tl.arange(0, BM)
    q_t = tl.load(q_ptr + start * row_stride)
    p_t = tl.exp2(tl.dot(k, q_t) * factor - tl.load(L + rows)[None, :])
    if MASKED:
        p_t = tl.where(rows[None, :] >= cols[:, None], p_t, 0.0)
    do = tl.load(do_ptr + start * row_stride)
    dv = tl.dot(p_t.to(do.dtype), do, dv)
    ds_t = p_t * (tl.dot(v, tl.trans(do)) - tl.load(Delta + rows)[None, :])
    dk = tl.dot(ds_t.to(q_t.dtype), tl.trans(q_t), dk)
    return dk, dv


@triton.jit
def _key_kernel(
    Q, K, V, dO, dK, dV, L, Delta, factor, scale, seqlen, heads, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys."""
    head = tl.program_id(1)
    row_stride = heads * D
    base = (head // heads).to(tl.int64) * seqlen * row_stride + (head % heads) * D
    first = tl.program_id(0) * BN
    cols = first + tl.arange(0, BN)
    dims = tl.arange(0, D)
    where = base + cols[:, None] * row_stride + dims[None, :]
    k = tl.load(K + where)
    v = tl.load(V + where)
    q_ptr = Q + base + tl.arange(0, BM)[None, :] * row_stride + dims[:, None]
    do_ptr = dO + base + tl.arange(0, BM)[:, None] * row_stride + dims[None, :]
    L += head.to(tl.int64) * seqlen
    Delta += head.to(tl.int64) * seqlen
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    unmasked = 0
    if CAUSAL:
        unmasked = first + BN
        for start in range(first, unmasked, BM):
            dk, dv = _key_step(dk, dv, k, v, q_ptr, do_ptr, L, Delta, row_stride, cols, start, factor, True, BM)
    for start in range(unmasked, seqlen, BM):
        dk, dv = _key_step(dk, dv, k, v, q_ptr, do_ptr, L, Delta, row_stride, cols, start, factor, False, BM)
    tl.store(dK + where, (dk * scale).to(dK.dtype.element_ty))
    tl.store(dV + where, dv.to(dV.dtype.element_ty))


@triton.jit
def _query_step(dq, q, do, lse, delta, k_ptr, v_ptr, row_stride, rows, start, factor, MASKED: tl.constexpr, BN: tl.constexpr):
    cols = start + tl.arange(0, BN)
    k_t = tl.load(k_ptr + start * row_stride)
    p = tl.exp2(tl.dot(q, k_t) * factor - lse[:, None])
    if MASKED:
        p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
    ds = p * (tl.dot(do, tl.load(v_ptr + start * row_stride)) - delta[:, None])
    return tl.dot(ds.to(k_t.dtype), tl.trans(k_t), dq)


@triton.jit
def _query_kernel(
    Q, K, V, dO, dQ, L, Delta, factor, scale, seqlen, heads, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries."""
    block = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1)
    row_stride = heads * D
    base = (head // heads).to(tl.int64) * seqlen * row_stride + (head % heads) * D
    rows = block * BM + tl.arange(0, BM)
    dims = tl.arange(0, D)
    where = base + rows[:, None] * row_stride + dims[None, :]
    q = tl.load(Q + where)
    do = tl.load(dO + where)
    lse = tl.load(L + head.to(tl.int64) * seqlen + rows)
    delta = tl.load(Delta + head.to(tl.int64) * seqlen + rows)
    transposed = tl.arange(0, BN)[None, :] * row_stride + dims[:, None]
    k_ptr = K + base + transposed
    v_ptr = V + base + transposed
    dq = tl.zeros((BM, D), tl.float32)
    unmasked = block * BM if CAUSAL else seqlen
    for start in range(0, unmasked, BN):
        dq = _query_step(dq, q, do, lse, delta, k_ptr, v_ptr, row_stride, rows, start, factor, False, BN)
    if CAUSAL:
        for start in range(unmasked, unmasked + BM, BN):
            dq = _query_step(dq, q, do, lse, delta, k_ptr, v_ptr, row_stride, rows, start, factor, True, BN)
    tl.store(dQ + where, (dq * scale).to(dQ.dtype.element_ty))


# By head dim: (BM, BN, warps, stages). Accumulators of 128 x D fit the registers of 4 or 8 warps.
_FORWARD = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)}
_KEYS = {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)}
_QUERIES = {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        batch, seqlen, heads, dim = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, seqlen, dtype=torch.float32, device=q.device)
        bm, bn, warps, stages = _FORWARD[dim]
        _forward_kernel[(seqlen // bm, batch * heads)](
            q, k, v, out, lse, dim**-0.5 * _LOG2_E, seqlen, heads, causal, dim, bm, bn, num_warps=warps, num_stages=stages
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        batch, seqlen, heads, dim = q.shape
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        delta = torch.empty_like(lse)
        scale = dim**-0.5
        common = (scale * _LOG2_E, scale, seqlen, heads, ctx.causal, dim)
        _delta_kernel[(seqlen // 64, batch * heads)](out, dout, delta, seqlen, heads, dim, 64)
        bm, bn, warps, stages = _KEYS[dim]
        _key_kernel[(seqlen // bn, batch * heads)](
            q, k, v, dout, dk, dv, lse, delta, *common, bm, bn, num_warps=warps, num_stages=stages
        )
        bm, bn, warps, stages = _QUERIES[dim]
        _query_kernel[(seqlen // bm, batch * heads)](
            q, k, v, dout, dq, lse, delta, *common, bm, bn, num_warps=warps, num_stages=stages
        )
        return dq, dk, dv, None


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """q, k, v: dense (B, S, H, D), S a multiple of 128, D 64, 128 or 256. Returns (B, S, H, D)."""
    if q.shape != k.shape or q.shape[1] % 128 or q.shape[-1] not in _FORWARD:
        raise ValueError(f"q: shape {tuple(q.shape)} beside k {tuple(k.shape)} is not one that this kernel takes")
    return _Attention.apply(q, k, v, causal)
