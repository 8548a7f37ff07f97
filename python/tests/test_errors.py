"""Every wrong call is refused by a Python exception that names the argument."""

import pytest
import torch

import strobe
from strobe.flash_attn import flash_attn_func


def qkv(dtype=torch.float32, rows=8, heads=4, heads_k=2, dim=16):
    return [torch.randn(2, rows, h, dim).to(dtype) for h in (heads, heads_k, heads_k)]


def call(q=None, k=None, v=None, **options):
    defaults = qkv()
    return strobe.attention(*(d if x is None else x for x, d in zip((q, k, v), defaults)), **options)


Q, K, V = (x.shape for x in qkv())
CASES = {
    "float64": (lambda: call(q=torch.randn(Q).double()), "q: dtype is float64"),
    "int": (lambda: call(q=torch.ones(Q, dtype=torch.int64)), "q: dtype is int64"),
    "bool": (lambda: call(k=torch.ones(K, dtype=torch.bool)), "k: dtype is bool"),
    "complex": (lambda: call(v=torch.ones(V, dtype=torch.complex64)), "v: dtype is of another kind"),
    "mixed dtypes": (lambda: call(k=torch.randn(K).bfloat16()), "k: dtype is bf16, but q is f32"),
    "rank 2": (lambda: call(q=torch.randn(8, 16)), "q: has 2 dimensions"),
    "rank 5": (lambda: call(q=torch.randn(1, 2, 8, 4, 16)), "q: has 5 dimensions"),
    "rank 0": (lambda: call(q=torch.tensor(1.0)), "q: has 0 dimensions"),
    "varlen rank": (lambda: call(q=torch.randn(8, 4, 16)), "q: has 3 dimensions"),
    "head_dim": (lambda: call(k=torch.randn(2, 8, 2, 32)), "k: head_dim is 32, but q has 16"),
    "head_dim 0": (lambda: call(*(torch.randn(2, 8, 2, 0) for _ in range(3))), "head_dim is 0"),
    "head_dim 1024": (lambda: call(*(torch.randn(1, 2, 1, 1024) for _ in range(3))), "head_dim is 1024"),
    "heads": (lambda: call(*(torch.randn(2, 8, h, 16) for h in (4, 3, 3))), "k: has 3 heads, which do not divide the 4 of q"),
    "batch": (lambda: call(k=torch.randn(3, 8, 2, 16), v=torch.randn(3, 8, 2, 16)), "batch of 3"),
    "v rows": (lambda: call(v=torch.randn(2, 9, 2, 16)), "v: shape is"),
    "last stride": (lambda: call(q=torch.randn(2, 8, 16, 4).transpose(2, 3)), "q: the last stride is 4"),
    "bias shape": (lambda: call(bias=torch.randn(2, 4, 8, 9)), "bias: shape is"),
    "bias rank": (lambda: call(bias=torch.randn(1, 2, 4, 8, 8)), "bias: has 5 dimensions"),
    "bias bool": (lambda: call(bias=torch.ones(8, 8, dtype=torch.bool)), "bias: dtype is bool"),
    "slopes shape": (lambda: call(alibi_slopes=torch.rand(3)), "alibi_slopes: shape is"),
    "slopes dtype": (lambda: call(alibi_slopes=torch.rand(4).half()), "alibi_slopes: dtype is"),
    "slopes with gradient": (lambda: call(alibi_slopes=torch.rand(4, requires_grad=True)), "alibi_slopes: requires grad"),
    "window": (lambda: call(window_size=(-2, 3)), "window_left: is -2"),
    "causal window": (lambda: call(causal=True, window_size=(-1, 3)), "window_right: is 3 beside causal"),
    "softcap": (lambda: call(softcap=-1.0), "softcap: is -1"),
    "scale": (lambda: call(softmax_scale=float("nan")), "softmax_scale: is nan"),
    "dropout 1": (lambda: call(dropout_p=1.0), "dropout_p: is 1"),
    "dropout negative": (lambda: call(dropout_p=-0.1), "dropout_p: is -0.1"),
    "rng dtype": (lambda: call(dropout_p=0.1, rng_state=torch.zeros(2)), "rng_state: must be an int64 tensor"),
    "rng shape": (lambda: call(dropout_p=0.1, rng_state=torch.zeros(3, dtype=torch.int64)), "rng_state: must be"),
    "positions": (lambda: call(positions=(-1, 0)), "positions: are"),
    "out dtype": (lambda: call(out_dtype=torch.float16), "out_dtype: is torch.float16"),
    "implementation": (lambda: call(implementation="fast"), "implementation: is 'fast'; this build has: "),
    "scale with gradient": (lambda: call(softmax_scale=torch.tensor(0.3, requires_grad=True)), "softmax_scale: requires grad"),
    "softcap with gradient": (lambda: call(softcap=torch.tensor(3.0, requires_grad=True)), "softcap: requires grad"),
    "max_seqlen without cu": (lambda: call(max_seqlen_q=5), "max_seqlen_q: is 5 without cu_seqlens_q"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name):
    function, text = CASES[name]
    with pytest.raises(ValueError) as raised:
        function()
    assert text in str(raised.value)


def varlen(cu, longest=8, **changes):
    q, k, v = (x.flatten(0, 1) for x in qkv())
    cu = torch.tensor(cu, dtype=changes.pop("dtype", torch.int32))
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest, **changes}
    return strobe.attention(q, k, v, **options)


