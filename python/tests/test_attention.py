"""strobe.attention against float64, feature by feature: values, log-sum-exp, every gradient."""

import sys
import threading
import time

import pytest
import reference
import torch

import strobe

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch=2, rows=33, cols=41, heads=4, heads_k=2, dim=32, dim_v=None, dtype=torch.float32, device="cpu"):
    def randn(*shape):
        return torch.randn(*shape).to(device=device, dtype=dtype)

    return {
        "q": randn(batch, rows, heads, dim),
        "k": randn(batch, cols, heads_k, dim),
        "v": randn(batch, cols, heads_k, dim if dim_v is None else dim_v),
    }


def check(tensors, extra=None, options=None, reference_options=None):
    """extra: further tensors, bias and alibi_slopes."""
    tensors, options = {**tensors, **(extra or {})}, options or {}
    q, v = tensors["q"], tensors["v"]
    dout = torch.randn(*q.shape[:-1], v.shape[-1]).to(q)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1]).to(q.device)

    def plain(**t):
        return reference.attention(**t, **(options if reference_options is None else reference_options))

    def ours(**t):
        return strobe.attention(**t, **options, return_lse=True)

    # A row that sees no key has no gradient through its log-sum-exp.
    empty = plain(**tensors)[1].isneginf()
    dlse = dlse.masked_fill(empty, 0.0)
    exact = reference.run(plain, tensors, dout, dlse, torch.float64)
    naive = reference.run(plain, tensors, dout, dlse)
    for result in (exact, naive):
        result.grads = {name: g.nan_to_num() if empty.any() else g for name, g in result.grads.items()}
    reference.compare(reference.run(ours, tensors, dout, dlse), exact, naive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_plain(dtype, causal, heads, device):
    check(make(heads=heads[0], heads_k=heads[1], dtype=dtype, device=device), options={"causal": causal})


@pytest.mark.parametrize("dim,dim_v", [(1, 1), (40, 40), (59, 59), (64, 64), (111, 111), (128, 128), (64, 32), (32, 96)])
def test_head_dims(dim, dim_v, device):
    check(make(batch=1, rows=19, cols=23, dim=dim, dim_v=dim_v, device=device), options={"causal": True})


@pytest.mark.parametrize("rows,cols", [(1, 1), (1, 65), (64, 64), (65, 63), (7, 130), (130, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(rows, cols, causal, device):
    check(make(rows=rows, cols=cols, dim=16, device=device), options={"causal": causal})


@pytest.mark.parametrize("window", [(0, 0), (3, 5), (-1, 2), (7, -1), (100, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window(window, dtype, device):
    check(make(dtype=dtype, device=device), options={"window_size": window})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_scale(dtype, device):
    check(make(dtype=dtype, device=device), options={"softcap": 1.5, "softmax_scale": 0.3, "causal": True})


@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi(per_batch, device):
    slopes = torch.rand(2, 4) if per_batch else torch.rand(4)
    check(make(device=device), {"alibi_slopes": slopes.to(device)}, {"causal": True})


@pytest.mark.parametrize("shape", [(2, 4, 33, 41), (1, 4, 33, 41), (2, 1, 1, 41), (1, 1, 33, 1), (4, 33, 41), (33, 41), (41,)], ids=str)
def test_bias_gradient(shape, device):
    check(make(device=device), {"bias": torch.randn(shape, device=device)}, {"causal": True})


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_dtypes(bias_dtype, device):
    bias = torch.randn(1, 4, 33, 41, device=device).to(bias_dtype)
    check(make(dtype=torch.bfloat16, device=device), {"bias": bias})


def test_masked_bias_rows(device):
    bias = torch.randn(2, 1, 33, 41, device=device)
    bias[0, :, 5] = -torch.inf
    bias[:, :, :, 30:] = -torch.inf
    tensors = make(device=device)
    out, lse = strobe.attention(**tensors, bias=bias, return_lse=True)
    exact, _ = reference.attention(**tensors, bias=bias)
    assert (out[0, 5] == 0).all() and (lse[0, :, 5] == -torch.inf).all()
    reference.near(out[1], exact[1])


@pytest.mark.parametrize("positions", [(0, 0), (10, 0), (0, 20), (50, 12)], ids=str)
def test_positions(positions, device):
    check(make(device=device), options={"causal": True, "positions": positions})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(dtype, device):
    p = 0.17
    tensors = make(dtype=dtype, device=device)
    state = strobe.attention(**tensors, dropout_p=p, return_rng_state=True)[1]
    assert state.dtype == torch.int64 and state.shape == (2,) and state.device.type == "cpu"
    keep = strobe.dropout_mask(state, p, (2, 4, 33, 41), device)
    assert 0.1 < 1 - keep.float().mean() < 0.25
    check(tensors, options={"dropout_p": p, "rng_state": state}, reference_options={"dropout_p": p, "keep": keep})


def test_dropout_state(device):
    tensors = make(device=device)
    torch.manual_seed(3)
    first, state = strobe.attention(**tensors, dropout_p=0.5, return_rng_state=True)
    torch.manual_seed(3)
    again = strobe.attention(**tensors, dropout_p=0.5)
    other = strobe.attention(**tensors, dropout_p=0.5)
    by_ints = strobe.attention(**tensors, dropout_p=0.5, rng_state=tuple(state.tolist()))
    assert torch.equal(first, again) and torch.equal(first, by_ints) and not torch.equal(first, other)
    assert strobe.attention(**tensors, return_rng_state=True)[1] is None


def test_a_fresh_dropout_state():
    """One word of torch's CPU generator and an offset of 0, wherever new tensors go by default."""
    torch.manual_seed(4)
    states = [strobe.new_rng_state() for _ in range(3)]
    torch.manual_seed(4)
    with torch.device("meta"):
        again = [strobe.new_rng_state() for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(states, again))
    assert len({seed for seed, _ in map(torch.Tensor.tolist, states)}) == 3 and all(offset == 0 for _, offset in states)


def test_dropout_with_another_default_device():
    tensors = make()
    expected = strobe.attention(**tensors, dropout_p=0.5, rng_state=(3, 1))
    with torch.device("meta"):
        out, state = strobe.attention(**tensors, dropout_p=0.5, return_rng_state=True)
        assert torch.equal(strobe.attention(**tensors, dropout_p=0.5, rng_state=(3, 1)), expected)
    assert torch.equal(strobe.attention(**tensors, dropout_p=0.5, rng_state=state), out)


@pytest.mark.parametrize("name", ["rng_state", "cu_seqlens_k", "alibi_slopes"])
def test_what_changes_before_the_backward_is_noticed(name, device):
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in make(cols=33, device=device).values())
    cu = torch.tensor([0, 33, 66], dtype=torch.int32, device=device)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu.clone(), "max_seqlen_q": 33, "max_seqlen_k": 33, "dropout_p": 0.5}
    options |= {"rng_state": torch.tensor([3, 1]), "alibi_slopes": torch.rand(4, device=device)}
    out = strobe.attention(q, k, v, **options)
    out.sum().backward(retain_graph=True)
    options[name][-1] -= 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_dropout_masks(device):
    """Each element is kept with its own chance, and a smaller mask is a corner of a larger one."""
    state = torch.tensor([-3, 2**62 + 5])
    whole = strobe.dropout_mask(state, 0.3, (2, 3, 100, 150), device)
    assert whole.dtype == torch.bool and whole.device.type == device
    assert torch.equal(whole[:, :, :37, :53], strobe.dropout_mask((-3, 2**62 + 5), 0.3, (2, 3, 37, 53), device))
    assert abs(whole.float().mean() - 0.7) < 0.01 and not torch.equal(whole[0], whole[1])
    assert strobe.dropout_mask(state, 0.0, (1, 1, 5, 5), device).all()
    with pytest.raises(ValueError, match="dropout_p: is 1"):
        strobe.dropout_mask(state, 1.0, (1, 1, 5, 5), device)


def test_varlen(device):
    lengths_q, lengths_k = [5, 0, 17, 1], [9, 3, 17, 0]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32, device=device) for x in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), 4, 16, device=device, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), 2, 16, device=device, requires_grad=True) for _ in range(2))
    out, lse = strobe.attention(
        q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=17, max_seqlen_k=17, return_lse=True
    )
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert lse.shape == (4, sum(lengths_q))
    pieces = []
    for b in range(4):
        rows, cols = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        piece = [x.detach()[s].double()[None].requires_grad_() for x, s in ((q, rows), (k, cols), (v, cols))]
        exact, exact_lse = reference.attention(*piece, causal=True)
        reference.near(out[rows], exact[0])
        torch.testing.assert_close(lse[:, rows].double(), exact_lse[0], atol=1e-5, rtol=1e-5)
        pieces.append([g[0].nan_to_num() for g in torch.autograd.grad(exact, piece, dout[rows].double()[None])])
    for ours, exact in zip(grads, zip(*pieces)):
        reference.near(ours, torch.cat(exact))


