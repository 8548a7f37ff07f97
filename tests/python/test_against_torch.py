"""strobe's C ABI against PyTorch on the CPU: scaled_dot_product_attention where it has the feature, plain torch operations
elsewhere, all in float64 with autograd. Nothing of strobe's own specification is used here."""

import itertools
import math
import subprocess

import pytest
import torch

import strobe_c as strobe

LIB = strobe.load()
# An implementation in the working dtype is off by roundings of inputs' products, probabilities and results.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def make(dtype, batch=2, seqlen_q=37, seqlen_k=53, heads=4, heads_k=2, dim=32, dim_v=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    dim_v = dim_v or dim
    return (normal(batch, seqlen_q, heads, dim), normal(batch, seqlen_k, heads_k, dim), normal(batch, seqlen_k, heads_k, dim_v),
            normal(batch, seqlen_q, heads, dim_v))


def expanded(t, heads):
    """(B, S, Hk, D) as (B, H, S, D)."""
    return t.transpose(1, 2).repeat_interleave(heads // t.shape[2], dim=1)


def visible(seqlen_q, seqlen_k, left=-1, right=-1, diagonal=None):
    """The band mask, bottom-right aligned unless a diagonal is given."""
    diagonal = seqlen_k - seqlen_q if diagonal is None else diagonal
    i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None, :]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        mask &= j >= i + diagonal - left
    if right >= 0:
        mask &= j <= i + diagonal + right
    return mask


def plain_attention(q, k, v, mask, scale=None, softcap=0.0, slopes=None, bias=None, keep=None, dropout_p=0.0, diagonal=None):
    """out (B, S, H, Dv) and lse (B, H, S) of float64 inputs."""
    heads, seqlen_q, seqlen_k = q.shape[2], q.shape[1], k.shape[1]
    diagonal = seqlen_k - seqlen_q if diagonal is None else diagonal
    s = q.transpose(1, 2) @ expanded(k, heads).transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if slopes is not None:
        distance = (torch.arange(seqlen_q)[:, None] + diagonal - torch.arange(seqlen_k)[None, :]).abs()
        s = s - slopes.double().reshape(-1, heads, 1, 1) * distance
    s = s.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(s, dim=-1)
    p = torch.where(mask.any(-1)[:, None], torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None]), torch.zeros(()).double())
    if keep is not None:
        p = p * keep / (1 - round(dropout_p * 65536) / 65536)
    return (p @ expanded(v, heads)).transpose(1, 2), lse


def compare(name, ours, truth, tolerance):
    error = (ours.double() - truth).abs().max().item() if ours.numel() else 0.0
    size = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    assert error <= tolerance * size, f"{name}: off by {error:.3g} of {size:.3g}"


def check(dtype, q, k, v, dout, mask, with_dlse=False, **options):
    """Forward and all gradients of one call."""
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    bias = options.get("bias")
    bias64 = None if bias is None else bias.double().requires_grad_()
    keep = strobe.dropout_mask(LIB, q, k, v, **options) if options.get("dropout_p") else None
    diagonal = options.get("q_position", 0) - options.get("k_position", 0) if "q_position" in options else None
    out, lse = plain_attention(*inputs, mask, options.get("softmax_scale"), options.get("softcap", 0.0),
                               options.get("alibi_slopes"), bias64, keep, options.get("dropout_p", 0.0), diagonal)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(9)) if with_dlse else None
    loss = (out * dout.double()).sum()
    if with_dlse:
        seen = torch.isfinite(lse)
        loss = loss + (lse[seen] * dlse.double()[seen]).sum()
    wanted = torch.autograd.grad(loss, inputs + ([bias64] if bias64 is not None else []))

    our_out, our_lse = strobe.forward(LIB, q, k, v, **options)
    tolerance = TOLERANCE[dtype]
    compare("out", our_out, out.detach(), tolerance)
    finite = torch.isfinite(lse)
    assert torch.equal(torch.isneginf(our_lse), ~finite)
    compare("lse", our_lse[finite], lse.detach()[finite], 1e-5)
    ours = strobe.backward(LIB, q, k, v, our_out, our_lse, dout, dlse, **options)
    for name, mine, truth in zip(("dq", "dk", "dv", "dbias"), ours, wanted):
        compare(name, mine, truth, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [1, 32, 59, 64, 128, 256])