@pytest.mark.parametrize(
    "function,text",
    [
        (lambda: varlen([1, 8, 16]), "cu_seqlens_q: starts with 1"),
        (lambda: varlen([0, 9, 8], 9), "cu_seqlens_q: falls from 9 to 8"),
        (lambda: varlen([0, 8, 17], 9), "cu_seqlens_q: ends with 17, but there are only 16 rows"),
        (lambda: varlen([0, 8, 16], 7), "max_seqlen_q: is 7, but sequence 0 has 8 rows"),
        (lambda: varlen([0, 8, 16], dtype=torch.int64), "cu_seqlens_q: dtype is int64"),
        (lambda: varlen([0, 8, 16], None), "max_seqlen_q: is not given beside cu_seqlens_q"),
        (lambda: varlen([0, 8, 16], seqused_k=torch.tensor([8, 9], dtype=torch.int32)), "seqused_k: is 9 at index 1"),
        (lambda: varlen([0, 8, 16], seqused_k=torch.tensor([8], dtype=torch.int32)), "seqused_k: shape is"),
    ],
)
def test_varlen_refused(function, text):
    with pytest.raises(ValueError) as raised:
        function()
    assert text in str(raised.value)


def test_mixed_devices():
    q, k, v = qkv()
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="k: is on cuda:0, but q is on cpu"):
            strobe.attention(q, k.cuda(), v)
        with pytest.raises(ValueError, match="rng_state: must be on the cpu"):
            strobe.attention(q, k, v, dropout_p=0.1, rng_state=torch.zeros(2, dtype=torch.int64, device="cuda"))
    with pytest.raises(ValueError, match="k: is on meta, but q is on cpu"):
        strobe.attention(q, k.to("meta"), v)
    with pytest.raises(ValueError, match="k: is on cpu, but q is on meta"):
        strobe.attention(q.to("meta"), k, v)


@pytest.mark.parametrize("elsewhere", ["meta"] + (["cuda"] if torch.cuda.is_available() else []))
@pytest.mark.parametrize("name", ["v", "bias", "alibi_slopes", "cu_seqlens_k", "seqused_k"])
def test_one_tensor_elsewhere(name, elsewhere):
    q, k, v = (x.flatten(0, 1) for x in qkv())
    cu, used = torch.tensor([0, 8, 16], dtype=torch.int32), torch.tensor([8, 8], dtype=torch.int32)
    tensors = {"v": v, "bias": torch.zeros(8, 8), "alibi_slopes": torch.rand(4), "cu_seqlens_k": cu, "seqused_k": used}
    tensors[name] = tensors[name].to(elsewhere)
    for grad in (False, True):
        with pytest.raises(ValueError, match=f"{name}: is on {elsewhere}.*, but q is on cpu"):
            strobe.attention(q.requires_grad_(grad), k, cu_seqlens_q=cu, max_seqlen_q=8, max_seqlen_k=8, **tensors)


def test_one_buffer_elsewhere():
    q, k, v = qkv()
    out, lse = strobe.attention(q, k, v, return_lse=True)
    grads = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    for name in grads:
        with pytest.raises(ValueError, match=f"{name}: is on meta, but q is on cpu"):
            strobe.attention_backward(out, q, k, v, out, lse, **{**grads, name: grads[name].to("meta")})
    with pytest.raises(ValueError, match="lse: is on meta, but q is on cpu"):
        strobe.attention_backward(out, q, k, v, out, lse.to("meta"), **grads)


@pytest.mark.parametrize("no_tensor", [torch.randn(2, 8, 2, 16).numpy(), [[1.0]], None, 3.0], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("options", [{}, {"window_size": (2, 2)}, {"deterministic": True}, {"return_lse": True}], ids=str)
def test_no_tensor(no_tensor, options):
    for name in "qkv":
        for grad, requires_grad in ((False, False), (True, False), (True, True)):
            tensors = {n: x.requires_grad_(requires_grad) for n, x in zip("qkv", qkv())} | {name: no_tensor}
            with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"^{name}: is a .*; it must be a torch tensor"):
                strobe.attention(**tensors, **options)


