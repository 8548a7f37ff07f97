"""torch's own flash-attention operators, computed by strobe: what ``scaled_dot_product_attention`` runs on.

Overrides the CUDA kernels of aten::_scaled_dot_product_flash_attention and aten::_flash_attention with their backwards, and
the CPU kernels of aten::_scaled_dot_product_flash_attention_for_cpu, for as long as a handle lives. Results have the memory
layouts that torch's own kernels give and its compiler counts on.

The operators that SDPA itself calls on CUDA are in C++ (python/src/sdpa_ops.cpp).
"""

import ctypes
import functools
import warnings

import torch
from torch import Tensor

from .. import _native, _ops
from .._attention import _four_dimensional, new_rng_state

NAME = "strobe"
# Operators without the Python frame of OpOverload.__call__.
_attention_into = _ops.attention_into._op
_attention_backward_into = _ops.attention_backward_into._op
_attention_plain_lse = _ops.attention_plain_lse._op


def _rows_by_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, S, D) as (B, S, H, D) with unit stride over D."""
    return tuple((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors)


def _dense_like(x: Tensor) -> Tensor:
    """empty_like, but with unit stride over the last axis."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _state_for(dropout_p: float) -> Tensor | None:
    return new_rng_state() if dropout_p > 0.0 else None


def _returned_state(state: Tensor | None, device) -> Tensor:
    """(2) uint64 on the call's device, as torch's own kernels return it: anything without dropout. The copy of a state that was
    drawn does not wait."""
    if state is None:
        return torch.empty(2, dtype=torch.uint64, device=device)
    return state.view(torch.uint64).to(device, non_blocking=True)


def _saved_state(dropout_p: float, rng_state: Tensor) -> Tensor | None:
    return rng_state.cpu().view(torch.int64) if dropout_p > 0.0 else None


def _options(
    *, scale, causal, window=(-1, -1), bias=None, slopes=None, cu_q=None, cu_k=None, max_q=0, max_k=0, used_k=None,
    dropout_p=0.0, rng_state=None, positions=(-1, -1),
):  # fmt: skip
    """The operators' options; those behind the last one that matters are left out."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    plain = window == positions == (-1, -1) and dropout_p == 0.0 and not deterministic
    if plain and bias is None and slopes is None and cu_q is None and used_k is None:
        return scale, causal
    return (
        scale, causal, *window, 0.0, bias, slopes, cu_q, cu_k, max_q, max_k, None, used_k, dropout_p, rng_state, *positions,
        deterministic,
    )  # fmt: skip


def _forward_into(out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: tuple) -> Tensor:
    """Fills `out` and returns the log-sum-exp."""
    lse = torch.empty(_ops.lse_shape(q), dtype=torch.float32, device=q.device)
    _attention_into(out, lse, q, k, v, *options)
    return lse


def _forward_like(query: Tensor, key: Tensor, value: Tensor, options: tuple) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of (B, H, S, D) tensors, out in the memory layout of query."""
    q, k, v = _rows_by_heads(query, key, value)
    if len(options) == _ops.NUM_PLAIN_OPTIONS and q.is_contiguous():
        out, lse = _attention_plain_lse(q, k, v, *options)  # allocates what the layout asks for
        return out.transpose(1, 2), lse
    out = _dense_like(query)
    return out, _forward_into(out.transpose(1, 2), q, k, v, options)


# ---- (B, S, H, D) or (T, H, D), CUDA ----------------------------------------------------------------------------------------


def _window(left, right) -> tuple[int, int]:
    return (-1 if left is None else left, -1 if right is None else right)


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask: strobe does not write the attention matrix; strobe.dropout_mask gives the mask")
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not supported by strobe")
    state = _state_for(dropout_p)
    options = _options(
        scale=scale, causal=is_causal, window=_window(window_size_left, -1 if is_causal else window_size_right),
        slopes=alibi_slopes, cu_q=cum_seq_q, cu_k=cum_seq_k, max_q=0 if cum_seq_q is None else max_q,
        max_k=0 if cum_seq_k is None else max_k, used_k=seqused_k, dropout_p=dropout_p, rng_state=state,
    )  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = _dense_like(query)
    lse = _forward_into(out, q, k, v, options)
    state = _returned_state(state, query.device)
    return out, lse, state, state.new_empty(()), query.new_empty((0,))


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    options = _options(
        scale=scale, causal=is_causal, window=_window(window_size_left, -1 if is_causal else window_size_right),
        cu_q=cum_seq_q, cu_k=cum_seq_k, max_q=0 if cum_seq_q is None else max_q, max_k=0 if cum_seq_k is None else max_k,
        dropout_p=dropout_p, rng_state=_saved_state(dropout_p, rng_state),
    )  # fmt: skip
    q, k, v, o = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, out))
    grads = [_dense_like(x) for x in (query, key, value)]
    _attention_backward_into(*grads, None, False, grad_out, None, q, k, v, o, logsumexp, *options)
    return tuple(grads)


# ---- (B, H, S, D), CPU ------------------------------------------------------------------------------------------------------


