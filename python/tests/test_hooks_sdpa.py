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


def runs_on_strobe(device) -> bool:
    """Whether torch's flash operator leads to strobe."""
    name, key = ("_for_cpu", "CPU") if torch.device(device).type == "cpu" else ("", "CUDA")
    table = torch._C._dispatch_dump_table(f"aten::_scaled_dot_product_flash_attention{name}")
    (row,) = [line for line in table.splitlines() if line.startswith(f"{key}: ")] or [""]
    return "sdpa_ops.cpp" in row or "hooks/_sdpa.py" in row


@pytest.fixture
def calls(monkeypatch):
    """Counts the forward calls on the CPU that reach strobe through the hook."""
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
def test_values_gradients_and_restoration(heads_first, device, calls, is_causal):
    dout = torch.randn_like(heads_first[0])
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
    expected_grads = torch.autograd.grad(expected, heads_first, dout)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    assert not runs_on_strobe(device)
    with strobe.hooks.sdpa():
        assert runs_on_strobe(device)
        ours = F.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
        grads = torch.autograd.grad(ours, heads_first, dout)
    rows = [x.transpose(1, 2) for x in heads_first]
    assert torch.equal(ours, strobe.attention(*rows, causal=is_causal).transpose(1, 2))
    assert not runs_on_strobe(device) and torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    assert ours.stride() == torch.empty_like(heads_first[0]).stride()
    torch.testing.assert_close(ours, expected, **tolerance(heads_first))
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, **tolerance(heads_first))
    F.scaled_dot_product_attention(*heads_first)
    assert len(calls) == (device == "cpu")


@pytest.mark.skipif(not HAS_REGISTRY, reason="this torch has no registry of flash attention implementations")
def test_registry(heads_first, device):
    assert "strobe" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.activate_flash_attention_impl("strobe")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "strobe" and runs_on_strobe(device)
        F.scaled_dot_product_attention(*heads_first)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.nn.attention.current_flash_attention_impl() is None and not runs_on_strobe(device)
    F.scaled_dot_product_attention(*heads_first)


def test_without_the_registry(heads_first, device):
    """What sdpa() gives where torch has no registry."""
    handle = _sdpa.Handle()
    assert runs_on_strobe(device)
    F.scaled_dot_product_attention(*heads_first)
    handle.remove()
    handle.remove()
    assert not runs_on_strobe(device)
    F.scaled_dot_product_attention(*heads_first)