@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
def test_no_tensor_among_the_options(name):
    longest = {f"max_seqlen_{name[-1]}": 8} if name.startswith("cu") else {}
    with pytest.raises(TypeError, match=f"^{name}: is a list; it must be a torch tensor"):
        call(**{name: [0, 8, 16]}, **longest)
    if name == "alibi_slopes":
        with pytest.raises(TypeError, match=name):
            flash_attn_func(*qkv(), alibi_slopes=[0.5] * 4)


@pytest.mark.parametrize("value", [5, None, (1, 2, 3)], ids=str)
def test_no_pair(value):
    with pytest.raises(TypeError, match=r"window_size: is .*; it must be two integers, \(left, right\)"):
        call(window_size=value)
    if value is not None:
        with pytest.raises(TypeError, match="positions: is .*; it must be two integers"):
            call(positions=value)
        with pytest.raises(TypeError, match="rng_state: is .*; it must be two integers"):
            call(dropout_p=0.1, rng_state=value)


def test_unknown_and_missing_arguments():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="dropout"):
        strobe.attention(q, k, v, dropout=0.1)
    with pytest.raises(TypeError, match="'v'"):
        strobe.attention(q, k)
    with pytest.raises(TypeError, match="positional"):
        strobe.attention(q, k, v, True)


def test_no_dense_tensor():
    """torch's dispatcher knows no kernel and names the operator."""
    q, k, v = qkv()
    for grad in (False, True):
        with pytest.raises(NotImplementedError, match="strobe::attention"):
            strobe.attention(q.requires_grad_(grad), k.to_sparse(), v)


def test_no_second_derivative():
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(strobe.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"return_lse": True}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("name", ["q", "v", "bias"])
def test_no_forward_mode(name, options):
    """A derivative that would silently be zero."""
    tensors = dict(zip("qkv", qkv())) | ({"bias": torch.randn(8, 8)} if name == "bias" else {})
    x = tensors.pop(name)
    message = "forward-mode derivatives"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda x: strobe.attention(**tensors, **{name: x}, **options), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=message):
                strobe.attention(**tensors, **{name: dual}, **options)
        strobe.attention(**tensors, **{name: x}, **options)


def test_merge_is_not_differentiable():
    outs, lses = torch.randn(2, 1, 3, 2, 4, requires_grad=True), torch.randn(2, 1, 2, 3)
    with pytest.raises(NotImplementedError, match="lse_merge is not differentiable"):
        strobe.merge(outs, lses)[0].sum().backward()


def test_merge_refusals():
    with pytest.raises(ValueError, match="lses: has 1 parts, outs has 2"):
        strobe.merge(torch.randn(2, 1, 3, 2, 4), torch.randn(1, 1, 2, 3))


def test_outputs_in_place_are_checked():
    q, k, v = qkv()
    out, lse = strobe.attention(q, k, v, return_lse=True)
    grads = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    with pytest.raises(ValueError, match="dk: shape is"):
        strobe.attention_backward(out, q, k, v, out, lse, **{**grads, "dk": torch.empty(2, 9, 2, 16)})
    with pytest.raises(ValueError, match="dv: overlaps dk"):
        strobe.attention_backward(out, q, k, v, out, lse, **{**grads, "dv": grads["dk"]})
    with pytest.raises(ValueError, match="accumulate: is set while dq is bf16"):
        low = [x.bfloat16() for x in (out, q, k, v, out)]
        strobe.attention_backward(*low, lse, **{n: g.bfloat16() for n, g in grads.items()}, accumulate=True)


def test_scaled_dot_product_attention_refusals():
    q = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match="attn_mask: is given beside is_causal"):
        strobe.scaled_dot_product_attention(q, q, q, torch.ones(8, 8, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="query: has 5 dimensions"):
        strobe.scaled_dot_product_attention(q[None], q[None], q[None])
    with pytest.raises(ValueError, match="key: has 3 dimensions, query has 4"):
        strobe.scaled_dot_product_attention(q, q[0], q[0])
    with pytest.raises(ValueError, match="enable_gqa"):
        strobe.scaled_dot_product_attention(q, q[:, :2], q[:, :2])


def test_flash_attn_names_refuse_alike():
    q, k, v = qkv(torch.float64)
    with pytest.raises(ValueError, match="q: dtype is float64"):
        flash_attn_func(q, k, v)
