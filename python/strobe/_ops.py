"""The operators of ``torch.ops.strobe``: loads the kernels and registers what torch has to know about them.

``attention`` and ``attention_backward`` come from libstrobe_torch.so for the CPU and CUDA dispatch keys. Added here: fake
kernels (shapes for torch.compile, torch.export and FakeTensor), autograd, vmap and autocast.
"""

import torch
from torch.utils._pytree import tree_map

from . import _native

torch.ops.load_library(str(_native.library_path("torch")))

attention = torch.ops.strobe.attention.default
attention_unrecorded = torch.ops.strobe.attention_unrecorded.default
attention_plain = torch.ops.strobe.attention_plain.default
attention_plain_lse = torch.ops.strobe.attention_plain_lse.default
attention_into = torch.ops.strobe.attention_into.default
attention_backward = torch.ops.strobe.attention_backward.default
attention_backward_plain = torch.ops.strobe.attention_backward_plain.default
attention_backward_into = torch.ops.strobe.attention_backward_into.default
lse_merge = torch.ops.strobe.lse_merge.default
dropout_mask_into = torch.ops.strobe.dropout_mask_into.default

_library = torch.library.Library("strobe", "FRAGMENT")

# call(operator._handle, ...) is operator(...) without __torch_function__, which costs as much again to look for.
call = torch._C._dispatch_call_boxed

_INDEX = {argument.name: i for i, argument in enumerate(attention._schema.arguments)}
_BIAS = _INDEX["bias"]
_FIRST_OPTION = 3
# The tensors among the options, bias first; the others are plain values.
_TENSOR_OPTIONS = tuple(
    _INDEX[name] - _FIRST_OPTION
    for name in ("bias", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "rng_state")
)
_FLOAT32_OUT = _INDEX["float32_out"]
NUM_OPTIONS = _FLOAT32_OUT - _FIRST_OPTION  # that forward and backward share
NUM_PLAIN_OPTIONS = _INDEX["window_left"] - _FIRST_OPTION  # that the plain operators have
BIAS_OPTION = _BIAS - _FIRST_OPTION


def split_tensors(options: tuple) -> tuple[list, tuple]:
    """The tensors of some or all options, for save_for_backward, which notices when they change; and the options without them."""
    if len(options) <= BIAS_OPTION:
        return [], options
    return [options[i] for i in _TENSOR_OPTIONS], tuple(None if i in _TENSOR_OPTIONS else x for i, x in enumerate(options))


def join_tensors(tensors, options: tuple) -> tuple:
    """The options again; none of them where there are no tensors."""
    joined = list(options)
    for i, tensor in zip(_TENSOR_OPTIONS, tensors):
        joined[i] = tensor
    return tuple(joined)


# ---- fake kernels -----------------------------------------------------------------------------------------------------------


def _check_devices(operator, arguments):
    """A call with one tensor on the meta device comes here, wherever the others are."""
    tensors = {
        a.name: x
        for a, x in zip(operator._schema.arguments, arguments)
        if isinstance(x, torch.Tensor) and a.name != "rng_state"
    }
    q = tensors["q"]
    for name, x in tensors.items():
        torch._check_value(x.device == q.device, lambda: f"{name}: is on {x.device}, but q is on {q.device}")


def _check_inputs(q, k, v):
    """What tells wrong calls from right ones while only shapes are known; the kernels check the rest."""
    for name, x in (("k", k), ("v", v)):
        torch._check_value(x.dtype == q.dtype, lambda: f"{name}: dtype is {x.dtype}, but q is {q.dtype}")
    torch._check_value(q.dim() in (3, 4), lambda: f"q: has {q.dim()} dimensions; it must be (B, Sq, H, D) or (Tq, H, D)")
    torch._check_value(k.dim() in (3, 4), lambda: f"k: has {k.dim()} dimensions; it must be (B, Sk, Hk, D) or (Tk, Hk, D)")
    torch._check_value(v.dim() == k.dim(), lambda: f"v: has {v.dim()} dimensions, k has {k.dim()}")


def lse_shape(q):
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])


