"""The operators under torch's compiler and its relatives: fake kernels, autograd registration, export, autocast."""

import inspect

import pytest
import reference
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import strobe
from strobe import _ops


def qkv(batch=2, rows=16, heads=4, heads_k=2, dim=16, dtype=torch.float32, device="cpu", grad=False):
    shapes = ((batch, rows, heads, dim), (batch, rows, heads_k, dim), (batch, rows, heads_k, dim))
    return [torch.randn(s).to(device=device, dtype=dtype).requires_grad_(grad) for s in shapes]


def options_of(device):
    slopes = torch.rand(4, device=device)
    bias = torch.randn(1, 4, 16, 16, device=device, requires_grad=True)
    cu = torch.tensor([0, 7, 32], dtype=torch.int32, device=device)
    state = torch.tensor([5, 6])
    return {
        "plain": {},
        "causal": {"causal": True, "softmax_scale": 0.3},
        "window": {"window_size": (3, 1), "softcap": 2.0},
        "alibi": {"alibi_slopes": slopes, "deterministic": True},
        "bias": {"bias": bias},
        "dropout": {"dropout_p": 0.2, "rng_state": state},
        "positions": {"causal": True, "positions": (4, 0)},
        "varlen": {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 25, "max_seqlen_k": 25, "causal": True},
    }


NAMES = list(options_of("cpu"))


def inputs_for(name, device, grad=True):
    tensors = qkv(device=device, grad=grad)
    if name == "varlen":
        tensors = [x.detach().flatten(0, 1).requires_grad_(grad) for x in tensors]
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name, device):
    options = options_of(device)[name]
    tensors = inputs_for(name, device)
    leaves = tensors + ([options["bias"]] if "bias" in options else [])

    def step(q, k, v):
        out, lse = strobe.attention(q, k, v, **options, return_lse=True)
        return out.float().sin().sum() + lse.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, ours = step(*tensors), compiled(*tensors)
    reference.near(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)):
        reference.near(a, b)


def test_a_named_implementation_compiles():
    q, k, v = qkv()
    compiled = torch.compile(lambda *x: strobe.attention(*x, implementation="cpu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), strobe.attention(q, k, v, implementation="cpu"))


def test_compiles_with_inductor(device):
    q, k, v = qkv(device=device, grad=True)

    def block(q, k, v):
        return strobe.attention((q * 2).cos(), k, v, causal=True).tanh().sum()

    expected = block(q, k, v)
    ours = torch.compile(block, fullgraph=True)(q, k, v)
    reference.near(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(expected, (q, k, v))):
        reference.near(a, b)


def test_dynamic_shapes_compile_once(device):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda q, k, v: strobe.attention(q, k, v, causal=True), fullgraph=True, dynamic=True, backend=backend)
    for rows in (9, 16, 31):
        tensors = qkv(rows=rows, device=device)
        reference.near(compiled(*tensors), strobe.attention(*tensors, causal=True))
    assert len(graphs) == 1


def test_fresh_dropout_in_a_compiled_function(device):
    """The random state is drawn inside the graph, so that each call drops other elements."""
    tensors = qkv(device=device)
    compiled = torch.compile(
        lambda q, k, v: strobe.attention(q, k, v, dropout_p=0.5, return_rng_state=True), fullgraph=True, backend="aot_eager"
    )
    (first, state), (second, _) = compiled(*tensors), compiled(*tensors)
    assert not torch.equal(first, second)
    reference.near(strobe.attention(*tensors, dropout_p=0.5, rng_state=state), first)


def test_export(device):
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return strobe.attention(q, k, v, causal=True, window_size=(5, -1))

    tensors = tuple(qkv(device=device))
    program = torch.export.export(Block(), tensors)
    assert any("strobe.attention" in str(node.target) for node in program.graph.nodes)
    reference.near(program.module()(*tensors), Block()(*tensors))


def test_fake_tensors(device):
    with FakeTensorMode():
        q, k, v = qkv(batch=3, rows=5, dim=8, dtype=torch.bfloat16, device=device)
        out, lse = strobe.attention(q, k, v, return_lse=True)
        assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == device
        assert lse.shape == (3, 4, 5) and lse.dtype == torch.float32
        assert strobe.attention(q, k, v, out_dtype=torch.float32).dtype == torch.float32
        assert strobe.attention(q[0], k[0], v[0][..., :4], return_lse=True)[1].shape == (4, 5)
        with pytest.raises(ValueError, match="q: has 2 dimensions"):
            strobe.attention(q[0, 0], k, v)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_forward(name, device):
    options = options_of(device)[name]
    q, k, v = inputs_for(name, device)
    kwargs = {n: x for n, x in options.items() if n not in ("window_size", "positions")}
    for pair, names in (("window_size", ("window_left", "window_right")), ("positions", ("q_position", "k_position"))):
        kwargs.update(zip(names, options.get(pair, ())))
    torch.library.opcheck(_ops.attention, (q, k, v), kwargs)


@pytest.mark.parametrize("operator", [_ops.attention_plain, _ops.attention_plain_lse], ids=lambda o: o._schema.name)
def test_opcheck_plain(operator, device):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, (*qkv(device=device), 0.3, True), test_utils=tests)


