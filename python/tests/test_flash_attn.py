"""FlashAttention-2's and -3's names: signatures, conventions, private functions, padding helpers, rotary embedding."""

import inspect
import subprocess
import sys

import pytest
import reference
import torch

import strobe
from strobe import flash_attn_3
from strobe.flash_attn import bert_padding, flash_attn_interface
from strobe.flash_attn.layers import rotary

TAIL = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None,
    "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], TAIL),
    "flash_attn_kvpacked_func": (["q", "kv"], TAIL),
    "flash_attn_qkvpacked_func": (["qkv"], TAIL),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], {**TAIL, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], TAIL),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], TAIL),
    "_flash_attn_forward": (
        "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax".split(), {},
    ),
    "_flash_attn_backward": (
        ("dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right softcap "
         "alibi_slopes deterministic").split(), {"rng_state": None},
    ),
    "_flash_attn_varlen_forward": (
        ["q", "k", "v", *LENGTHS, "dropout_p", "softmax_scale", "causal"],
        {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
         "block_table": None, "leftpad_k": None, "seqused_k": None, "zero_tensors": False},
    ),
    "_flash_attn_varlen_backward": (
        ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *LENGTHS, "dropout_p", "softmax_scale", "causal",
         "window_size_left", "window_size_right", "softcap", "alibi_slopes", "deterministic"],
        {"rng_state": None, "zero_tensors": False},
    ),
}  # fmt: skip
FA3_TAIL = {
    "softmax_scale": None, "causal": False, "qv": None, "q_descale": None, "k_descale": None, "v_descale": None,
    "window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0, "num_splits": 1, "pack_gqa": None,
    "deterministic": False, "sm_margin": 0, "return_attn_probs": False,
}  # fmt: skip
FA3_SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], FA3_TAIL),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], {"seqused_q": None, "seqused_k": None, **FA3_TAIL}),
}


def check_signature(function, required, defaults):
    parameters = inspect.signature(function).parameters
    assert [(n, p.default) for n, p in parameters.items()] == [(n, REQUIRED) for n in required] + list(defaults.items())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    check_signature(getattr(flash_attn_interface, name), *SIGNATURES[name])
    if not name.startswith("_"):
        assert getattr(strobe.flash_attn, name) is getattr(flash_attn_interface, name)


@pytest.mark.parametrize("name", FA3_SIGNATURES)
def test_signatures_of_version_3(name):
    check_signature(getattr(flash_attn_3, name), *FA3_SIGNATURES[name])


def qkv(batch=2, rows=17, cols=17, heads=4, heads_k=2, dim=16, dtype=torch.float32, device="cpu"):
    return [
        torch.randn(batch, n, h, dim).to(device=device, dtype=dtype).requires_grad_()
        for n, h in ((rows, heads), (cols, heads_k), (cols, heads_k))
    ]