def test_seqused(device):
    t = make(rows=20, cols=20, device=device)
    used = torch.tensor([20, 11], dtype=torch.int32, device=device)
    out, lse = strobe.attention(**t, causal=True, seqused_q=used, seqused_k=used, return_lse=True)
    short, _ = reference.attention(t["q"][1:, :11], t["k"][1:, :11], t["v"][1:, :11], causal=True)
    reference.near(out[1:, :11], short)
    assert (out[1, 11:] == 0).all() and (lse[1, :, 11:] == -torch.inf).all()


@pytest.mark.parametrize("layout", ["bhsd", "packed", "sliced", "expanded"])
def test_strides(layout, device):
    if layout == "bhsd":
        q, k, v = (torch.randn(2, 3, 17, 16, device=device).transpose(1, 2) for _ in range(3))
    elif layout == "packed":
        q, k, v = torch.randn(2, 17, 3, 3, 16, device=device).unbind(2)
    elif layout == "sliced":
        q, k, v = (torch.randn(2, 34, 6, 48, device=device)[:, ::2, ::2, 16:32] for _ in range(3))
    else:
        q, k, v = (torch.randn(1, 17, 3, 16, device=device).expand(2, -1, -1, -1) for _ in range(3))
    check({"q": q, "k": k, "v": v}, options={"causal": True})
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = strobe.attention(*leaves, causal=True)
    dense = strobe.attention(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert torch.equal(out, dense)
    # A gradient with zero strides, and one whose last axis is not the fastest.
    out.sum().backward()
    grads = torch.autograd.grad(strobe.attention(*leaves), leaves, torch.ones_like(out).mT.contiguous().mT)
    assert all(torch.isfinite(g).all() for g in grads)


def test_only_the_log_sum_exp_is_used(device):
    t = {name: x.requires_grad_() for name, x in make(device=device).items()}
    _, lse = strobe.attention(**t, return_lse=True)
    grads = torch.autograd.grad(lse.square().sum(), list(t.values()))
    leaves = {n: x.detach().double().requires_grad_() for n, x in t.items()}
    exact = torch.autograd.grad(reference.attention(**leaves)[1].square().sum(), list(leaves.values()), allow_unused=True)
    reference.near(grads[0], exact[0])
    reference.near(grads[1], exact[1])
    assert (grads[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 33])
def test_the_result_is_the_same_whether_recorded_or_not(rows, dtype, device):
    """Without a graph no log-sum-exp is computed, which may take another kernel."""
    t = make(rows=rows, dtype=dtype, device=device)
    for options in ({}, {"causal": True}, {"window_size": (9, -1), "softcap": 3.0}, {"dropout_p": 0.3, "rng_state": (1, 2)}):
        plain = strobe.attention(**t, **options)
        with_lse, lse = strobe.attention(**t, **options, return_lse=True)
        leaves = {n: x.detach().requires_grad_() for n, x in t.items()}
        recorded = strobe.attention(**leaves, **options)
        assert not plain.requires_grad and recorded.requires_grad and lse.shape == (2, 4, rows)
        reference.near(plain, with_lse)
        assert torch.equal(recorded, with_lse)


def test_blocks_of_keys_merge_and_differentiate(device):
    """A ring of two: each block's forward in float32 is merged, each block's backward takes the merged result."""
    t = make(rows=24, cols=24, heads=2, heads_k=2, dtype=torch.bfloat16, device=device)
    whole = reference.run(lambda **x: reference.attention(**x, causal=True), t, torch.ones_like(t["q"]), None, torch.float64)
    parts = []
    for start in (0, 12):
        block = {"q": t["q"], "k": t["k"][:, start : start + 12], "v": t["v"][:, start : start + 12]}
        parts.append(
            strobe.attention(**block, causal=True, positions=(0, start), out_dtype=torch.float32, return_lse=True)
        )
    out, lse = strobe.merge(*zip(*parts))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), whole.out, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), whole.lse, atol=1e-2, rtol=0)
    dq = torch.zeros(t["q"].shape, device=device)
    dk, dv = (torch.zeros(t["k"].shape, device=device) for _ in range(2))
    for start in (0, 12):
        rows = slice(start, start + 12)
        strobe.attention_backward(
            torch.ones_like(t["q"]), t["q"], t["k"][:, rows], t["v"][:, rows], out, lse, dq=dq, dk=dk[:, rows], dv=dv[:, rows],
            accumulate=True, causal=True, positions=(0, start),
        )  # fmt: skip
    for ours, name in ((dq, "q"), (dk, "k"), (dv, "v")):
        torch.testing.assert_close(ours.double(), whole.grads[name], atol=3e-2, rtol=3e-2)