@pytest.mark.parametrize("heads,heads_k", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(dtype, dim, heads, heads_k, causal):
    q, k, v, dout = make(dtype, heads=heads, heads_k=heads_k, dim=dim)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    mask = visible(q.shape[1], k.shape[1], right=0 if causal else -1)
    out = torch.nn.functional.scaled_dot_product_attention(inputs[0].transpose(1, 2), expanded(inputs[1], heads),
                                                           expanded(inputs[2], heads), attn_mask=mask).transpose(1, 2)
    wanted = torch.autograd.grad((out * dout.double()).sum(), inputs)
    our_out, our_lse = strobe.forward(LIB, q, k, v, causal=int(causal))
    compare("out", our_out, out.detach(), TOLERANCE[dtype])
    for name, mine, truth in zip(("dq", "dk", "dv"), strobe.backward(LIB, q, k, v, our_out, our_lse, dout, causal=int(causal)), wanted):
        compare(name, mine, truth, TOLERANCE[dtype])


OPTIONS = {
    "causal": dict(window_right=0),
    "window": dict(window_left=11, window_right=3),
    "left": dict(window_left=7),
    "scale": dict(softmax_scale=0.31),
    "softcap": dict(softcap=1.7),
    "alibi": dict(alibi_slopes="h"),
    "alibi_bh": dict(alibi_slopes="bh"),
    "bias": dict(bias=(2, 4, 37, 53)),
    "bias_heads": dict(bias=(1, 4, 37, 53)),
    "bias_keys": dict(bias=(2, 1, 1, 53)),
    "dropout": dict(dropout_p=0.2, dropout_seed=1234, dropout_offset=5),
    "positions": dict(q_position=20, k_position=9),
    "dlse": dict(with_dlse=True),
    "head_dim_v": dict(dim_v=19),
}
PAIRS = [pair for pair in itertools.combinations_with_replacement(OPTIONS, 2)
         if pair[0] == pair[1] or not set(OPTIONS[pair[0]]) & set(OPTIONS[pair[1]])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_options_and_pairs(dtype, names):
    options = {**OPTIONS[names[0]], **OPTIONS[names[1]]}
    q, k, v, dout = make(dtype, dim_v=options.pop("dim_v", None))
    g = torch.Generator().manual_seed(3)
    if isinstance(options.get("bias"), tuple):
        options["bias"] = torch.randn(options["bias"], generator=g)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = 0.2 * torch.rand((4,) if options["alibi_slopes"] == "h" else (2, 4), generator=g)
    diagonal = options["q_position"] - options["k_position"] if "q_position" in options else None
    mask = visible(37, 53, options.get("window_left", -1), options.get("window_right", -1), diagonal)
    check(dtype, q, k, v, dout, mask, **options)


@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 239), (3, 799), (113, 203), (128, 217), (113, 211), (108, 256), (203, 113)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_shapes(dtype, seqlen_q, seqlen_k):
    q, k, v, dout = make(dtype, 1, seqlen_q, seqlen_k, dim=64)
    check(dtype, q, k, v, dout, visible(seqlen_q, seqlen_k, right=0), causal=1)


def test_rows_that_see_no_key():
    q, k, v, dout = make(torch.float32, seqlen_q=20, seqlen_k=7)
    check(torch.float32, q, k, v, dout, visible(20, 7, right=0), causal=1)
    out, lse = strobe.forward(LIB, q, k, v, causal=1)
    assert (out[:, :13] == 0).all() and torch.isneginf(lse[:, :, :13]).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [0, 1])