@pytest.mark.parametrize("refused", [False, True])
def test_a_second_handle(device, monkeypatch, refused):
    """Some versions of torch refuse it. It then leaves nothing behind, and the first stays in force."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    first, second = _sdpa.Handle(), None
    if refused:

        def refuse(self, *arguments):
            raise RuntimeError("already a kernel registered from python")

        monkeypatch.setattr(torch.library.Library, "impl", refuse)
    try:
        second = _sdpa.Handle()
    except RuntimeError as e:
        assert "already a kernel registered from python" in str(e)
    assert runs_on_strobe(device) and not (refused and second)
    first.remove()
    if second is not None:
        assert runs_on_strobe(device)
        second.remove()
    assert not runs_on_strobe(device) and torch.backends.cuda.cudnn_sdp_enabled() == cudnn


def test_a_handle_that_cannot_be_made(device, monkeypatch):
    """Whatever went wrong, nothing is left behind."""
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()

    def fail():
        raise OSError("no such library")

    monkeypatch.setattr(_sdpa, "_library_in_c", fail)
    with pytest.raises(OSError, match="no such library"):
        _sdpa.Handle()
    assert not runs_on_strobe(device) and torch.backends.cuda.cudnn_sdp_enabled() == cudnn and _sdpa.Handle._in_force == 0


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


def test_compiled_sdpa(heads_first, device, calls):
    def block(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sin().sum()

    expected = block(*heads_first)
    expected_grads = torch.autograd.grad(expected, heads_first)
    with strobe.hooks.sdpa():
        ours = torch.compile(block, fullgraph=True)(*heads_first)
        grads = torch.autograd.grad(ours, heads_first)
    assert calls or device == "cuda"
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


def dense_strides(x):
    """What torch.empty_like gives, if its last stride is 1."""
    like = torch.empty_like(x)
    return like.stride() if like.stride(-1) == 1 else torch.empty(x.shape).stride()


LAYOUTS = {
    "heads first": lambda x: x,
    "rows first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "of a packed projection": lambda x: torch.cat([x.transpose(1, 2)] * 3, 3)[..., : x.shape[3]].transpose(1, 2),
    "head dimension outside": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one head expanded": lambda x: x[:, :1].expand(x.shape),
    "one batch entry expanded": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[:1].expand(x.shape),
    "rows outside, one head expanded": lambda x: x[:, :1].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).expand(x.shape),
    "every second row": lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2],
}


@pytest.mark.parametrize("shape", [(2, 3, 10, 16), (1, 1, 10, 16), (2, 3, 1, 16), (3, 3, 3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_cuda_operators(layout, shape):
    """The C++ kernels behind the CUDA operators, on CPU tensors: values, and the strides that torch's compiler expects."""
    change = LAYOUTS[layout]
    q, k, v = (change(torch.randn(shape)) for _ in range(3))
    dout = change(torch.randn(shape))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3)
    expected_grads = torch.autograd.grad(expected, leaves, dout)
    results = torch.ops.strobe.sdpa_forward(q, k, v, 0.0, True, False, scale=0.3)
    out, lse, cu_q, cu_k, max_q, max_k, state, unused, mask = results
    assert (cu_q, cu_k, max_q, max_k) == (None, None, shape[2], shape[2]) and state.dtype == unused.dtype == torch.uint64
    assert state.shape == (2,) and unused.shape == () and mask.shape == (0,) and mask.dtype == q.dtype
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out.stride() == dense_strides(q)
    saved = (out, lse, None, None, max_q, max_k, 0.0, True, state, unused)
    grads = torch.ops.strobe.sdpa_backward(dout, q, k, v, *saved, scale=0.3)
    for ours, theirs, x in zip(grads, expected_grads, (q, k, v)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.stride() == dense_strides(x)


def test_the_deterministic_mode_reaches_the_cuda_operator(monkeypatch):
    """The kernels in C++ ask torch about it; here on CPU tensors."""
    asked = []
    flag = _sdpa._FLAG(lambda: asked.append(torch.are_deterministic_algorithms_enabled()) or asked[-1])
    monkeypatch.setattr(_sdpa, "_is_deterministic", flag)
    q, k, v = (x.detach() for x in cuda_style())
    out, lse, _, _, _, _, state, unused, _ = torch.ops.strobe.sdpa_forward(q, k, v)
    arguments = (torch.randn_like(q), q, k, v, out, lse, None, None, 10, 10, 0.0, False, state, unused)
    with _sdpa.Handle():
        first = torch.ops.strobe.sdpa_backward(*arguments)
        torch.use_deterministic_algorithms(True)
        try:
            second = torch.ops.strobe.sdpa_backward(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True]
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b)
    monkeypatch.undo()
    with _sdpa.Handle():  # takes `flag` out again
        torch.ops.strobe.sdpa_backward(*arguments)
    assert len(asked) == 2


def test_wrong_calls_of_the_cuda_operators():
    q, k, v = (x.detach() for x in cuda_style())
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        torch.ops.strobe.sdpa_forward(q, k, v, return_debug_mask=True)
    with pytest.raises(ValueError, match=r"must be \(B, H, S, D\)"):
        torch.ops.strobe.sdpa_forward(q[0], k, v)
    with pytest.raises(ValueError, match="v: shape is"):
        torch.ops.strobe.sdpa_forward(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="dtype is float64"):
        torch.ops.strobe.sdpa_forward(q.double(), k.double(), v.double())


def test_the_functions_behind_the_other_cuda_operators():
    """The overrides of aten::_flash_attention, called as torch calls them, on CPU tensors."""
    q, k, v = cuda_style()
    dout = torch.randn_like(q)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    rows = [x.detach().transpose(1, 2) for x in (q, k, v)]
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
        _sdpa._flash_forward(*rows, None, None, 10, 10, 0.0, True, True)


def test_dropout_of_the_cuda_operators_round_trips():
    q, k, v = (x.detach() for x in cuda_style())
    torch.manual_seed(5)
    out, lse, *_, state, unused, _ = torch.ops.strobe.sdpa_forward(q, k, v, 0.4)
    torch.manual_seed(5)
    rng_state = strobe.new_rng_state()
    assert torch.equal(state.view(torch.int64), rng_state)
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    expected = strobe.attention(*leaves, dropout_p=0.4, rng_state=rng_state)
    assert torch.equal(out, expected.transpose(1, 2))
    grads = torch.ops.strobe.sdpa_backward(torch.ones_like(out), q, k, v, out, lse, None, None, 10, 10, 0.4, False, state, unused)
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