def test_deterministic_setting_of_torch_is_respected(device, monkeypatch):
    from strobe import _attention

    seen = []
    run = _attention._run
    monkeypatch.setattr(_attention, "_run", lambda *a: seen.append(a[-1]) or run(*a))
    index = _attention._ops._INDEX["deterministic"] - _attention._ops._INDEX["softmax_scale"]
    t = {name: x.requires_grad_() for name, x in make(device=device).items()}
    torch.use_deterministic_algorithms(True)
    try:
        strobe.attention(**t)
    finally:
        torch.use_deterministic_algorithms(False)
    strobe.attention(**t)
    assert len(seen) == 1 and seen[0][index] is True  # the other call takes the short way, whose backward is not deterministic


def test_scaled_dot_product_attention(device):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 4, n, 16, device=device) for n in (9, 13, 13))
    mask = torch.rand(9, 13, device=device) > 0.3
    mask[:, 0] = True
    reference.near(strobe.scaled_dot_product_attention(q, k, v), sdpa(q, k, v))
    reference.near(strobe.scaled_dot_product_attention(q, k, v, is_causal=True), sdpa(q, k, v, is_causal=True))
    reference.near(strobe.scaled_dot_product_attention(q, k, v, mask), sdpa(q, k, v, mask))
    reference.near(strobe.scaled_dot_product_attention(q[0], k[0], v[0]), sdpa(q[0], k[0], v[0]))
    reference.near(
        strobe.scaled_dot_product_attention(q, k[:, :2], v[:, :2], scale=0.4, enable_gqa=True),
        sdpa(q, k[:, :2], v[:, :2], scale=0.4, enable_gqa=True),
    )


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("dtype, least", [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, -1e10)])
def test_masks_of_huge_finite_numbers(device, dtype, least, scale):
    """As programs make them, of the least finite number or a round one: the last keys are padding, and of one sequence all are."""
    q, k, v = (torch.randn(3, 2, n, 16, device=device).to(dtype).requires_grad_() for n in (70, 200, 200))
    padding = torch.arange(200, device=device) >= torch.tensor([200, 90, 0], device=device)[:, None]
    mask = torch.zeros(3, 1, 1, 200, dtype=dtype, device=device).masked_fill(padding[:, None, None], least or torch.finfo(dtype).min)
    dout = torch.randn(3, 2, 70, 16, device=device).to(dtype)
    dout[2] = 0  # a loss leaves padding out
    out = strobe.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    def eager(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        scores = leaves[0] @ leaves[1].mT * (scale or 16**-0.5) + mask.to(dtype)
        result = torch.softmax(scores, -1) @ leaves[2]
        return result, *torch.autograd.grad(result, leaves, dout.to(dtype))

    ours = (out, *torch.autograd.grad(out, (q, k, v), dout))
    for name, x, exact, naive in zip(("out", "dq", "dk", "dv"), ours, eager(torch.float64), eager(dtype)):
        reference.assert_close(x, exact, naive, name, factor=2.0 if name == "out" else 3.0)
    if dtype != torch.float16:  # whose least number leaves a score its digits in fp32
        reference.near(out[2], v[2].double().mean(dim=1, keepdim=True).expand_as(out[2]))


def test_every_implementation_can_be_named():
    t = make()
    expected = strobe.attention(**t)
    served = 0
    for name in strobe.implementations():
        try:
            out = strobe.attention(**t, implementation=name)
        except (RuntimeError, ValueError) as e:  # an implementation for another device or processor
            assert name in str(e) or "serves" in str(e)
            continue
        served += 1
        torch.testing.assert_close(out, expected)
    assert served >= 1


def test_other_threads_run_meanwhile():
    """The interpreter's lock is free while a call computes."""
    q, k, v = make(rows=2048, cols=2048, heads=8, heads_k=8, dim=64).values()
    stop, counted = threading.Event(), [0]

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # nobody gives the lock up unless he means to
    thread.start()
    try:
        before = counted[0]
        strobe.attention(q, k, v)
        meanwhile = counted[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert meanwhile > 10


def test_num_threads_follow_torch(monkeypatch):
    t = make(batch=4, rows=64, cols=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = strobe.attention(**t, causal=True)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(single, strobe.attention(**t, causal=True))