def _result_like(q, k, v, options):
    _check_inputs(q, k, v)
    float32_out = len(options) > NUM_OPTIONS and options[NUM_OPTIONS]
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32 if float32_out else q.dtype)


def _lse_like(q):
    return q.new_empty(lse_shape(q), dtype=torch.float32)


@torch.library.register_fake("strobe::attention", lib=_library)
def _attention_fake(q, k, v, *options):
    _check_devices(attention, (q, k, v, *options))
    return _result_like(q, k, v, options), _lse_like(q)


@torch.library.register_fake("strobe::attention_unrecorded", lib=_library)
def _attention_unrecorded_fake(q, k, v, with_lse, *options):
    _check_devices(attention_unrecorded, (q, k, v, with_lse, *options))
    return _result_like(q, k, v, options), _lse_like(q) if with_lse else None


@torch.library.register_fake("strobe::attention_plain", lib=_library)
def _attention_plain_fake(q, k, v, *options):
    _check_devices(attention_plain, (q, k, v, *options))
    return _result_like(q, k, v, options)


@torch.library.register_fake("strobe::attention_plain_lse", lib=_library)
def _attention_plain_lse_fake(q, k, v, *options):
    return _attention_plain_fake(q, k, v, *options), _lse_like(q)


def _dense_like(x):
    return x.new_empty(x.shape)


@torch.library.register_fake("strobe::attention_backward", lib=_library)
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, *options, need_dbias=False):
    _check_devices(attention_backward, (dout, dlse, q, k, v, out, lse, *options))
    if len(options) > NUM_OPTIONS:
        need_dbias = options[NUM_OPTIONS]
    bias = options[BIAS_OPTION] if need_dbias else None
    dbias = q.new_empty((0,)) if bias is None else _dense_like(bias)
    return _dense_like(q), _dense_like(k), _dense_like(v), dbias


@torch.library.register_fake("strobe::attention_backward_plain", lib=_library)
def _attention_backward_plain_fake(dout, dlse, q, k, v, out, lse, *options):
    return _attention_backward_fake(dout, dlse, q, k, v, out, lse, *options)[:3]


@torch.library.register_fake("strobe::attention_into", lib=_library)
def _attention_into_fake(*arguments):
    _check_devices(attention_into, arguments)


@torch.library.register_fake("strobe::attention_backward_into", lib=_library)
def _attention_backward_into_fake(*arguments):
    _check_devices(attention_backward_into, arguments)


@torch.library.register_fake("strobe::dropout_mask_into", lib=_library)
def _dropout_mask_into_fake(keep, rng_state, dropout_p):
    return None


@torch.library.register_fake("strobe::lse_merge", lib=_library)
def _lse_merge_fake(outs, lses):
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


# ---- autograd ---------------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    tensors, ctx.options = split_tensors(inputs[_FIRST_OPTION:_FLOAT32_OUT])
    ctx.save_for_backward(*inputs[:3], *output, *tensors)


def _backward(ctx, dout, dlse):
    needs_grad = ctx.needs_input_grad  # of the inputs that were given: trailing defaults are left out
    grads = [None] * len(needs_grad)
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = join_tensors(tensors, ctx.options)
    need_dbias = _BIAS < len(needs_grad) and needs_grad[_BIAS]
    if dout is None and dlse is None:
        return tuple(grads)
    grads[:3], dbias = gradients(dout, dlse, q, k, v, out, lse, options, need_dbias)
    if need_dbias:
        grads[_BIAS] = dbias
    return tuple(grads)


def gradients(dout, dlse, q, k, v, out, lse, options, need_dbias):
    """((dq, dk, dv), dbias or None) from the gradients of out and lse, one of which may be None."""
    if dout is None:
        dout = torch.zeros_like(out, dtype=q.dtype)
    elif dout.dtype != q.dtype:
        dout = dout.to(q.dtype)
    tail = (*options, True) if need_dbias else options
    if torch.compiler.is_compiling():
        *dqkv, dbias = attention_backward(dout, dlse, q, k, v, out, lse, *tail)
    elif torch.is_grad_enabled():
        *dqkv, dbias = _Gradients.apply(dout, dlse, q, k, v, out, lse, tail)
    elif len(tail) == NUM_PLAIN_OPTIONS:
        return call(attention_backward_plain._handle, dout, dlse, q, k, v, out, lse, *tail), None
    else:
        *dqkv, dbias = _Gradients.forward(dout, dlse, q, k, v, out, lse, tail)
    return dqkv, dbias if need_dbias else None


