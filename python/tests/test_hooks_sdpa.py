"""strobe behind torch.nn.functional.scaled_dot_product_attention, and out again."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import strobe
from strobe import _ops
from strobe.hooks import _sdpa

HAS_REGISTRY = hasattr(torch.nn.attention, "activate_flash_attention_impl")


@pytest.fixture
def calls(monkeypatch):
    """Counts the forward calls that reach strobe through the hook."""
    seen = []
    real = _sdpa._forward_into

    def counted(*arguments):
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(_sdpa, "_forward_into", counted)
    return seen


@pytest.fixture
def heads_first(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [torch.randn(2, 4, 24, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def tolerance(tensors):
    return dict(atol=1e-5, rtol=1e-5) if tensors[0].dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_values_gradients_and_restoration(heads_first, calls, is_causal):
    dout = torch.randn_like(heads_first[0])
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
    expected_grads = torch.autograd.grad(expected, heads_first, dout)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with strobe.hooks.sdpa():
        ours = F.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
        grads = torch.autograd.grad(ours, heads_first, dout)
    assert len(calls) == 1 and torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    assert ours.stride() == torch.empty_like(heads_first[0]).stride()
    torch.testing.assert_close(ours, expected, **tolerance(heads_first))
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, **tolerance(heads_first))
    F.scaled_dot_product_attention(*heads_first)
    assert len(calls) == 1


@pytest.mark.skipif(not HAS_REGISTRY, reason="this torch has no registry of flash attention implementations")
def test_registry(heads_first, calls):
    assert "strobe" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.activate_flash_attention_impl("strobe")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "strobe"
        F.scaled_dot_product_attention(*heads_first)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(calls) == 1 and torch.nn.attention.current_flash_attention_impl() is None
    F.scaled_dot_product_attention(*heads_first)
    assert len(calls) == 1


def test_without_the_registry(heads_first, calls):
    """What sdpa() gives where torch has no registry."""
    handle = _sdpa.Handle()
    F.scaled_dot_product_attention(*heads_first)
    handle.remove()
    handle.remove()
    F.scaled_dot_product_attention(*heads_first)
    assert len(calls) == 1


def test_import_changes_nothing():
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch\n"
        "names = ['_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_flash_attention', '_flash_attention_forward']\n"
        "dump = lambda: [torch._C._dispatch_dump('aten::' + n) for n in names]\n"
        "before = dump()\n"
        "sdpa = torch.nn.functional.scaled_dot_product_attention\n"
        "import strobe\n"
        "assert dump() == before and torch.nn.functional.scaled_dot_product_attention is sdpa\n"
        "handle = strobe.hooks.sdpa()\n"
        "assert dump() != before\n"
        "handle.remove()\n"
        "assert dump() == before\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Overriding" not in result.stderr


def test_masks_and_lengths_on_the_cpu(calls):
    q = torch.randn(2, 4, 9, 16)
    k, v = (torch.randn(2, 4, 13, 16) for _ in range(2))
    bool_mask = torch.rand(9, 13) > 0.3
    bool_mask[:, 0] = True
    for options in ({"is_causal": True}, {"attn_mask": bool_mask}, {"attn_mask": torch.randn(2, 1, 9, 13)}, {"scale": 0.1}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        with strobe.hooks.sdpa():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, **options), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


def test_float64_stays_with_torch(calls):
    if not hasattr(torch.library, "get_kernel"):
        pytest.skip("this torch cannot give its own kernel")
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    with strobe.hooks.sdpa():
        ours = F.scaled_dot_product_attention(q, k, v)
        grads = torch.autograd.grad(ours.sum(), (q, k, v))
    assert torch.equal(ours, expected) and not calls and all(g.dtype == torch.float64 for g in grads)


def test_compiled_sdpa(heads_first, calls):
    def block(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sin().sum()

    expected = block(*heads_first)
    expected_grads = torch.autograd.grad(expected, heads_first)
    with strobe.hooks.sdpa():
        ours = torch.compile(block, fullgraph=True)(*heads_first)
        grads = torch.autograd.grad(ours, heads_first)
    assert calls
    torch.testing.assert_close(ours, expected, **tolerance(heads_first))
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, **tolerance(heads_first))


def test_a_module_on_top(device, calls):
    """torch.nn.MultiheadAttention in training runs on SDPA."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    x = torch.randn(2, 7, 32, device=device, requires_grad=True)
    expected, _ = layer(x, x, x, need_weights=False)
    with strobe.hooks.sdpa():
        ours, _ = layer(x, x, x, need_weights=False)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert calls or device == "cuda"  # float32 on CUDA is not for the flash kernel