def _cpu_options(query, key, is_causal, attn_mask, scale):
    """The CPU operator aligns its causal mask top-left."""
    positions = (0, 0) if is_causal and query.shape[2] != key.shape[2] else (-1, -1)
    bias = None if attn_mask is None else _four_dimensional(attn_mask)
    return _options(scale=scale, causal=is_causal, bias=bias, positions=positions)


def _cpu_forward(native, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if query.dtype == torch.float64:
        return native(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    out, lse = _forward_like(query, key, value, _cpu_options(query, key, is_causal, attn_mask, scale))
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(
    native, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    if query.dtype == torch.float64:
        return native(
            grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    options = _cpu_options(query, key, is_causal, attn_mask, scale)
    dout, q, k, v, o = _rows_by_heads(grad_out, query, key, value, out)
    dq, dk, dv, _ = _ops.attention_backward(dout, None, q, k, v, o, logsumexp.contiguous(), *options)
    return tuple(g.transpose(1, 2) for g in (dq, dk, dv))


# ---- registration -----------------------------------------------------------------------------------------------------------


_FLAG = ctypes.CFUNCTYPE(ctypes.c_int32)
# What the kernels in C++ ask for before every backward call.
_is_deterministic = _FLAG(torch.are_deterministic_algorithms_enabled)


@functools.cache
def _library_in_c() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_native.library_path("torch")))
    library.strobe_torch_override_sdpa.argtypes = [_FLAG]
    library.strobe_torch_override_sdpa.restype = ctypes.c_void_p
    library.strobe_torch_restore_sdpa.argtypes = [ctypes.c_void_p]
    library.strobe_torch_restore_sdpa.restype = None
    return library


class Handle:
    """The overrides, in force until ``remove()`` or the end of the ``with`` block.

    RuntimeError where another handle is in force and torch (2.11) takes one override from Python at a time.
    Where torch would rather take cuDNN than its flash kernel (Hopper), cuDNN is off as long as any handle is in force.
    """

    _in_force = 0
    _prefers_cudnn = True  # as it was before the first of those in force

    def __init__(self):
        self._native = None
        if Handle._in_force == 0:
            Handle._prefers_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        Handle._in_force += 1
        self._libraries = [torch.library.Library("aten", "IMPL", key) for key in ("CUDA", "CPU")]
        try:
            self._override(*self._libraries)
        except BaseException:
            self.remove()
            raise

    def _override(self, cuda: torch.library.Library, cpu: torch.library.Library) -> None:
        with warnings.catch_warnings():
            # torch says once that a built-in kernel is overridden, which is what was asked for.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            cuda.impl("_flash_attention_forward", _flash_forward)
            cuda.impl("_flash_attention_backward", _flash_backward)
            cpu.impl("_scaled_dot_product_flash_attention_for_cpu", _with_native("", _cpu_forward))
            cpu.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _with_native("_backward", _cpu_backward))
        self._native = _library_in_c().strobe_torch_override_sdpa(_is_deterministic)
        if self._native is None:
            raise RuntimeError("strobe: torch refused another kernel for aten::_scaled_dot_product_flash_attention")

    def remove(self) -> None:
        """Puts torch's own kernels back. Safe to call twice."""
        if not self._libraries:
            return
        for library in self._libraries:
            library._destroy()
        self._libraries = []
        if self._native is not None:
            _library_in_c().strobe_torch_restore_sdpa(self._native)
        Handle._in_force -= 1
        if Handle._in_force == 0:
            torch.backends.cuda.enable_cudnn_sdp(Handle._prefers_cudnn)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


def _with_native(suffix: str, implementation):
    """Gives `implementation` torch's own kernel as its first argument, for the dtypes that strobe does not have."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}").default
    native = torch.library.get_kernel(operator, "CPU") if hasattr(torch.library, "get_kernel") else None

    def call_native(*args, **kwargs):
        if native is None:
            raise ValueError("query: dtype is float64, which strobe does not take")
        keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return native.call_boxed(keyset, *args, **kwargs)

    def kernel(*args, **kwargs):
        return implementation(call_native, *args, **kwargs)

    return kernel


class _RegistryHandle(Handle):
    """The overrides as torch's registry holds them, so that it knows which implementation is active."""

    def __init__(self):
        torch.nn.attention.activate_flash_attention_impl(NAME)

    def remove(self) -> None:
        if torch.nn.attention.current_flash_attention_impl() == NAME:
            torch.nn.attention.restore_flash_attention_impl()


def sdpa() -> Handle:
    """Routes ``torch.nn.functional.scaled_dot_product_attention`` to strobe where torch would run its flash kernel.

    Returns:
        A handle: ``remove()`` restores torch's kernels; also a context manager. On CUDA torch picks its flash kernel for
        float16 and bfloat16 without attn_mask (``torch.nn.attention.sdpa_kernel`` insists on it); on the CPU for calls
        without dropout. float64 on the CPU stays with torch. cuDNN, which torch may prefer to its flash kernel, is switched
        off until ``remove()``.
    """
    return _RegistryHandle() if hasattr(torch.nn.attention, "activate_flash_attention_impl") else Handle()


def register() -> None:
    """Makes the name "strobe" known to ``torch.nn.attention.activate_flash_attention_impl``, where torch has it (2.11)."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Handle)