def test_opcheck_backward(device):
    q, k, v = qkv(device=device)
    bias = torch.randn(1, 4, 16, 16, device=device)
    out, lse = strobe.attention(q, k, v, bias=bias, return_lse=True)
    arguments = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_ops.attention_backward, arguments, {"bias": bias, "need_dbias": True}, test_utils=tests)
    torch.library.opcheck(_ops.attention_backward, arguments, {"causal": True}, test_utils=tests)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    torch.library.opcheck(_ops.attention_backward_into, (*grads, None, False, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_opcheck_companions(device):
    outs, lses = torch.randn(3, 2, 5, 4, 8, device=device), torch.randn(3, 2, 4, 5, device=device)
    torch.library.opcheck(_ops.lse_merge, (outs, lses))
    keep = torch.empty(2, 3, 5, 7, dtype=torch.uint8, device=device)
    torch.library.opcheck(_ops.dropout_mask_into, (keep, torch.tensor([1, 2]), 0.3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled, device):
    q, k, v = qkv(device=device, grad=True)
    function = strobe.attention
    if compiled:
        function = torch.compile(strobe.attention, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        out = function(q, k, v, causal=True)
        raw, _ = _ops.attention(q, k, v, None, True)
    assert out.dtype == raw.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = strobe.attention(*low, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(raw, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.float().square().sum(), low)):
        torch.testing.assert_close(a, b.float())


def test_autocast_without_gradients(device):
    q, k, v = qkv(device=device)
    for x in (q, v.half()):
        with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
            ours = strobe.attention(q, k, v.to(x.dtype), causal=True)
        expected = strobe.attention(*(x.bfloat16() for x in (q, k, v.to(x.dtype))), causal=True)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected)


class Tagged(torch.Tensor):
    """A subclass with torch's default __torch_function__, which passes its type on to results."""


def test_subclasses_and_modes_see_the_call(device):
    """The short way to the operator is taken only where nobody looks on."""
    from torch.overrides import TorchFunctionMode

    q, k, v = qkv(device=device)
    for options in ({}, {"return_lse": True}, {"window_size": (3, 3)}):
        seen = []

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        expected = strobe.attention(q, k, v, **options)
        for name, mode in (("functions", Functions), ("operators", Operators)):
            with mode():
                ours = strobe.attention(q, k, v, **options)
            assert any("strobe.attention" in s for s in seen), name
            torch.testing.assert_close(ours, expected)
            seen.clear()
        for tagged in ((q.as_subclass(Tagged), k, v), (q, k, v.as_subclass(Tagged))):
            ours = strobe.attention(*tagged, **options)
            assert isinstance(ours[0] if options.get("return_lse") else ours, Tagged)


def test_the_profiler_names_the_operator(device):
    q, k, v = qkv(device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        strobe.attention(q, k, v)
    assert "strobe::attention_plain" in [event.key for event in profile.key_averages()]


def test_eager_and_registered_autograd_agree(device):
    q, k, v = qkv(device=device, grad=True)
    dout = torch.randn_like(q)
    for a, b in zip(
        torch.autograd.grad(strobe.attention(q, k, v, causal=True), (q, k, v), dout),
        torch.autograd.grad(_ops.attention(q, k, v, None, True)[0], (q, k, v), dout),
    ):
        assert torch.equal(a, b)


def test_functorch_grad(device):
    q, k, v = qkv(device=device)
    ours = torch.func.grad(lambda x: strobe.attention(x, k, v, causal=True).square().sum())(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(strobe.attention(leaf, k, v, causal=True).square().sum(), leaf)
    reference.near(ours, expected)


@pytest.mark.parametrize("name", ["alibi", "bias", "dropout", "varlen"])
def test_functorch_grad_with_options(name, device):
    options = options_of(device)[name]
    q, k, v = inputs_for(name, device, grad=False)
    leaves = [q, *([options.pop("bias").detach()] if name == "bias" else [])]

    def loss(q, bias=None):
        return strobe.attention(q, k, v, bias=bias, **options).square().sum()

    ours = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    leaves = [x.requires_grad_() for x in leaves]
    for a, b in zip(ours, torch.autograd.grad(loss(*leaves), leaves)):
        reference.near(a, b)


TRANSFORMED = {
    "plain": {"causal": True},
    "options": {"softcap": 2.0, "window_size": (4, 2)},
    "deterministic": {"deterministic": True},
    "with log-sum-exp": {"return_lse": True},
}


def test_functorch_vmap_of_a_bias(device):
    """A call with tensors among its options: mapped over, or the same for every call."""
    q, k, v = (torch.stack([x, x.flip(1), -x]) for x in qkv(device=device))
    biases = torch.randn(3, 4, 16, 16, device=device)

    def gradients(q, k, v, bias):
        return torch.func.grad(lambda *x: strobe.attention(*x[:3], bias=x[3]).sin().sum(), argnums=(0, 1, 2, 3))(q, k, v, bias)

    for dim, bias_of in ((0, lambda i: biases[i]), (None, lambda i: biases[0])):
        ours = torch.vmap(gradients, in_dims=(0, 0, 0, dim))(q, k, v, biases if dim == 0 else biases[0])
        for i in range(3):
            for a, b in zip(ours, gradients(q[i], k[i], v[i], bias_of(i))):
                reference.near(a[i], b)


def test_functorch_vmap_is_one_call(device):
    """Not one for each of those that are mapped over, where only q, k and v are."""
    q, k, v = (torch.stack([x] * 5) for x in qkv(device=device))
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.extend([function] if function.namespace == "strobe" else [])
            return function(*args, **(kwargs or {}))

    with Count():
        torch.vmap(lambda *x: strobe.attention(*x, softcap=2.0))(q, k, v)
        torch.vmap(torch.func.grad(lambda *x: strobe.attention(*x).sum()))(q, k, v)
    assert len(calls) == 3


@pytest.mark.parametrize("name", TRANSFORMED)
def test_functorch_vmap(name, device):
    """Over calls, and over gradients of calls, as for gradients of each sample or for an ensemble."""
    options = TRANSFORMED[name]
    q, k, v = (torch.stack([x, x.flip(1), -x]) for x in qkv(device=device))

    def call(q, k, v):
        results = strobe.attention(q, k, v, **options)
        return results if isinstance(results, tuple) else (results,)

    def gradients(q, k, v):
        return torch.func.grad(lambda *x: sum(y.sin().sum() for y in call(*x)), argnums=(0, 1, 2))(q, k, v)

    for function in (call, gradients):
        ours = torch.vmap(function)(q, k, v)
        for i in range(3):
            for a, b in zip(ours, function(q[i], k[i], v[i])):
                reference.near(a[i], b)
    moved = torch.vmap(call, in_dims=(2, None, 1), out_dims=1)(q.movedim(0, 2), k[0], v.movedim(0, 1))
    for i in range(3):
        reference.near(moved[0][:, i], call(q[i], k[0], v[i])[0])


def test_functorch_jacobian(device):
    q, k, v = qkv(batch=1, rows=3, heads=2, heads_k=2, dim=8, device=device)
    ours = torch.func.jacrev(lambda x: strobe.attention(x, k, v, causal=True))(q)
    reference.near(ours, torch.autograd.functional.jacobian(lambda x: strobe.attention(x, k, v, causal=True), q))


def test_the_signature_is_the_documented_one():
    parameters = inspect.signature(strobe.attention).parameters
    assert parameters["window_size"].default == (-1, -1) and "options" not in parameters
    assert strobe.attention.__doc__.startswith("Exact attention") and strobe.attention.__module__ == "strobe._attention"


def test_activation_checkpointing_repeats_dropout(device):
    q, k, v = qkv(device=device, grad=True)

    def block(q, k, v):
        return strobe.attention(q, k, v, dropout_p=0.3)

    results = []
    for run in (block, lambda *x: torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=False)):
        torch.manual_seed(11)
        out = run(q, k, v)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_inference_mode(device):
    q, k, v = qkv(device=device)
    expected = strobe.attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(strobe.attention(q, k, v), expected)
