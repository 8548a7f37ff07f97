"""What only a CUDA device shows: streams, graphs, no waiting, memory, the CPU's results, and refusals."""

import subprocess
import sys

import pytest
import reference
import torch

import strobe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def qkv(batch=2, rows=300, heads=4, heads_k=2, dim=64, dtype=torch.bfloat16, grad=False):
    shapes = ((batch, rows, heads, dim), (batch, rows, heads_k, dim), (batch, rows, heads_k, dim))
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=grad) for s in shapes]


def step(q, k, v, dout):
    out = strobe.attention(q, k, v, causal=True)
    return out, *torch.autograd.grad(out, (q, k, v), dout)


FIRST_IN_ITS_THREAD = """
import torch, strobe
q, k, v = (torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
grads = torch.autograd.grad(strobe.attention(q, k, v), (q, k, v), torch.ones_like(q))
assert all(torch.isfinite(g).all() for g in grads)
"""


def test_a_backward_that_is_the_first_call_of_its_thread():
    """Nothing has made the device current in autograd's thread before."""
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{FIRST_IN_ITS_THREAD}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ROWS_WITHOUT_KEYS = """
import torch, strobe
for dim in (64, 96, 128, 192, 256):
    for dtype in (torch.bfloat16, torch.float16):
        q = torch.randn(1, 40000, 12, dim, device="cuda", dtype=dtype)
        k, v = (torch.randn(1, 16, 12, dim, device="cuda", dtype=dtype) for _ in range(2))
        out, lse = strobe.attention(q, k, v, causal=True, return_lse=True)
        torch.cuda.synchronize()
        assert (out[:, :-16] == 0).all() and (lse[..., :-16] == -torch.inf).all()
        last = strobe.attention(q[:, -16:], k, v, causal=True)
        torch.testing.assert_close(out[:, -16:], last, atol=3e-2, rtol=3e-2)
        flat = [x[0] for x in (q, q, q)]
        cu = torch.tensor([0, 20000, 40000], device="cuda", dtype=torch.int32)
        used = torch.tensor([300, 20000], device="cuda", dtype=torch.int32)
        options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=20000, max_seqlen_k=20000, causal=True)
        out = strobe.attention(*flat, seqused_q=used, seqused_k=used, **options)
        torch.cuda.synchronize()
        alone = strobe.attention(*(x[None, 20000:] for x in flat), causal=True)[0]
        assert (out[300:20000] == 0).all()
        torch.testing.assert_close(out[20000:], alone, atol=3e-2, rtol=3e-2)
"""


def test_many_rows_that_see_no_key():
    """Blocks of such rows one after another behind one that sees keys; a kernel that stops there is ended."""
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{ROWS_WITHOUT_KEYS}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def no_waiting():
    """Calls of torch that wait for the device are errors."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_no_call_waits_for_the_device(no_waiting):
    q, k, v = qkv(grad=True)
    cu = torch.arange(3, device="cuda", dtype=torch.int32) * 300
    step(q, k, v, torch.ones_like(q))
    strobe.attention(q, k, v, dropout_p=0.1, softcap=20.0)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = strobe.attention(*flat, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=300, max_seqlen_k=300)
    torch.autograd.grad(out.sum(), (q, k, v))
    strobe.flash_attn.flash_attn_func(q, k, v, causal=True)
    with strobe.hooks.sdpa():
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, q, q)), is_causal=True)


def test_sdpa_on_strobe_with_dropout():
    """The state that the hook draws, hands out and reads back is strobe's own."""
    leaves = [x.transpose(1, 2).requires_grad_() for x in qkv(heads_k=4)]
    dout = torch.randn_like(leaves[0])
    with strobe.hooks.sdpa(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        torch.manual_seed(3)
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, dropout_p=0.3)
        grads = torch.autograd.grad(out, leaves, dout)
    torch.manual_seed(3)
    own = [x.detach().transpose(1, 2).requires_grad_() for x in leaves]
    expected = strobe.attention(*own, dropout_p=0.3, rng_state=strobe.new_rng_state())
    assert torch.equal(out.transpose(1, 2), expected)
    for a, b in zip(grads, torch.autograd.grad(expected, own, dout.transpose(1, 2))):
        reference.near(a.transpose(1, 2), b)