torch.library.register_autograd("strobe::attention", _backward, setup_context=_setup_context, lib=_library)


def _not_differentiable(name, reason):
    def refuse(ctx, *grads):
        raise NotImplementedError(f"strobe::{name} is not differentiable; {reason}")

    torch.library.register_autograd(f"strobe::{name}", refuse, lib=_library)
    return refuse


# Nothing between the dispatcher and the kernel: strobe.attention calls these where no graph is recorded, or records the graph itself.
for _name in ("attention_unrecorded", "attention_plain", "attention_plain_lse", "attention_backward_plain"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

_refuse_second_derivative = _not_differentiable("attention_backward", "second derivatives of attention are not supported")
_not_differentiable("lse_merge", "the backward of each part takes the merged out and lse")


class _Gradients(torch.autograd.Function):
    """The backward of an eager call while a graph of it is made: ``create_graph=True`` and torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, tail):
        with torch._C._AutoDispatchBelowAutograd():
            return call(attention_backward._handle, dout, dlse, q, k, v, out, lse, *tail)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_refuse_second_derivative)


# ---- vmap -------------------------------------------------------------------------------------------------------------------


def _batched_by(num_tensors, operator):
    """The rule of `operator`, whose first `num_tensors` arguments have a batch axis: the mapped axis becomes part of it. Calls whose
    options have tensors are made one after the other.
    """

    def folded(x, dim, size):
        if x is None:
            return None
        return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    def one_of(x, dim, i):
        return x if dim is None else x.select(dim, i)

    def rule(info, in_dims, *arguments):
        size, tensors, options = info.batch_size, arguments[:num_tensors], arguments[num_tensors:]
        if not any(isinstance(x, torch.Tensor) for x in options):
            results = operator(*(folded(x, dim, size) for x, dim in zip(tensors, in_dims)), *options)
            results = tree_map(lambda x: x.unflatten(0, (size, x.shape[0] // size)), results)
        else:
            calls = [operator(*(one_of(x, dim, i) for x, dim in zip(arguments, in_dims))) for i in range(size)]
            results = tuple(torch.stack(x) for x in zip(*calls))
        return results, tree_map(lambda _: 0, results)

    return rule


for _operator in (attention, attention_plain, attention_plain_lse):
    torch.library.register_vmap(_operator, _batched_by(3, _operator), lib=_library)
for _operator in (attention_backward, attention_backward_plain):
    torch.library.register_vmap(_operator, _batched_by(7, _operator), lib=_library)


# ---- autocast ---------------------------------------------------------------------------------------------------------------


def cast_inputs(dtype, q, k, v, bias):
    """What autocast makes of a call: q, k and v in its dtype; bias may stay float32."""
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    if bias is not None and bias.dtype not in (torch.float32, torch.float64):
        bias = bias.to(dtype)
    return q, k, v, bias


def _register_autocast(device_type, key):
    keyset = torch._C.DispatchKeySet(key)

    def kernel(_, q, k, v, *options):
        options = list(options)
        bias = options[BIAS_OPTION] if len(options) > BIAS_OPTION else None
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            q, k, v, bias = cast_inputs(torch.get_autocast_dtype(device_type), q, k, v, bias)
            if bias is not None:
                options[BIAS_OPTION] = bias
            return attention(q, k, v, *options)

    def plain_kernel(_, q, k, v, *options):
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            q, k, v, _ = cast_inputs(torch.get_autocast_dtype(device_type), q, k, v, None)
            return attention_plain(q, k, v, *options)

    _library.impl("attention", kernel, key.name, with_keyset=True)
    _library.impl("attention_plain", plain_kernel, key.name, with_keyset=True)


_register_autocast("cpu", torch._C.DispatchKey.AutocastCPU)
_register_autocast("cuda", torch._C.DispatchKey.AutocastCUDA)
