"""S_dmask: the score matrix with the dropout decisions in its signs, which FlashAttention-2's tests ask for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._extras import dropout_mask


def _hidden(rows: int, cols: int, causal: bool, window_size: tuple[int, int], device) -> Tensor:
    """bool (rows, cols), True where the mask hides the key; bottom-right alignment."""
    left, right = window_size
    distance = torch.arange(cols, device=device) - (torch.arange(rows, device=device)[:, None] + cols - rows)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if causal or right >= 0:
        hidden |= distance > max(right, 0)
    return hidden


def _unnormalised(q: Tensor, k: Tensor, slopes: Tensor | None, options: dict) -> Tensor:
    """exp(score - row maximum) of one batch of sequences, 0 where hidden: (B, H, Sq, Sk) float32."""
    rows, cols, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    scale = options["softmax_scale"]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * (head_dim**-0.5 if scale is None else scale)
    if softcap := options["softcap"]:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        distance = torch.arange(cols, device=q.device) - (torch.arange(rows, device=q.device)[:, None] + cols - rows)
        scores = scores - slopes.view(-1, q.shape[2], 1, 1) * distance.abs()
    scores = scores.masked_fill(_hidden(rows, cols, options["causal"], options["window_size"], q.device), -torch.inf)
    maximum = scores.amax(-1, keepdim=True).masked_fill_(scores.isneginf().all(-1, keepdim=True), 0.0)
    return torch.exp(scores - maximum)


def _sequences(q: Tensor, k: Tensor, options: dict):
    """(batch index, q, k) of each sequence of a varlen batch, with a batch axis of one."""
    cu_q, cu_k = (options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    used = options.get("seqused_k")
    for b in range(len(cu_q) - 1):
        end = cu_k[b + 1] if used is None else cu_k[b] + int(used[b])
        yield b, q[cu_q[b] : cu_q[b + 1]].unsqueeze(0), k[cu_k[b] : end].unsqueeze(0)


@torch.no_grad()
def s_dmask(q: Tensor, k: Tensor, dropout_p: float, rng_state: Tensor | None, options: dict) -> Tensor:
    """(B, H, Sq, Sk) with the lengths rounded up to 128, in the dtype of q; empty without dropout."""
    if dropout_p == 0.0:
        return q.new_empty((0,))
    slopes = options["alibi_slopes"]
    if options.get("cu_seqlens_q") is None:
        weights = _unnormalised(q, k, slopes, options)
    else:
        batch = options["cu_seqlens_q"].numel() - 1
        weights = q.new_zeros((batch, q.shape[1], options["max_seqlen_q"], options["max_seqlen_k"]), dtype=torch.float32)
        for b, one_q, one_k in _sequences(q, k, options):
            if one_q.shape[1] and one_k.shape[1]:
                one_slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
                weights[b, :, : one_q.shape[1], : one_k.shape[1]] = _unnormalised(one_q, one_k, one_slopes, options)[0]
    keep = dropout_mask(rng_state, dropout_p, tuple(weights.shape), q.device)
    # A weight that underflows keeps its sign as the smallest number there is.
    visible = weights.to(q.dtype).clamp_min(torch.finfo(q.dtype).smallest_normal * torch.finfo(q.dtype).eps)
    signed = torch.where(keep, visible, -visible)
    rows, cols = signed.shape[-2:]
    return F.pad(signed, (0, -cols % 128, 0, -rows % 128))
