"""``attn_implementation="strobe"`` for Hugging Face transformers: an attention function and the mask function it needs.

The mask function tells attention what is hidden by the cheapest description that is exact:
  None           nothing beyond what causality and the sliding window hide.
  int32 segments the rows of the batch behind one another as sequences (padding and packed sequences): no mask in memory, and
                 nothing is computed for padding.
  float (B, 1, Sq, Sk) 0 or -inf, for patterns that segments cannot say.
"""

from types import CodeType

import torch
from torch import Tensor

from .._attention import attention_with_options as attention

NAME = "strobe"

_CAUSAL, _SLIDING, _BIDIRECTIONAL = "causal", "sliding", "bidirectional"


# ---- segments ---------------------------------------------------------------------------------------------------------------
#
# An int32 tensor: cu_seqlens_q, cu_seqlens_k, and (N, then one filler) seqused_q, seqused_k, of N sequences that
# make up the B * Sq query and B * Sk key rows. Its shape is (1, 1, 4, N + 1), or (1, 4, 1, N + 1) where attention is bidirectional:
# transformers hands masks of four dimensions through, which generation with a static cache makes before the model's own call, and
# takes others for the padding of a batch.


def _segments(cu_q: Tensor, cu_k: Tensor, used_q: Tensor, used_k: Tensor, bidirectional: bool) -> Tensor:
    used_q, used_k = (torch.nn.functional.pad(x, (0, 1)) for x in (used_q, used_k))
    segments = torch.stack([x.to(torch.int32) for x in (cu_q, cu_k, used_q, used_k)])
    return segments[None, :, None] if bidirectional else segments[None, None]


def _is_segments(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32


def _are_causal(segments: Tensor) -> bool:
    return segments.shape[1] == 1


def _packed_segments(sequence_ids: Tensor) -> Tensor:
    """sequence_ids (B, S): a new number where a new sequence starts. No sequence spans two rows of the batch."""
    batch, seqlen = sequence_ids.shape
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    first = torch.nonzero(starts.flatten()).flatten()
    cu = torch.nn.functional.pad(first, (0, 1), value=batch * seqlen)
    return _segments(cu, cu, cu.diff(), cu.diff(), False)


def _padding_segments(tokens: Tensor, q_length: int, bidirectional: bool) -> Tensor | None:
    """Three segments per row: padding, tokens, padding. None where the tokens of a row are not contiguous, or where their
    queries cannot be aligned with them.

    tokens: bool (B, Sk), True on keys that take part.
    """
    batch, kv_length = tokens.shape
    count = tokens.sum(-1)
    start = tokens.int().argmax(-1)
    end = start + count
    columns = torch.arange(kv_length, device=tokens.device)
    contiguous = (tokens == ((columns >= start[:, None]) & (columns < end[:, None]))).all()
    rows_are_keys = q_length == kv_length and not bidirectional
    if not rows_are_keys and not bidirectional:
        # A block of queries at the end of the keys: its last row must be the last token.
        contiguous &= (end == kv_length).all()
    if not contiguous:
        return None

    def prefix_sums(first, second, length):
        base = torch.arange(batch, device=tokens.device) * length
        inner = torch.stack((base, base + first, base + second), dim=-1).flatten()
        return torch.nn.functional.pad(inner, (0, 1), value=batch * length)

    def middle(x):
        return torch.stack((torch.zeros_like(x), x, torch.zeros_like(x)), dim=-1).flatten()

    cu_k, used_k = prefix_sums(start, end, kv_length), middle(count)
    if rows_are_keys:
        return _segments(cu_k, cu_k, used_k, used_k, False)
    cu_q = prefix_sums(torch.zeros_like(start), torch.full_like(start, q_length), q_length)
    return _segments(cu_q, cu_k, middle(torch.full_like(count, q_length)), used_k, bidirectional)


# ---- the mask function ------------------------------------------------------------------------------------------------------


def _closure(function) -> dict:
    code: CodeType = function.__code__
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or ())}


def _parts(function, name: str) -> tuple | None:
    """The mask functions that `and_masks` joined in `function`, or None."""
    if getattr(function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    return _closure(function).get(name)


def _kind(mask_function) -> tuple[str | None, Tensor | None]:
    """(kind, sequence ids of a packed batch) of transformers' own mask functions; (None, None) of any other."""
    from transformers import masking_utils as masks

    if mask_function is masks.causal_mask_function:
        return _CAUSAL, None
    if mask_function is masks.bidirectional_mask_function:
        return _BIDIRECTIONAL, None
    parts = _parts(mask_function, "mask_functions")
    if parts is None or len(parts) != 2:
        return None, None
    names = [getattr(part, "__qualname__", "") for part in parts]
    if names[0] == "sliding_window_overlay.<locals>.inner_mask" and parts[1] is masks.causal_mask_function:
        return _SLIDING, None
    if names == [
        "packed_sequence_mask_function.<locals>.inner_mask",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
    ]:
        kind, nested = _kind(_closure(parts[1])["mask_function"])
        if kind in (_CAUSAL, _SLIDING) and nested is None:
            return kind, _closure(parts[0])["packed_sequence_mask"]
    return None, None


def _materialised(arguments: dict, dtype: torch.dtype) -> Tensor:
    """float (B, 1, Sq, Sk): 0 where attention looks, -inf elsewhere."""
    from transformers.masking_utils import sdpa_mask

    visible = sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=True,
    dtype=torch.float32,
    use_vmap=False,
    device="cpu",
    **kwargs,
) -> Tensor | None:
    """transformers' mask interface: what ``attention_mask`` becomes for ``attn_implementation="strobe"``."""
    from transformers.masking_utils import causal_mask_function, prepare_padding_mask
    from transformers.utils.import_utils import is_tracing

    mask_function = causal_mask_function if mask_function is None else mask_function
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip
    kind, sequence_ids = (None, None) if use_vmap else _kind(mask_function)
    # Queries end where the keys end, which is how strobe aligns them. Static caches are longer, or hold their length in a
    # tensor.
    aligned = kind == _BIDIRECTIONAL or (
        not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    )
    if kind is None or not aligned:
        return _materialised(arguments, dtype)
    tracing = is_tracing(attention_mask)
    if sequence_ids is not None:
        return _materialised(arguments, dtype) if tracing else _packed_segments(sequence_ids)
    if attention_mask is None:
        return None
    if tracing:
        return _materialised(arguments, dtype)
    tokens = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    if tokens.all():
        return None
    segments = _padding_segments(tokens, q_length, kind == _BIDIRECTIONAL)
    return _materialised(arguments, dtype) if segments is None else segments