@pytest.mark.parametrize("window_size", [(-1, -1), torch.tensor([4, 2]), (300, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients(window_size, causal, device):
    tensors = qkv(device=device)
    slopes = torch.rand(4, device=device, requires_grad=True)
    out = strobe.flash_attn.flash_attn_func(*tensors, causal=causal, window_size=window_size, alibi_slopes=slopes, softcap=3.0)
    double = [x.detach().double().requires_grad_() for x in tensors]
    window = tuple(int(x) for x in window_size)
    exact, _ = reference.attention(
        *double, causal=causal, window_size=(window[0], -1 if causal else window[1]), alibi_slopes=slopes.detach(), softcap=3.0
    )
    dout = torch.randn_like(out)
    reference.near(out, exact)
    for a, b in zip(torch.autograd.grad(out, tensors, dout), torch.autograd.grad(exact, double, dout.double())):
        reference.near(a, b)


def test_packed_forms_are_the_same_call(device):
    qkv_packed = torch.randn(2, 9, 3, 4, 16, device=device, requires_grad=True)
    kv = torch.randn(2, 9, 2, 2, 16, device=device, requires_grad=True)
    q = torch.randn(2, 9, 4, 16, device=device)
    f = strobe.flash_attn
    whole = f.flash_attn_qkvpacked_func(qkv_packed, causal=True)
    torch.testing.assert_close(whole, f.flash_attn_func(*qkv_packed.unbind(2), causal=True), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(whole.square().sum(), qkv_packed)
    assert grad.shape == qkv_packed.shape and grad.abs().sum() > 0
    torch.testing.assert_close(f.flash_attn_kvpacked_func(q, kv), f.flash_attn_func(q, *kv.unbind(2)), rtol=0, atol=0)
    cu = torch.tensor([0, 9, 18], dtype=torch.int32, device=device)
    flat = f.flash_attn_varlen_qkvpacked_func(qkv_packed.flatten(0, 1), cu, 9, causal=True)
    reference.near(flat.view_as(whole), whole)
    flat = f.flash_attn_varlen_kvpacked_func(q.flatten(0, 1), kv.flatten(0, 1), cu, cu, 9, torch.tensor(9))
    reference.near(flat.view(2, 9, 4, 16), f.flash_attn_kvpacked_func(q, kv))


def test_padded_copies_of_odd_inputs(device):
    """The original copies what has no unit stride, and takes head dims that are no multiple of 8."""
    q, k, v = (torch.randn(2, 9, 59, 4, device=device).transpose(2, 3) for _ in range(3))
    out = strobe.flash_attn.flash_attn_func(q, k, v)
    reference.near(out, reference.attention(*(x.double() for x in (q, k, v)))[0])


def test_log_sum_exp_is_infinite_on_empty_rows(device):
    q, k, v = qkv(rows=9, cols=5, device=device)
    out, lse, s_dmask = strobe.flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse.shape == (2, 4, 9) and s_dmask.numel() == 0
    assert (lse[:, :, :4] == torch.inf).all() and torch.isfinite(lse[:, :, 4:]).all() and (out[:, :4] == 0).all()
    out, lse = flash_attn_3.flash_attn_func(q, k, v, None, True, return_attn_probs=True)
    assert (lse[:, :, :4] == -torch.inf).all()


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_s_dmask(varlen, causal, device):
    """Decoded as FlashAttention-2's tests do it, S_dmask gives the dropout mask and the probabilities of the call."""
    p, rows = 0.3, 150
    tensors = qkv(rows=rows, cols=rows, device=device)
    if varlen:
        cu = torch.tensor([0, rows, 2 * rows], dtype=torch.int32, device=device)
        flat = [x.flatten(0, 1) for x in tensors]
        out, lse, s_dmask = strobe.flash_attn.flash_attn_varlen_func(
            *flat, cu, cu, rows, rows, dropout_p=p, causal=causal, return_attn_probs=True
        )
        out, lse = out.view(2, rows, 4, 16), lse.view(4, 2, rows).transpose(0, 1)
    else:
        out, lse, s_dmask = strobe.flash_attn.flash_attn_func(*tensors, dropout_p=p, causal=causal, return_attn_probs=True)
    assert s_dmask.shape == (2, 4, 256, 256)
    seen, _ = reference.visible(rows, rows, causal, device=device)
    signed = s_dmask[:, :, :rows, :rows]
    keep = signed >= 0
    exact, exact_lse = reference.attention(*(x.double() for x in tensors), causal=causal, keep=keep, dropout_p=p)
    reference.near(out, exact)
    reference.near(lse, exact_lse)
    assert abs((~keep & seen).sum() / seen.expand_as(keep).sum() - p) < 0.02
    weights = signed.abs() * seen
    assert torch.allclose(weights.amax(-1), torch.ones_like(weights.amax(-1)))


def test_private_functions(device):
    q, k, v = (x.detach() for x in qkv(device=device))
    common = dict(
        dropout_p=0.2, softmax_scale=0.25, causal=True, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None
    )
    torch.manual_seed(1)
    out, lse, s_dmask, rng_state = flash_attn_interface._flash_attn_forward(q, k, v, **common, return_softmax=True)
    assert not out.requires_grad and s_dmask.shape == (2, 4, 128, 128) and rng_state.shape == (2,)
    leaves = [x.requires_grad_() for x in (q.clone(), k.clone(), v.clone())]
    torch.manual_seed(1)
    expected = strobe.flash_attn.flash_attn_func(*leaves, 0.2, 0.25, True)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    delta = flash_attn_interface._flash_attn_backward(
        dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=buffers[0], dk=buffers[1], dv=buffers[2], deterministic=True,
        rng_state=rng_state, **common,
    )  # fmt: skip
    for a, b in zip(buffers, torch.autograd.grad(expected, leaves, dout)):
        reference.near(a, b)
    reference.near(delta, (dout.float() * out.float()).sum(-1).transpose(1, 2))
    with pytest.raises(ValueError, match="rng_state: is not given"):
        flash_attn_interface._flash_attn_backward(dout, q, k, v, out, lse, *buffers, *common.values(), False)

    cu = torch.tensor([0, 17, 34], dtype=torch.int32, device=device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    common["dropout_p"] = 0.0
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=17, max_seqlen_k=17)
    out, lse, _, rng_state = flash_attn_interface._flash_attn_varlen_forward(*flat, **lengths, **common)
    assert lse.shape == (4, 34) and (rng_state == 0).all()
    buffers = [torch.empty_like(x) for x in flat]
    flash_attn_interface._flash_attn_varlen_backward(
        dout.flatten(0, 1), *flat, out, lse, *buffers, **lengths, **common, deterministic=False
    )
    expected = strobe.flash_attn.flash_attn_func(*leaves, 0.0, 0.25, True)
    reference.near(out.view_as(expected), expected)
    for a, b in zip(buffers, torch.autograd.grad(expected, leaves, dout)):
        reference.near(a.view_as(b), b)


def test_ring_of_private_functions(device):
    """Blocks of keys through the private functions, with a row that sees no key in one of them: the +inf convention holds."""
    q, k, v = (x.detach() for x in qkv(rows=6, cols=12, heads=2, device=device))
    common = dict(
        dropout_p=0.0, softmax_scale=0.25, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None
    )
    out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, **common, return_softmax=False)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*leaves, softmax_scale=0.25)[0]
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(exact, leaves, dout.double())
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in (slice(0, 6), slice(6, 12)):
        block = [torch.empty_like(q), torch.empty_like(k[:, rows]), torch.empty_like(v[:, rows])]
        flash_attn_interface._flash_attn_backward(
            dout, q, k[:, rows], v[:, rows], out, lse, *block, **common, deterministic=False
        )
        dq += block[0]
        dk[:, rows], dv[:, rows] = block[1:]
    for a, b in zip((dq, dk, dv), expected):
        reference.near(a, b)


def test_version_3(device):
    q, k, v = (x.detach() for x in qkv(rows=9, cols=9, device=device))
    reference.near(flash_attn_3.flash_attn_func(q, k, v, 0.5, True), strobe.attention(q, k, v, softmax_scale=0.5, causal=True))
    cu = torch.tensor([0, 9, 18], dtype=torch.int32, device=device)
    used = torch.tensor([9, 4], dtype=torch.int32, device=device)
    flat = flash_attn_3.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 9, 9, None, used)
    reference.near(flat.view_as(q)[1], strobe.attention(q[1:], k[1:, :4], v[1:, :4])[0])
    with pytest.raises(NotImplementedError, match="q_descale: is not supported"):
        flash_attn_3.flash_attn_func(q, k, v, q_descale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="attention_chunk"):
        flash_attn_3.flash_attn_func(q, k, v, attention_chunk=4)
    out, lse, *_ = flash_attn_3._flash_attn_forward(q, k, v, softmax_scale=0.25)
    dq, dk, dv, _ = flash_attn_3._flash_attn_backward(torch.ones_like(out), q, k, v, out, lse, softmax_scale=0.25)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    for a, b in zip((dq, dk, dv), torch.autograd.grad(reference.attention(*leaves)[0].sum(), leaves)):
        reference.near(a, b)
    parts = [strobe.attention(q, k[:, r], v[:, r], out_dtype=torch.float32, return_lse=True) for r in (slice(0, 4), slice(4, 9))]
    outs, lses = (torch.stack(x) for x in zip(*parts))
    merged, merged_lse = flash_attn_3.flash_attn_combine(outs, lses.transpose(-1, -2))
    reference.near(strobe.attention(q, k, v), merged)
    assert merged_lse.shape == (2, 9, 4)


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn.flash_attn_interface", "flash_attn_3"])
def test_kv_cache_is_refused(module):
    import importlib

    module = importlib.import_module(f"strobe.{module}")
    with pytest.raises(AttributeError, match="KV cache is not supported"):
        module.flash_attn_with_kvcache  # noqa: B018
    with pytest.raises(ImportError, match="flash_attn_with_kvcache"):
        exec(f"from {module.__name__} import flash_attn_with_kvcache")
    assert not hasattr(module, "flash_attn_with_kvcache")


def test_paged_keys_are_refused():
    q = torch.randn(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="block_table"):
        strobe.flash_attn.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4, block_table=torch.zeros(1, 1))


