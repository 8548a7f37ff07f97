"""``strobe.attention``: exact attention with every option of the library, for torch tensors on the CPU and on CUDA."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from . import _native, _ops

_P, _R = ParamSpec("_P"), TypeVar("_R")
_NO_WINDOW = (-1, -1)
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_functorch_active = torch._C._are_functorch_transforms_active
_is_deterministic = torch.are_deterministic_algorithms_enabled
_has_torch_function = torch.overrides.has_torch_function_variadic
_direct = _ops.call
_unrecorded = _ops.attention_unrecorded._op
_plain = _ops.attention_plain._handle
_plain_lse = _ops.attention_plain_lse._handle
_plain_backward = _ops.attention_backward_plain._handle


def _run(q: Tensor, k: Tensor, v: Tensor, with_lse: bool, options: tuple) -> tuple[Tensor, Tensor | None]:
    if len(options) != _ops.NUM_PLAIN_OPTIONS:
        if _is_functorch_active():  # vmap has no way to batch an operator that may return None
            return _ops.attention(q, k, v, *options)
        return _unrecorded(q, k, v, with_lse, *options)
    if _has_torch_function(q, k, v):
        return _ops.attention_plain_lse(q, k, v, *options) if with_lse else (_ops.attention_plain(q, k, v, *options), None)
    return _direct(_plain_lse, q, k, v, *options) if with_lse else (_direct(_plain, q, k, v, *options), None)


def _save(ctx, q, k, v, bias, options, out, lse) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.options = _ops.split_tensors(options)
    ctx.save_for_backward(q, k, v, out, lse, bias, *tensors[1:])


def _backward(ctx, dout, dlse=None):
    if dout is None and dlse is None:
        return None, None, None, None, None, None
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = ctx.options[: _ops.NUM_OPTIONS]
    if len(options) > _ops.BIAS_OPTION:
        options = _ops.join_tensors(tensors, options)
    (dq, dk, dv), dbias = _ops.gradients(dout, dlse, q, k, v, out, lse, options, ctx.needs_input_grad[3])
    return dq, dk, dv, dbias, None, None


class _Attention(torch.autograd.Function):
    """Autograd of an eager call. The operator's own registration does the same through more trips into Python."""

    @staticmethod
    def forward(ctx, q, k, v, bias, options, with_lse):
        out, lse = _run(q, k, v, True, options)
        _save(ctx, q, k, v, bias, options, out, lse)
        return (out, lse) if with_lse else out

    backward = staticmethod(_backward)


