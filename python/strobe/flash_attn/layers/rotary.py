"""Rotary position embedding (Su et al., RoFormer, 2021) with the names of FlashAttention-2's ``flash_attn.layers.rotary``.

Plain torch operations: differentiable, on every device, in float32 inside.
"""

import torch
from torch import Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last axis becomes (-b, a). Pairs are halves apart, or neighbours if interleaved."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _both_halves(x: Tensor, interleaved: bool) -> Tensor:
    return x.repeat_interleave(2, dim=-1) if interleaved else torch.cat((x, x), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (..., D); cos, sin: broadcastable to (..., R / 2), R <= D; what lies past R stays."""
    rotary_dim = cos.shape[-1] * 2
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos: covers {rotary_dim} channels, but x has only {x.shape[-1]}")
    part = x[..., :rotary_dim].float()
    cos, sin = (_both_halves(t.float(), interleaved) for t in (cos, sin))
    rotated = (part * cos + rotate_half(part, interleaved) * sin).to(x.dtype)
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1) if rotary_dim < x.shape[-1] else rotated


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x: (B, S, H, D); cos, sin: (S, R / 2) or (B, S, R / 2)."""
    return _rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The row of cos and sin for each token: (S), (B, S), or (T) for sequences behind one another."""
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        return steps + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    tokens = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True).clamp_max_(cu_seqlens.numel() - 2)
    offsets = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return tokens - cu_seqlens[sequence] + offsets


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates queries or keys by their positions.

    Args:
        x: (B, S, H, D), or (T, H, D) with cu_seqlens.
        cos, sin: (positions, R / 2); the first R <= D channels are rotated.
        interleaved: pairs are neighbours (GPT-J) instead of halves apart (GPT-NeoX).
        inplace: write the result into x.
        seqlen_offsets: position of the first row, an int or (B).
        cu_seqlens: (B + 1) int32 prefix sums.
        max_seqlen: the longest sequence; not needed here.

    Returns:
        x rotated, in its dtype; x itself if inplace.

    Raises:
        ValueError: R > D.
        IndexError: a position behind the table.
    """
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    # Rows past a sequence's own table (padding behind the last sequence) are rotated by the last one.
    positions = positions.clamp_max(cos.shape[0] - 1) if cu_seqlens is not None else positions
    rotated = _rotate(x, cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2), interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """qkv with q and k rotated: (B, S, 3, H, D), or (B, S, H + 2 Hk, D) with num_heads_q = H. Other arguments and errors as
    ``apply_rotary_emb``; cos_k and sin_k are those of q if None."""
    cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
    if qkv.dim() == 5:
        q, k, rest = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2:]
        q, k = (
            apply_rotary_emb(x, c, s, interleaved, False, seqlen_offsets).unsqueeze(2)
            for x, c, s in ((q, cos, sin), (k, cos_k, sin_k))
        )
        return torch.cat((q, k, rest), dim=2)
    if num_heads_q is None:
        raise ValueError("num_heads_q: is not given; (B, S, H + 2 Hk, D) needs it")
    num_heads_k = (qkv.shape[2] - num_heads_q) // 2
    q, k, v = qkv.split((num_heads_q, num_heads_k, num_heads_k), dim=2)
    q = apply_rotary_emb(q, cos, sin, interleaved, False, seqlen_offsets)
    k = apply_rotary_emb(k, cos_k, sin_k, interleaved, False, seqlen_offsets)
    return torch.cat((q, k, v), dim=2)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """kv, (B, S, 2, Hk, D), with k rotated. Other arguments and errors as ``apply_rotary_emb``."""
    k = apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, False, seqlen_offsets)
    return torch.stack((k, kv[:, :, 1]), dim=2)


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with its table of cosines and sines, and xPos scaling (Sun et al., 2022) if scale_base is given.

    Args:
        dim: channels that are rotated.
        base: the wavelengths are 2 pi base^(2 i / dim).
        interleaved: pairs are neighbours instead of halves apart.
        scale_base: xPos's base; None for none.
        pos_idx_in_fp32: kept for the interface: positions are always float32 here.
    """

    def __init__(self, dim: int, base=10000.0, interleaved=False, scale_base=None, pos_idx_in_fp32=True, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-steps / dim), persistent=False)
        scale = None if scale_base is None else (steps + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._tables: tuple[Tensor, ...] = ()

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> None:
        current = self._tables[0] if self._tables else None
        if current is not None and seqlen <= self._seq_len_cached and current.device == device and current.dtype == dtype:
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freq.to(device=device, dtype=torch.float32))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._tables = (cos.to(dtype), sin.to(dtype), cos.to(dtype), sin.to(dtype))
            return
        power = (positions - seqlen // 2) / self.scale_base
        factor = self.scale.to(device) ** power[:, None]
        self._tables = tuple(t.to(dtype) for t in (cos * factor, sin * factor, cos / factor, sin / factor))

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ):
        """qkv: (B, S, 3, H, D) or (B, S, H + 2 Hk, D); or q: (B, S, H, D) with kv: (B, S, 2, Hk, D), returning both."""
        seqlen = max_seqlen
        if seqlen is None:
            seqlen = qkv.shape[1] + (int(seqlen_offset.max()) if isinstance(seqlen_offset, Tensor) else seqlen_offset)
        self._update_cos_sin_cache(seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._tables
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, False, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