INSTALL = """
import strobe, sys
strobe.install_as("flash_attn"); strobe.install_as("flash_attn_interface"); strobe.install_as("flash_attn")
import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _get_block_size_n
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import apply_rotary_emb
import flash_attn_interface
assert flash_attn is strobe.flash_attn and flash_attn_interface is strobe.flash_attn_3 and flash_attn.__version__ >= "2.7"
assert flash_attn_interface.flash_attn_func is not flash_attn_func
try:
    strobe.install_as("xformers")
except ValueError as e:
    assert "flash_attn" in str(e)
else:
    raise SystemExit("a name that strobe does not stand in for was accepted")
import types; sys.modules["flash_attn"] = types.ModuleType("flash_attn")
try:
    strobe.install_as("flash_attn")
except RuntimeError as e:
    assert "imported already" in str(e)
else:
    raise SystemExit("another package was replaced")
"""


def test_install_as():
    result = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{INSTALL}"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_bert_padding(device):
    x = torch.randn(3, 7, 2, 5, device=device, requires_grad=True)
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7, [0] * 3 + [1] * 4], device=device)
    unpadded, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 5, 12, 16] and cu_seqlens.dtype == torch.int32 and longest == 7
    assert used.tolist() == [5, 7, 4] and torch.equal(unpadded, x[mask.bool()])
    padded = bert_padding.pad_input(unpadded, indices, 3, 7)
    assert torch.equal(padded, x * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, mask[:, :, None, None].expand_as(x).float())
    unused = torch.zeros_like(mask)
    unused[0, 5] = 1
    unpadded, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert cu_seqlens.tolist() == [0, 6, 13, 17] and used.tolist() == [5, 7, 4] and unpadded.shape[0] == 17
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]], device=device)
    unpadded, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 12, 13, 14] and longest == 7 and unpadded.shape[0] == 14


