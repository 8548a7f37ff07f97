"""strobe for NumPy arrays, through the C ABI: exact attention on the CPU without torch.

    import numpy as np, strobe.numpy
    out, lse = strobe.numpy.attention(q, k, v, causal=True, return_lse=True)
    dq, dk, dv = strobe.numpy.attention_backward(dout, q, k, v, out, lse, causal=True)

Arrays are float32 or float16, (B, S, H, D); bfloat16 through the ml_dtypes package. Arguments as in ``strobe.attention``.
"""

import ctypes
import secrets
from typing import Any

import numpy as np

from . import _native

_MAX_DIMS = 5
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int32": 3, "uint8": 4}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * _MAX_DIMS),
        ("strides", ctypes.c_int64 * _MAX_DIMS),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("num_threads", ctypes.c_int32),
        *((name, _Tensor) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")),
        ("max_seqlen_q", ctypes.c_int64),
        ("max_seqlen_k", ctypes.c_int64),
        ("alibi_slopes", _Tensor),
        ("bias", _Tensor),
        ("causal", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("has_positions", ctypes.c_int32),
        ("has_softmax_scale", ctypes.c_int32),
        ("q_position", ctypes.c_int64),
        ("k_position", ctypes.c_int64),
        ("softmax_scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("dropout_p", ctypes.c_double),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("implementation", ctypes.c_char_p),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("out", _Tensor),
        ("lse", _Tensor),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("accumulate", ctypes.c_int32),
        *((name, _Tensor) for name in ("out", "lse", "dout", "dlse", "dq", "dk", "dv", "dbias")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("workspace_bytes", ctypes.c_size_t),
        ("implementation", ctypes.c_char * 64),
        ("explanation", ctypes.c_char * 1024),
    ]


def _view(name: str, array: np.ndarray | None) -> _Tensor:
    t = _Tensor()
    if array is None:
        return t
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name}: is a {type(array).__name__}; it must be a numpy array")
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"{name}: dtype is {array.dtype}; strobe takes float32, bfloat16 and float16 for values and int32 for indices")
    if not 1 <= array.ndim <= _MAX_DIMS:
        raise ValueError(f"{name}: has {array.ndim} dimensions; every array of a call has from 1 to {_MAX_DIMS}")
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{name}: strides {array.strides} are not whole elements of {array.itemsize} bytes")
    t.data = array.ctypes.data
    t.dtype = _DTYPES[array.dtype.name]
    t.ndim = array.ndim
    t.shape[: array.ndim] = array.shape
    t.strides[: array.ndim] = [stride // array.itemsize for stride in array.strides]
    return t


def _check(status: int) -> None:
    if status == 0:
        return
    text = _native.c_abi().strobe_last_error().decode()
    raise ValueError(text) if status == 1 else RuntimeError(text)


def _sized(struct):
    struct.struct_size = ctypes.sizeof(struct)
    return struct


def _describe(q, k, v, options: dict) -> _Attention:
    a = _sized(_Attention(window_left=-1, window_right=-1))
    a.q, a.k, a.v = _view("q", q), _view("k", k), _view("v", v)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "bias"):
        setattr(a, name, _view(name, options.pop(name, None)))
    for side in "qk":
        longest = options.pop(f"max_seqlen_{side}", None)
        if longest is None and getattr(a, f"cu_seqlens_{side}").ndim:
            raise ValueError(f"max_seqlen_{side}: is not given beside cu_seqlens_{side}; it is the longest sequence (an int)")
        setattr(a, f"max_seqlen_{side}", longest or 0)
    a.causal = bool(options.pop("causal", False))
    a.deterministic = bool(options.pop("deterministic", False))
    a.window_left, a.window_right = options.pop("window_size", (-1, -1))
    scale = options.pop("softmax_scale", None)
    if scale is not None:
        a.has_softmax_scale, a.softmax_scale = 1, scale
    positions = options.pop("positions", None)
    if positions is not None:
        a.has_positions, (a.q_position, a.k_position) = 1, positions
    a.softcap = options.pop("softcap", 0.0)
    a.dropout_p = options.pop("dropout_p", 0.0)
    rng_state = options.pop("rng_state", None)
    if rng_state is not None:
        a.dropout_seed, a.dropout_offset = (int(x) % 2**64 for x in rng_state)
    a.num_threads = options.pop("num_threads", 0)
    implementation = options.pop("implementation", None)
    a.implementation = None if implementation is None else implementation.encode()
    if options:
        raise TypeError(f"unknown arguments: {', '.join(options)}")
    return a


def _run(a: _Attention, io, name: str) -> None:
    library = _native.c_abi()
    plan = _sized(_Plan())
    _check(getattr(library, f"strobe_attention_{name}_plan")(ctypes.byref(a), ctypes.byref(io), ctypes.byref(plan)))
    workspace = np.empty(plan.workspace_bytes, np.uint8)
    io.workspace, io.workspace_bytes = workspace.ctypes.data, plan.workspace_bytes
    _check(getattr(library, f"strobe_attention_{name}")(ctypes.byref(a), ctypes.byref(io), None))


def _rank_of(q: np.ndarray) -> tuple[int, ...]:
    if not isinstance(q, np.ndarray) or q.ndim not in (3, 4):
        raise ValueError("q: must be an array (B, Sq, H, D), or (Tq, H, D) with cu_seqlens_q")
    return (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    out_dtype: Any = None,
    return_lse: bool = False,
    return_rng_state: bool = False,
    **options: Any,
) -> Any:
    """Exact attention on the CPU.

    Args:
        q, k, v: (B, Sq, H, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv); varlen as in ``strobe.attention``. The last stride is one
            element.
        options: causal, window_size, softmax_scale, softcap, bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, seqused_q, seqused_k, dropout_p, rng_state (two ints), positions, implementation as in
            ``strobe.attention``; num_threads (0: all processors).

    Returns:
        out (B, Sq, H, Dv); with ``return_lse`` also lse (B, H, Sq) float32; with ``return_rng_state`` also the two ints that
        repeat the dropout (None without).

    Raises:
        ValueError: an argument that contradicts the above; the text names it.
        RuntimeError: no implementation serves the call.
        TypeError: an unknown argument, or something that is no array.
    """
    rows = _rank_of(q)
    rng_state = None
    if options.get("dropout_p", 0.0):
        rng_state = options.get("rng_state") or (secrets.randbits(63), 0)
        options["rng_state"] = rng_state
    a = _describe(q, k, v, dict(options))
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype if out_dtype is None else out_dtype)
    lse = np.empty(rows, np.float32)
    _run(a, _sized(_Forward(out=_view("out", out), lse=_view("lse", lse))), "forward")
    if not (return_lse or return_rng_state):
        return out
    return (out, *((lse,) if return_lse else ()), *((rng_state,) if return_rng_state else ()))


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    need_dbias: bool = False,
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """The gradients of an attention call.

    Args:
        dout: the gradient of out, its shape and the dtype of q.
        q, k, v, options: the forward's; dropout needs its rng_state.
        out, lse: what the forward returned.
        dlse: the gradient of lse, float32, its shape; zero if None.
        need_dbias: also return the gradient of bias.

    Returns:
        (dq, dk, dv), shapes and dtypes of q, k, v; with ``need_dbias`` also dbias.

    Raises:
        ValueError, RuntimeError, TypeError: as ``attention``; ValueError for need_dbias without bias.
    """
    a = _describe(q, k, v, dict(options))
    grads = [np.empty(x.shape, x.dtype) for x in (q, k, v)]
    if need_dbias:
        if options.get("bias") is None:
            raise ValueError("need_dbias: is set without bias")
        grads.append(np.empty(options["bias"].shape, options["bias"].dtype))
    b = _sized(_Backward())
    arrays = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, **dict(zip(("dq", "dk", "dv", "dbias"), grads))}
    for name, array in arrays.items():
        setattr(b, name, _view(name, array))
    _run(a, b, "backward")
    return tuple(grads)
