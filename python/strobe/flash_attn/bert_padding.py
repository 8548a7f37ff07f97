"""Between padded batches and sequences behind one another: FlashAttention-2's ``flash_attn.bert_padding``."""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices] along the first axis: (N, ...) and (M) to (M, ...)."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) that holds `values` (M, ...) at `indices` (M), zero elsewhere."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(x[indices], x), the second for a residual connection."""
    return index_first_axis(x, indices), x.detach()


def _prefix_sums(lengths: Tensor) -> Tensor:
    return F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drops the padding.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), 1 or True on tokens.
        unused_mask: (B, S), 1 on tokens that are allocated but take no part.

    Returns:
        hidden_states (T, ...) of all allocated tokens; their indices (T) into B * S; cu_seqlens (B + 1) int32; the longest
        sequence; seqused (B) int32, the tokens of each sequence that take part.
    """
    allocated = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = allocated.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(allocated.flatten(), as_tuple=False).flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _prefix_sums(lengths), longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As ``unpad_input`` where each row holds several sequences: attention_mask_in_length (B, S) lists their lengths, then 0."""
    per_row = attention_mask_in_length.sum(dim=-1)
    seqlen = attention_mask_in_length.shape[-1]
    tokens = torch.arange(seqlen, device=per_row.device) < per_row[:, None]
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths > 0]
    indices = torch.nonzero(tokens.flatten(), as_tuple=False).flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _prefix_sums(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: (T, ...) to (batch, seqlen, ...), zero on padding."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