def cuda_style(batch=2, rows=10, heads=3, dim=16):
    return [torch.randn(batch, heads, rows, dim, requires_grad=True) for _ in range(3)]


def test_the_functions_behind_the_cuda_operators():
    """The overrides of the CUDA kernels, called as torch calls them, on CPU tensors."""
    q, k, v = cuda_style()
    dout = torch.randn_like(q)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, cu_q, cu_k, max_q, max_k, state, unused, mask = _sdpa._sdpa_forward(q, k, v, 0.0, True, False, scale=0.3)
    assert (cu_q, cu_k, max_q, max_k) == (None, None, 10, 10) and state.dtype == torch.uint64 and mask.numel() == 0
    torch.testing.assert_close(out, expected)
    grads = _sdpa._sdpa_backward(dout, q, k, v, out, lse, None, None, 10, 10, 0.0, True, state, unused, scale=0.3)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    rows = [x.transpose(1, 2) for x in (q, k, v)]
    out4, lse4, state, unused, _ = _sdpa._flash_forward(*rows, None, None, 10, 10, 0.0, True, False, scale=0.3)
    torch.testing.assert_close(out4.transpose(1, 2), expected)
    grads = _sdpa._flash_backward(dout.transpose(1, 2), *rows, out4, lse4, None, None, 10, 10, 0.0, True, state, unused, scale=0.3)
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a.transpose(1, 2), b, atol=1e-5, rtol=1e-5)

    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    flat = [x.flatten(0, 1) for x in rows]
    out3, lse3, state, unused, _ = _sdpa._flash_forward(*flat, cu, cu, 10, 10, 0.0, True, False, scale=0.3, window_size_left=4)
    windowed = strobe.attention(*rows, causal=True, window_size=(4, -1), softmax_scale=0.3)
    torch.testing.assert_close(out3.view_as(windowed), windowed)
    grads = _sdpa._flash_backward(
        dout.transpose(1, 2).flatten(0, 1), *flat, out3, lse3, cu, cu, 10, 10, 0.0, True, state, unused, scale=0.3, window_size_left=4
    )
    assert all(g.shape == x.shape for g, x in zip(grads, flat))
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        _sdpa._sdpa_forward(q, k, v, return_debug_mask=True)


def test_dropout_of_the_cuda_operators_round_trips():
    q, k, v = (x.detach() for x in cuda_style())
    out, lse, *_, state, unused, _ = _sdpa._sdpa_forward(q, k, v, 0.4)
    rng_state = state.view(torch.int64)
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    expected = strobe.attention(*leaves, dropout_p=0.4, rng_state=rng_state)
    assert torch.equal(out, expected.transpose(1, 2))
    grads = _sdpa._sdpa_backward(torch.ones_like(out), q, k, v, out, lse, None, None, 10, 10, 0.4, False, state, unused)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(a.transpose(1, 2), b)


def test_the_operator_that_the_hook_calls_writes_where_it_is_told():
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    out, lse = torch.empty(1, 2, 5, 8).transpose(1, 2), torch.empty(1, 2, 5)
    _ops.attention_into(out, lse, q, k, v)
    expected, expected_lse = strobe.attention(q, k, v, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    with pytest.raises(ValueError, match="out: shape is"):
        _ops.attention_into(out[:, :4], lse, q, k, v)