class _TransformedAttention(torch.autograd.Function):
    """The same in the form that torch.func asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, bias, options, with_lse):
        return _run(q, k, v, True, options if bias is None else _with_bias(options, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, *inputs[:-1], *output)

    backward = staticmethod(_backward)


class _PlainAttention(torch.autograd.Function):
    """The same for the plain call without its log-sum-exp: the least that autograd needs."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal):
        out, lse = _direct(_plain_lse, q, k, v, softmax_scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = softmax_scale, causal
        return out

    @staticmethod
    def backward(ctx, dout):
        if _is_grad_enabled() or _is_compiling():
            (dq, dk, dv), _ = _ops.gradients(dout, None, *ctx.saved_tensors, ctx.options, False)
        else:
            dq, dk, dv = _direct(_plain_backward, dout, None, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None


# Function.apply binds the defaults of `forward` by inspection at every call, which costs more than the call itself.
_record = super(torch.autograd.Function, _Attention).apply
_record_plain = super(torch.autograd.Function, _PlainAttention).apply


def _with_bias(options: tuple, bias: Tensor | None) -> tuple:
    return (*options[: _ops.BIAS_OPTION], bias, *options[_ops.BIAS_OPTION + 1 :])


def _must_be_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: is a {type(x).__name__}; it must be a torch tensor") from None


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _must_be_tensor(name, x)


def _check_optional_tensors(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            _must_be_tensor(name, x)


def _refuse_gradients(**numbers: Any) -> None:
    for name, x in numbers.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires grad, but strobe takes it as a number; detach it, or apply it to q instead")


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Operators without a rule for forward mode drop tangents: the derivative would come out as zero."""
    for x in tensors:
        if isinstance(x, Tensor) and _forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "strobe.attention: forward-mode derivatives (torch.func.jvp, jacfwd, torch.autograd.forward_ad) are not supported; "
                "take them in reverse mode"
            )


def _any_requires_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    try:
        return q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    except AttributeError:
        _check_tensors(q, k, v)
        raise


def _call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: tuple, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of one call by the shortest way that torch's present mode allows; lse may be None without `with_lse`."""
    if _forward_ad._current_level >= 0:
        _refuse_tangents(q, k, v, bias)
    if _is_compiling():
        return _ops.attention(q, k, v, *options)
    if _any_autocast() and torch.is_autocast_enabled(q.device.type):
        q, k, v, bias = _ops.cast_inputs(torch.get_autocast_dtype(q.device.type), q, k, v, bias)
        if bias is not None:
            options = _with_bias(options, bias)
    try:
        if not (_is_grad_enabled() and _any_requires_grad(q, k, v, bias)):
            return _run(q, k, v, with_lse, options)
        if _is_functorch_active():
            return _TransformedAttention.apply(q, k, v, bias, options, True)
        result = _record(q, k, v, bias, options, with_lse)
        return result if with_lse else (result, None)
    except RuntimeError:
        _check_tensors(q, k, v)
        raise


def new_rng_state() -> Tensor:
    """A fresh dropout state: (2,) int64 on the CPU, a seed drawn from torch's default CPU generator and the offset 0.

    ``torch.manual_seed`` therefore makes dropout repeatable, on every device, and activation checkpointing repeats it. Callers who
    number their calls under one seed instead count the offset up from there: ``rng_state=(seed, number)``.
    """
    return torch.nn.functional.pad(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu"), (0, 1))


def _pair(name: str, value: Any, meaning: str) -> tuple:
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(f"{name}: is {value!r}; it must be two integers, {meaning}") from None
    return first, second


def _as_rng_state(rng_state: Tensor | tuple[int, int]) -> Tensor:
    if isinstance(rng_state, Tensor):
        return rng_state
    seed, offset = _pair("rng_state", rng_state, "(seed, offset), or a tensor of them")
    return torch.tensor([seed, offset], dtype=torch.int64, device="cpu")


def _four_dimensional(bias: Tensor) -> Tensor:
    if not 1 <= bias.dim() <= 4:
        raise ValueError(f"bias: has {bias.dim()} dimensions; it must be broadcastable to (B, H, Sq, Sk)")
    return bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias


def _max_seqlen(name: str, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    if max_seqlen is not None:
        return max_seqlen
    if cu_seqlens is not None:
        raise ValueError(f"max_seqlen_{name}: is not given beside cu_seqlens_{name}; it is the longest sequence (an int)")
    return 0


def _positions(positions: tuple[int, int] | None) -> tuple[int, int]:
    if positions is None:
        return -1, -1
    q_position, k_position = _pair("positions", positions, "(q_position, k_position)")
    if q_position < 0 or k_position < 0:
        raise ValueError(f"positions: are {positions}; they must not be negative")
    return q_position, k_position


def _float32_out(out_dtype: torch.dtype, q_dtype: torch.dtype) -> bool:
    if out_dtype not in (torch.float32, q_dtype):
        raise ValueError(f"out_dtype: is {out_dtype}; it must be torch.float32 or the dtype of q, {q_dtype}")
    return out_dtype == torch.float32 and q_dtype != torch.float32


def _plain_call(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool) -> Tensor | None:
    """The call without further options and without its log-sum-exp, in few steps; None where torch is in a mode that takes more."""
    if _is_dynamo_compiling() or _has_torch_function(q, k, v) or _forward_ad._current_level >= 0:
        return None
    if softmax_scale is not None and isinstance(softmax_scale, Tensor):
        return None
    try:
        if not (_is_grad_enabled() and _any_requires_grad(q, k, v, None)):
            return _direct(_plain, q, k, v, softmax_scale, causal)
        if _is_deterministic() or _any_autocast() or _is_functorch_active():
            return None
        return _record_plain(q, k, v, softmax_scale, causal)
    except RuntimeError:
        _check_tensors(q, k, v)
        raise


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = _NO_WINDOW,
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
    deterministic: bool | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    return_rng_state: bool = False,
) -> Any:
    """Exact attention: ``dropout(softmax(score(q @ k^T))) @ v``, differentiable in q, k, v, bias, and through the LSE.

    Args:
        q: (B, Sq, H, D), or (Tq, H, D) with ``cu_seqlens_q``. float32, bfloat16 or float16; any strides whose last is 1;
            D up to 512 on the CPU, up to 256 on CUDA.
        k: (B, Sk, Hk, D), or (Tk, Hk, D) with ``cu_seqlens_k``. Hk divides H: query head h reads key head h // (H // Hk).
        v: (B, Sk, Hk, Dv), or (Tk, Hk, Dv) with ``cu_seqlens_k``. Dv may differ from D.
        causal: hide the keys behind each query. Aligned bottom-right: query i sees keys j <= i + Sk - Sq.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right, both included; -1 is
            unbounded (sliding window: Beltagy et al., Longformer, 2020).
        softmax_scale: factor on q @ k^T; 1 / sqrt(D) if None.
        softcap: if positive, scores become softcap * tanh(score / softcap), before masks and bias (Gemma 2, 2024).
        bias: added to the scores; broadcastable to (B, H, Sq, Sk) (varlen: the maximal lengths), float32 or the dtype of q,
            any strides. Its gradient has its own shape.
        alibi_slopes: (H) or (B, H) float32; scores get -slope * |i + Sk - Sq - j| (Press et al., ALiBi, 2022). Not
            differentiable.
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32 prefix sums of the sequence lengths, starting with 0. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more; required beside cu_seqlens. On CUDA, where the lengths are not
            looked at, a smaller number is not refused and gives wrong results.
        seqused_q, seqused_k: (B) int32: how many rows of each sequence count. Query rows behind get out = 0, lse = -inf.
        dropout_p: probability of dropping an attention weight, in steps of 2^-16; kept ones are scaled by 1 / (1 - p).
        rng_state: (seed, offset) as two ints or a (2) int64 CPU tensor, to repeat an earlier call; drawn from torch's CPU
            generator if None.
        positions: (q_position, k_position) of the first query and the first key row on one common axis. It replaces the
            bottom-right alignment, for blocks of a longer sequence (ring attention: Liu et al., 2023).
        deterministic: the backward gives the same bits each time; ``torch.are_deterministic_algorithms_enabled()`` if None.
        out_dtype: torch.float32 for a result that will be merged (``strobe.merge``); the dtype of q if None.
        implementation: a name from ``strobe.implementations()``; the first of them that serves the call if None.
        return_lse: also return the log-sum-exp of each row's scores, natural log, float32, (B, H, Sq) or (H, Tq); -inf on a
            row that sees no key. Differentiable.
        return_rng_state: also return the (2) int64 CPU tensor that repeats this call's dropout; None without dropout.

    Returns:
        out: (B, Sq, H, Dv) or (Tq, H, Dv), dense; 0 on a row that sees no key. With ``return_lse`` or ``return_rng_state`` a
        tuple: out, then lse, then rng_state, as far as asked for.

    Raises:
        ValueError: a dtype, shape, stride, device or option that contradicts the above; the text names the argument.
        RuntimeError: no implementation of this build serves the call (the text has each one's reason), or the device failed.

    The algorithm is FlashAttention-2 (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
    2023) with online softmax (Milakov, Gimelshein, 2018). Under autocast q, k and v are cast to its dtype first.
    """
    left, right = _NO_WINDOW if window_size is _NO_WINDOW else _pair("window_size", window_size, "(left, right)")
    if type(softcap) is not float or (softmax_scale is not None and type(softmax_scale) is not float):
        _refuse_gradients(softmax_scale=softmax_scale, softcap=softcap)
    common = (
        bias is None and alibi_slopes is None and cu_seqlens_q is None and cu_seqlens_k is None and seqused_q is None
        and seqused_k is None and dropout_p == 0.0 and positions is None and out_dtype is None and implementation is None
        and max_seqlen_q is None and max_seqlen_k is None
    )  # fmt: skip
    plain = common and left == right == -1 and softcap == 0.0
    if plain and not (return_lse or return_rng_state or deterministic):
        out = _plain_call(q, k, v, softmax_scale, causal)
        if out is not None:
            return out
    if deterministic is None:
        deterministic = _is_deterministic()
    if common and not deterministic:
        # Options that are left out cost nothing on the way to the operator.
        options = (softmax_scale, causal) if plain else (softmax_scale, causal, left, right, softcap)
        rng_state = None
        out, lse = _call(q, k, v, None, options, return_lse)
    else:
        try:
            if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
                raise ValueError("alibi_slopes: requires grad, but slopes are not differentiable; detach them, or pass a bias")
            if bias is not None:
                bias = _four_dimensional(bias)
            if dropout_p == 0.0:
                rng_state = None
            else:
                rng_state = new_rng_state() if rng_state is None else _as_rng_state(rng_state)
            q_position, k_position = _positions(positions)
            options = (
                softmax_scale, causal, left, right, softcap, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
                _max_seqlen("q", cu_seqlens_q, max_seqlen_q), _max_seqlen("k", cu_seqlens_k, max_seqlen_k), seqused_q, seqused_k,
                dropout_p, rng_state, q_position, k_position, deterministic, _native.implementation_index(implementation),
                out_dtype is not None and _float32_out(out_dtype, q.dtype),
            )  # fmt: skip
            out, lse = _call(q, k, v, bias, options, return_lse)
        except (AttributeError, RuntimeError):
            _check_optional_tensors(
                bias=bias, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q,
                seqused_k=seqused_k,
            )  # fmt: skip
            raise
    if not (return_lse or return_rng_state):
        return out
    return (out, *((lse,) if return_lse else ()), *((rng_state,) if return_rng_state else ()))


def _plain_calls_first(general: Callable[_P, _R]) -> Callable[_P, _R]:
    """`general`, quicker where there are no options but causal and softmax_scale: each parameter with a default costs every call."""

    @functools.wraps(general)
    def attention(q, k, v, *, causal=False, softmax_scale=None, **options):
        if not options:
            out = _plain_call(q, k, v, softmax_scale, causal)
            if out is not None:
                return out
        return general(q, k, v, causal=causal, softmax_scale=softmax_scale, **options)

    return attention


attention_with_options = attention  # for callers who pass most options anyway
attention = _plain_calls_first(attention_with_options)