def test_varlen_is_each_sequence_on_its_own(dtype, causal):
    lengths_q, lengths_k = [5, 0, 33, 1, 17], [9, 4, 33, 0, 40]
    cu = lambda lengths: torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v, dout = make(dtype, 1, sum(lengths_q), 1)
    _, k, v, _ = make(dtype, 1, 1, sum(lengths_k), seed=1)
    options = dict(cu_seqlens_q=cu(lengths_q), cu_seqlens_k=cu(lengths_k), max_seqlen_q=33, max_seqlen_k=40, causal=causal)
    flat = [t[0].contiguous() for t in (q, k, v, dout)]
    out, lse = strobe.forward(LIB, *flat[:3], **options)
    gradients = strobe.backward(LIB, *flat[:3], out, lse, flat[3], **options)
    begin_q = begin_k = 0
    for length_q, length_k in zip(lengths_q, lengths_k):
        rows_q, rows_k = slice(begin_q, begin_q + length_q), slice(begin_k, begin_k + length_k)
        begin_q, begin_k = begin_q + length_q, begin_k + length_k
        inputs = [t[None, rows].double().requires_grad_() for t, rows in zip(flat, (rows_q, rows_k, rows_k))]
        mask = visible(length_q, length_k, right=0 if causal else -1)
        if length_k == 0:
            assert (out[rows_q] == 0).all() and torch.isneginf(lse[:, rows_q]).all() and (gradients[0][rows_q] == 0).all()
            continue
        truth, truth_lse = plain_attention(*inputs, mask)
        wanted = torch.autograd.grad((truth * flat[3][None, rows_q].double()).sum(), inputs)
        compare("out", out[rows_q], truth[0].detach(), TOLERANCE[dtype])
        finite = torch.isfinite(truth_lse[0])
        compare("lse", lse[:, rows_q][finite], truth_lse[0].detach()[finite], 1e-5)
        for name, mine, rows, want in zip(("dq", "dk", "dv"), gradients, (rows_q, rows_k, rows_k), wanted):
            compare(name, mine[rows], want[0], TOLERANCE[dtype])


def test_seqused_counts_the_first_rows():
    q, k, v, dout = make(torch.float32)
    used_q, used_k = torch.tensor([37, 11], dtype=torch.int32), torch.tensor([20, 53], dtype=torch.int32)
    out, lse = strobe.forward(LIB, q, k, v, causal=1, seqused_q=used_q, seqused_k=used_k)
    gradients = strobe.backward(LIB, q, k, v, out, lse, dout, causal=1, seqused_q=used_q, seqused_k=used_k)
    for b in range(2):
        n_q, n_k = used_q[b].item(), used_k[b].item()
        inputs = [t[b : b + 1, :n].double().requires_grad_() for t, n in ((q, n_q), (k, n_k), (v, n_k))]
        truth, truth_lse = plain_attention(*inputs, visible(n_q, n_k, right=0))
        wanted = torch.autograd.grad((truth * dout[b : b + 1, :n_q].double()).sum(), inputs)
        compare("out", out[b, :n_q], truth[0].detach(), 2e-5)
        assert (out[b, n_q:] == 0).all() and torch.isneginf(lse[b, :, n_q:]).all()
        for name, mine, n, want in zip(("dq", "dk", "dv"), gradients, (n_q, n_k, n_k), wanted):
            compare(name, mine[b, :n], want[0], 2e-5)
            assert (mine[b, n:] == 0).all(), name


def test_strided_views():
    qkv = torch.randn(2, 33, 3, 4, 40)
    q, k, v = qkv.unbind(2)
    dense = [t.contiguous() for t in (q, k, v)]
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    expected = strobe.forward(LIB, *dense)
    for views in ((q, k, v), transposed):
        for mine, truth in zip(strobe.forward(LIB, *views), expected):
            assert torch.equal(mine, truth)


def test_attention_is_linear_in_its_output_gradient():
    q, k, v, dout = make(torch.float32)
    out, lse = strobe.forward(LIB, q, k, v)
    once, twice = strobe.backward(LIB, q, k, v, out, lse, dout), strobe.backward(LIB, q, k, v, out, lse, 2 * dout)
    for a, b in zip(once[:3], twice[:3]):
        assert torch.equal(2 * a, b)


def test_errors_carry_their_text():
    q, k, v, _ = make(torch.float32)
    with pytest.raises(strobe.Error, match="softcap: is -1"):
        strobe.forward(LIB, q, k, v, softcap=-1.0)


def test_the_library_exports_its_interface_and_nothing_else():
    symbols = subprocess.run(["nm", "-D", "--defined-only", strobe.library_path()], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1] for line in symbols.splitlines()}
    header = (strobe.ROOT / "include" / "strobe" / "strobe.h").read_text()
    declared = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if line.startswith("STROBE_API")}
    assert declared <= names
    assert not {n for n in names - declared if not n.startswith("_")}, "more than the C ABI is visible"