def rotate_as_complex(x, angles, interleaved):
    """Rotary embedding by its definition: pairs of channels are complex numbers, multiplied by exp(i angle)."""
    half = angles.shape[-1]
    pairs = x[..., : 2 * half].double()
    pairs = pairs.unflatten(-1, (half, 2)) if interleaved else torch.stack(pairs.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    turned = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
    return torch.cat((turned, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved, device):
    table = torch.outer(torch.arange(40, dtype=torch.float64, device=device), 10000.0 ** -(torch.arange(6, device=device) / 6))
    cos, sin = table.cos().float(), table.sin().float()
    x = torch.randn(2, 9, 3, 16, device=device)
    ours = rotary.apply_rotary_emb(x, cos, sin, interleaved)
    torch.testing.assert_close(ours.double(), rotate_as_complex(x, table[:9, None], interleaved), atol=1e-5, rtol=1e-5)
    offsets = torch.tensor([4, 20], device=device)
    ours = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    expected = torch.stack([rotate_as_complex(x[b], table[o : o + 9, None], interleaved) for b, o in enumerate((4, 20))])
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    cu = torch.tensor([0, 5, 5, 18], dtype=torch.int32, device=device)
    flat = x.flatten(0, 1).clone()
    expected = torch.cat([rotate_as_complex(flat[a:b], table[: b - a, None], interleaved) for a, b in ((0, 5), (5, 18))])
    ours = rotary.apply_rotary_emb(flat, cos, sin, interleaved, inplace=True, cu_seqlens=cu, max_seqlen=13)
    assert ours is flat
    torch.testing.assert_close(flat.double(), expected, atol=1e-5, rtol=1e-5)


def test_rotary_module(device):
    module = rotary.RotaryEmbedding(8, device=device)
    qkv_packed = torch.randn(2, 9, 3, 2, 16, device=device)
    table = torch.outer(torch.arange(12, dtype=torch.float64, device=device), 10000.0 ** -(torch.arange(4, device=device) / 4))
    ours = module(qkv_packed, seqlen_offset=3)
    for i in (0, 1):
        expected = rotate_as_complex(qkv_packed[:, :, i], table[3:, None], False)
        torch.testing.assert_close(ours[:, :, i].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[:, :, 2], qkv_packed[:, :, 2])
    q, kv = module(qkv_packed[:, :, 0], qkv_packed[:, :, 1:], seqlen_offset=3)
    torch.testing.assert_close(q, ours[:, :, 0])
    torch.testing.assert_close(kv, ours[:, :, 1:])
    mixed = torch.randn(2, 9, 4, 16, device=device)
    ours = module(mixed, num_heads_q=2)
    torch.testing.assert_close(ours[:, :, :2].double(), rotate_as_complex(mixed[:, :, :2], table[:9, None], False), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[:, :, 3], mixed[:, :, 3])
    scaled = rotary.RotaryEmbedding(8, scale_base=512, device=device)(qkv_packed)
    plain = module(qkv_packed)
    torch.testing.assert_close(
        (scaled[:, :, 0] * scaled[:, :, 1]).sum(-1)[:, 4], (plain[:, :, 0] * plain[:, :, 1]).sum(-1)[:, 4], atol=1e-4, rtol=1e-4
    )


def test_block_size_covers_a_row():
    scores = torch.randn(3, 5)
    block = flash_attn_interface._get_block_size_n(torch.device("cpu"), 64, True, False)
    assert len(scores.split(block, dim=-1)) == 1
