"""The C ABI of strobe through ctypes, on CPU tensors of torch: what the tests here are written against."""

import ctypes
import math
import os
import pathlib

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.uint8: 4}


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("device_type", ctypes.c_int32),
                ("device_index", ctypes.c_int32), ("ndim", ctypes.c_int32), ("shape", ctypes.c_int64 * 5),
                ("strides", ctypes.c_int64 * 5)]

    @classmethod
    def view(cls, t):
        """A view of a torch tensor; None is "not given"."""
        if t is None:
            return cls()
        pad = [0] * (5 - t.dim())
        return cls(t.data_ptr(), DTYPES[t.dtype], 0, 0, t.dim(), (ctypes.c_int64 * 5)(*t.shape, *pad),
                   (ctypes.c_int64 * 5)(*t.stride(), *pad))


class Attention(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("num_threads", ctypes.c_int32),
                *((name, Tensor) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")),
                ("max_seqlen_q", ctypes.c_int64), ("max_seqlen_k", ctypes.c_int64), ("alibi_slopes", Tensor), ("bias", Tensor),
                ("causal", ctypes.c_int32), ("deterministic", ctypes.c_int32), ("window_left", ctypes.c_int64),
                ("window_right", ctypes.c_int64), ("has_positions", ctypes.c_int32), ("has_softmax_scale", ctypes.c_int32),
                ("q_position", ctypes.c_int64), ("k_position", ctypes.c_int64), ("softmax_scale", ctypes.c_double),
                ("softcap", ctypes.c_double), ("dropout_p", ctypes.c_double), ("dropout_seed", ctypes.c_uint64),
                ("dropout_offset", ctypes.c_uint64), ("implementation", ctypes.c_char_p)]


class Forward(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("out", Tensor), ("lse", Tensor),
                ("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_size_t)]


class Backward(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("accumulate", ctypes.c_int32),
                *((name, Tensor) for name in ("out", "lse", "dout", "dlse", "dq", "dk", "dv", "dbias")),
                ("workspace", ctypes.c_void_p), ("workspace_bytes", ctypes.c_size_t)]


class Plan(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("workspace_bytes", ctypes.c_size_t),
                ("implementation", ctypes.c_char * 64), ("explanation", ctypes.c_char * 1024)]


def library_path():
    build = pathlib.Path(os.environ.get("STROBE_BUILD_DIR", ROOT / "build" / "test"))
    return build / "lib" / "libstrobe.so"


def load():
    lib = ctypes.CDLL(str(library_path()))
    lib.strobe_last_error.restype = ctypes.c_char_p
    return lib


class Error(RuntimeError):
    pass


def _call(lib, name, *arguments):
    if getattr(lib, name)(*arguments) != 0:
        raise Error(lib.strobe_last_error().decode())


def _run(lib, direction, attention, call):
    plan = Plan(struct_size=ctypes.sizeof(Plan))
    _call(lib, f"strobe_attention_{direction}_plan", ctypes.byref(attention), ctypes.byref(call), ctypes.byref(plan))
    workspace = torch.empty(plan.workspace_bytes + 1, dtype=torch.uint8)
    call.workspace, call.workspace_bytes = workspace.data_ptr(), plan.workspace_bytes
    _call(lib, f"strobe_attention_{direction}", ctypes.byref(attention), ctypes.byref(call), None)


def attention_struct(q, k, v, **options):
    """Tensors as torch tensors, numbers as they are; -1 windows and "not given" for what is left out."""
    tensors = {name for name, kind in Attention._fields_ if kind is Tensor}
    a = Attention(struct_size=ctypes.sizeof(Attention), window_left=-1, window_right=-1, q=Tensor.view(q), k=Tensor.view(k),
                  v=Tensor.view(v))
    if "softmax_scale" in options:
        a.has_softmax_scale = 1
    if "q_position" in options or "k_position" in options:
        a.has_positions = 1
    for name, value in options.items():
        setattr(a, name, Tensor.view(value) if name in tensors else value)
    return a


def forward(lib, q, k, v, out_dtype=None, **options):
    """out and lse."""
    varlen = options.get("cu_seqlens_q") is not None
    out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=out_dtype or q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1]), math.nan)
    call = Forward(struct_size=ctypes.sizeof(Forward), out=Tensor.view(out), lse=Tensor.view(lse))
    _run(lib, "forward", attention_struct(q, k, v, **options), call)
    return out, lse


def backward(lib, q, k, v, out, lse, dout, dlse=None, **options):
    """dq, dk, dv, and dbias (None without a bias), all f32."""
    gradients = [torch.full(t.shape, math.nan) for t in (q, k, v)]
    bias = options.get("bias")
    dbias = None if bias is None else torch.full(bias.shape, math.nan)
    dq, dk, dv = (Tensor.view(t) for t in gradients)
    call = Backward(struct_size=ctypes.sizeof(Backward), out=Tensor.view(out), lse=Tensor.view(lse), dout=Tensor.view(dout),
                    dlse=Tensor.view(dlse), dq=dq, dk=dk, dv=dv, dbias=Tensor.view(dbias))
    _run(lib, "backward", attention_struct(q, k, v, **options), call)
    return *gradients, dbias


def dropout_mask(lib, q, k, v, **options):
    keep = torch.full((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), 7, dtype=torch.uint8)
    _call(lib, "strobe_dropout_mask", ctypes.byref(attention_struct(q, k, v, **options)), ctypes.byref(Tensor.view(keep)), None)
    return keep