def test_sdpa_on_strobe_in_deterministic_mode():
    """Many key blocks add to each row of dq, in one order."""
    leaves = [torch.randn(2, 4, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout = torch.randn_like(leaves[0])
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        with strobe.hooks.sdpa():
            for _ in range(10):
                out = torch.nn.functional.scaled_dot_product_attention(*leaves)
                results.append((out, *torch.autograd.grad(out, leaves, dout)))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("rows", [8, 700, 2500])
@pytest.mark.parametrize("causal", [False, True])
def test_a_call_keeps_its_place_on_the_stream(rows, causal):
    """It may be launched before the kernel in front of it has ended, which still writes what it reads or reads what it writes."""
    _, k, v = qkv(rows=rows, heads_k=4)
    start = torch.randn_like(k)
    results = []
    for wait in (torch.cuda.synchronize, lambda: None):
        x = start.clone()
        for i in range(100):
            y = strobe.attention(x, k, v, causal=causal)
            wait()
            if i % 3 == 2:
                x.mul_(0.5).add_(y)
            else:
                x = y
            wait()
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_call_right_behind_a_backward(dim):
    """With few keys the backward is a single kernel, which lets the next one start while it still works, on processors that it leaves
    idle; the gradients of k and v come last, into memory that holds NaN until then."""
    q, k, v = qkv(rows=128, heads=8, heads_k=8, dim=dim, grad=True)
    q = torch.randn(2, 4096, 8, dim, device="cuda", dtype=q.dtype, requires_grad=True)
    out = strobe.attention(q, k, v)
    dout = torch.randn_like(out)
    results = []
    for wait in (torch.cuda.synchronize, lambda: None, lambda: None):
        poison = [torch.full_like(k, torch.nan) for _ in range(8)]
        torch.cuda.synchronize()
        del poison
        torch.cuda._sleep(2_000_000)  # until both are in the queue
        _, dk, dv = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        wait()
        results.append(strobe.attention(dk, dv, dk))
        del dk, dv
    torch.cuda.synchronize()
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_captured_graph_repeats_forward_and_backward():
    static = qkv(grad=True)
    dout = torch.randn_like(static[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*static, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static, dout)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = qkv(grad=True)
        with torch.no_grad():
            for buffer, x in zip(static, fresh):
                buffer.copy_(x)
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        out, dq, dk, dv = step(*fresh, dout)
        assert torch.equal(captured[0], out) and torch.equal(captured[2], dk) and torch.equal(captured[3], dv)
        reference.near(captured[1], dq)


def test_two_streams_at_once():
    inputs = [qkv(grad=True) for _ in range(2)]
    dout = torch.randn_like(inputs[0][0])
    expected = [step(*x, dout) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, x in zip(streams, inputs):
            with torch.cuda.stream(stream):
                results.append(step(*x, dout))
        torch.cuda.synchronize()
        for ours, alone in zip(results, expected):
            assert torch.equal(ours[0], alone[0]) and torch.equal(ours[2], alone[2]) and torch.equal(ours[3], alone[3])
            reference.near(ours[1], alone[1])


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 64, 65, 128])
@pytest.mark.parametrize("heads", [1, 2])
def test_few_rows_and_heads(rows, heads):
    """One sequence and one head: tensors with axes of one element."""
    q, k, v = qkv(batch=1, rows=rows, heads=heads, heads_k=1, grad=True)
    dout = torch.randn_like(q)
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact, _ = reference.attention(*double, causal=True)
    ours = step(q, k, v, dout)
    for a, b in zip(ours, (exact, *torch.autograd.grad(exact, double, dout.double()))):
        reference.near(a, b)


MANY_SEQUENCES = 65536 + 7  # an axis of a grid has 65535


def hold_to_eager(leaves, call, **options):
    """out and gradients of call(q, k, v[, bias]) beside the plain operations in float64 and in the working precision."""
    dout = torch.randn_like(leaves[0])

    def results(function, dtype):
        tensors = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = function(*tensors)
        return out, *torch.autograd.grad(out, tensors, dout.to(dtype))

    def eager(q, k, v, bias=None):
        return reference.attention(q, k, v, bias=bias, **options)[0]

    dtype = leaves[0].dtype
    all_results = results(call, dtype), results(eager, torch.float64), results(eager, dtype)
    for name, ours, exact, naive in zip(("out", "dq", "dk", "dv", "dbias"), *all_results):
        reference.assert_close(ours, exact, naive, name, factor=2.0 if name == "out" else 3.0)


@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize("implementation", ["sm90", "sm80"])
def test_more_sequences_than_a_grid_has_along_an_axis(dim, implementation, large_memory):
    if implementation == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    leaves = qkv(batch=MANY_SEQUENCES, rows=8, heads=2, heads_k=1, dim=dim, grad=True)
    hold_to_eager(leaves, lambda q, k, v: strobe.attention(q, k, v, causal=True, implementation=implementation), causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_more_packed_sequences_than_a_grid_has_along_an_axis(causal, large_memory):
    """Of very different lengths, so that the gradient of q has an accumulator, which is converted behind."""
    lengths = torch.randint(0, 4, (MANY_SEQUENCES,), generator=torch.Generator().manual_seed(0))
    lengths[-3] = 700
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to("cuda", torch.int32)
    q, k, v = (x[0].detach().requires_grad_() for x in qkv(batch=1, rows=int(lengths.sum())))
    dout = torch.randn_like(q)
    options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=700, max_seqlen_k=700, causal=causal)

    def results(**more):
        out = strobe.attention(q, k, v, **options, **more)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    begin = int(cu[-4])
    last = [x.detach()[None, begin : begin + 700].double().requires_grad_() for x in (q, k, v)]
    exact, _ = reference.attention(*last, causal=causal)
    exact = exact, *torch.autograd.grad(exact, last, dout[None, begin : begin + 700].double())
    for a, b, c in zip(results(), results(implementation="sm80"), exact):
        reference.near(a, b)
        reference.near(a[begin : begin + 700], c[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bias_of_its_own_for_more_sequences_than_a_grid_has_along_an_axis(dtype, large_memory):
    leaves = qkv(batch=MANY_SEQUENCES, rows=8, heads=2, heads_k=1, dim=32, dtype=dtype, grad=True)
    leaves.append(torch.randn(MANY_SEQUENCES, 1, 8, 8, device="cuda", dtype=dtype, requires_grad=True))
    hold_to_eager(leaves, lambda q, k, v, bias: strobe.attention(q, k, v, bias=bias))


def far_views(count, axis, shape, value):
    """`count` dense tensors of `shape` but that one step along `axis` leads past the same part of all others, so far that the last one
    lies behind 2^31 elements. Returns the memory, filled with `value`, and the views."""
    inner = [n for i, n in enumerate(shape) if i != axis]
    block = count * torch.Size(inner).numel()
    step = max(block, -(-(2**31) // (shape[axis] - 1)) // 8 * 8 + 8)
    memory = torch.full(((shape[axis] - 1) * step + block,), value, device="cuda", dtype=torch.bfloat16)
    strides = list(torch.empty(inner, device="meta").stride())
    strides.insert(axis, step)
    return memory, [memory.as_strided(shape, strides, i * block // count) for i in range(count)]


def offsets_beyond_32_bits(axis, implementation):
    shape = (3, 300, 4, 64)
    inputs, (q, k, v, dout) = far_views(4, axis, shape, torch.nan)
    outputs, (out, dq, dk, dv) = far_views(4, axis, shape, torch.nan)
    dense = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3) for i in range(4)]
    for view, values in zip((q, k, v, dout), dense):
        view.copy_(values.detach())
    lse = torch.empty(3, 4, 300, device="cuda")
    index = strobe.implementations().index(implementation)
    torch.ops.strobe.attention_into(out, lse, q, k, v, None, True, implementation=index)
    strobe.attention_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, causal=True, implementation=implementation)
    expected, expected_lse = strobe.attention(*dense[:3], causal=True, implementation=implementation, return_lse=True)
    for a, b in zip((out, dq, dk, dv), (expected, *torch.autograd.grad(expected, dense[:3], dense[3]))):
        reference.near(a, b)
    assert torch.equal(lse, expected_lse)
    untouched = sum(part.isnan().sum().item() for part in outputs.split(2**28))  # of one piece, the sum would widen 2^31 values
    assert untouched == outputs.numel() - 4 * out.numel()


def workspace_beyond_32_bits():
    """Of few columns, which the accumulator of dq pads to 64: 2^31 numbers of it."""
    batch, rows, heads, dim = 1025, 2048, 16, 8
    one = [torch.randn(1, rows, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    q, k, v, dout = (x.repeat(batch, 1, 1, 1) for x in one)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(strobe.attention(*leaves, causal=True), leaves, dout)

    def eager(dtype):
        tensors = [x.to(dtype).requires_grad_() for x in one[:3]]
        return torch.autograd.grad(reference.attention(*tensors, causal=True)[0], tensors, one[3].to(dtype))

    for name, a, exact, naive in zip(("dq", "dk", "dv"), ours, eager(torch.float64), eager(torch.bfloat16)):
        for entry in (0, batch // 2, batch - 1):
            reference.assert_close(a[entry : entry + 1], exact, naive, f"{name} of {entry}", factor=3.0)


def test_offsets_beyond_32_bits(large_memory):
    """One after the other: they take 9 to 15 GB each."""
    for implementation in ("sm90", "sm80"):
        if implementation == "sm90" and torch.cuda.get_device_capability() != (9, 0):
            continue
        for axis in range(3):
            offsets_beyond_32_bits(axis, implementation)
    workspace_beyond_32_bits()


def test_deterministic_gradients_are_the_same_bits():
    q, k, v = qkv(rows=1000, grad=True)
    dout = torch.randn_like(q)
    runs = [torch.autograd.grad(strobe.attention(q, k, v, causal=True, deterministic=True), (q, k, v), dout) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_compiled_with_cuda_graphs():
    q, k, v = qkv(grad=True)
    dout = torch.randn_like(q)
    compiled = torch.compile(lambda *x: strobe.attention(*x, causal=True) * 2, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        out = compiled(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        out = out.clone()
    expected = strobe.attention(q, k, v, causal=True) * 2
    reference.near(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, (q, k, v), dout)):
        reference.near(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_merge_is_the_cpus(dtype, layout):
    shape, lse_shape = ((3, 2, 50, 4, 40), (3, 2, 4, 50)) if layout == "dense" else ((3, 100, 4, 40), (3, 4, 100))
    outs, lses = torch.randn(shape).to(dtype), torch.randn(lse_shape) * 3
    lses[0, ..., :5] = -torch.inf
    lses[:, ..., 7] = -torch.inf
    expected, expected_lse = strobe.merge(outs, lses)
    out, lse = strobe.merge(outs.cuda(), lses.cuda())
    assert out.is_cuda and out.dtype == dtype and lse.dtype == torch.float32
    reference.near(out.cpu(), expected)
    reference.near(lse.cpu(), expected_lse)
    assert (lse[..., 7] == -torch.inf).all()


def test_dropout_mask_is_the_cpus():
    state = torch.tensor([-3, 2**62 + 5])
    for shape in ((2, 3, 37, 53), (1, 1, 16, 16), (1, 2, 1, 100), (2, 2, 200, 130)):
        ours = strobe.dropout_mask(state, 0.3, shape, "cuda")
        assert ours.is_cuda and torch.equal(ours.cpu(), strobe.dropout_mask(state, 0.3, shape))


def test_forward_is_the_cpus():
    """The same call on both devices, with everything that changes scores, and the same dropout."""
    for options in ({"causal": True}, {"window_size": (40, 3), "softcap": 5.0}, {"dropout_p": 0.2, "rng_state": (7, 8)}):
        tensors = [x.cpu() for x in qkv(dtype=torch.float16, rows=90)]
        expected, expected_lse = strobe.attention(*tensors, **options, return_lse=True)
        out, lse = strobe.attention(*(x.cuda() for x in tensors), **options, return_lse=True)
        reference.near(out.cpu(), expected)
        torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-4, rtol=1e-4)


def test_refusals_say_what_there_is():
    q, k, v = qkv(rows=8)
    with pytest.raises(RuntimeError, match="no implementation serves this call"):
        strobe.attention(*(x.repeat(1, 1, 1, 8) for x in (q, k, v)))
    with pytest.raises(ValueError, match="k: is on cpu, but q is on cuda:0"):
        strobe.attention(q, k.cpu(), v)
    with pytest.raises(ValueError, match="rng_state: must be on the cpu"):
        strobe.attention(q, k, v, dropout_p=0.1, rng_state=torch.zeros(2, dtype=torch.int64, device="cuda"))
    with pytest.raises(ValueError, match="implementation: is \"cpu\""):
        strobe.attention(q, k, v, implementation="cpu")
    strobe.attention(q, k, v)


def test_the_memory_is_linear_in_the_length():
    """Beside inputs and gradients, a call holds less than a few rows' worth of memory, never a matrix."""
    extra = []
    for rows in (4096, 8192):
        q, k, v = qkv(batch=1, rows=rows, heads=2, heads_k=2, grad=True)
        dout = torch.ones_like(q)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(q, k, v, dout)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] < 2.2 * extra[0] and extra[1] < 8192 * 2 * 64 * 2 * 16