# ---- the attention function -------------------------------------------------------------------------------------------------


def _visible_of(segments: Tensor, batch: int, rows_q: int, rows_k: int) -> Tensor:
    """bool (B, 1, Sq, Sk): which keys share a segment with a query, and count."""
    cu_q, cu_k, used_q, used_k = segments.view(4, -1)

    def numbers(cu, used, rows):
        places = torch.arange(batch * rows, device=cu.device, dtype=torch.int32)
        segment = torch.searchsorted(cu[1:].contiguous(), places, right=True)
        counts = places < cu[segment] + used[segment]
        return segment.view(batch, rows), counts.view(batch, rows)

    (segment_q, _), (segment_k, counts) = numbers(cu_q, used_q, rows_q), numbers(cu_k, used_k, rows_k)
    return ((segment_q[:, :, None] == segment_k[:, None, :]) & counts[:, None, :])[:, None]


def _bias_of(mask_4d: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask_4d is not None and mask_4d.dtype == torch.bool:
        mask_4d = torch.zeros(mask_4d.shape, dtype=dtype, device=mask_4d.device).masked_fill_(~mask_4d, -torch.inf)
    bias = mask_4d if position_bias is None else position_bias if mask_4d is None else position_bias + mask_4d
    if bias is None or bias.dtype in (torch.float32, dtype):
        return bias
    return bias.to(dtype)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cache=None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: (B, H, Sq, D); key, value: (B, Hk, Sk, D). Returns ((B, Sq, H, Dv), None)."""
    if s_aux is not None:
        raise NotImplementedError(
            'attn_implementation="strobe": attention sinks (s_aux) are not supported yet; use "eager" for this model'
        )
    if cache is not None:
        raise NotImplementedError('attn_implementation="strobe": paged caches are not supported; use "sdpa" for this model')
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, rows_q, rows_k = q.shape[0], q.shape[1], k.shape[1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "dropout_p": dropout}

    if position_bias is not None and _is_segments(attention_mask):
        visible = _visible_of(attention_mask, batch, rows_q, rows_k)
        hidden = torch.zeros(visible.shape, dtype=position_bias.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
        causal = is_causal and _are_causal(attention_mask)
        return attention(q, k, v, bias=position_bias + hidden, causal=causal, **options), None
    if attention_mask is not None and not _is_segments(attention_mask):
        bias = _bias_of(attention_mask[..., :rows_k], position_bias, q.dtype)
        return attention(q, k, v, bias=bias, **options), None

    causal = bool(is_causal) and (attention_mask is None or _are_causal(attention_mask))
    window = (sliding_window - 1, -1) if causal and sliding_window is not None else (-1, -1)
    options.update(causal=causal, window_size=window)
    if attention_mask is not None:
        cu_q, cu_k, used_q, used_k = attention_mask.view(4, -1)
        used_q, used_k = used_q[:-1], used_k[:-1]
        max_q, max_k = rows_q, rows_k
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        cu_q, cu_k, used_q, used_k = cu_seq_lens_q, cu_seq_lens_k, None, None
        max_q = batch * rows_q if max_length_q is None else int(max_length_q)
        max_k = batch * rows_k if max_length_k is None else int(max_length_k)
    else:
        bias = _bias_of(None, position_bias, q.dtype)
        return attention(q, k, v, bias=bias, **options), None
    out = attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q,
        max_seqlen_k=max_k, seqused_q=used_q, seqused_k=used_k, **options,
    )  # fmt: skip
    return out.unflatten(0, (batch, rows_q)), None


def transformers() -> str:
    """Registers ``attn_implementation="strobe"`` with transformers; calling it again does no harm.

        strobe.hooks.transformers()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="strobe")

    Padded batches (left or right), packed sequences, sliding windows, softcap, grouped heads, dropout and custom masks are
    served, in training and inference. Query rows of padding come out as 0. Attention weights are not returned.

    Returns:
        The name, "strobe".

    Raises:
        ImportError: transformers is not installed, or older than its attention and mask interfaces (4.53).
        NotImplementedError: later, by a model that has attention sinks.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as e:
        raise ImportError(f"strobe.hooks.transformers: needs transformers >= 4.53 with its attention interfaces: {e}") from e
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
