"""strobe.numpy: the same results as the torch operators, the same refusals, and no need for torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import strobe
import strobe.numpy


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in ((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 8))]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_same_as_torch(dtype):
    q, k, v = arrays(dtype)
    bias = np.random.default_rng(1).standard_normal((1, 4, 9, 11)).astype(np.float32)
    slopes = np.linspace(0.1, 0.4, 4, dtype=np.float32)
    options = dict(causal=True, window_size=(6, -1), softcap=3.0, softmax_scale=0.3, dropout_p=0.2, rng_state=(7, 8))
    out, lse, state = strobe.numpy.attention(
        q, k, v, bias=bias, alibi_slopes=slopes, **options, return_lse=True, return_rng_state=True
    )
    assert state == (7, 8) and out.dtype == dtype and lse.dtype == np.float32
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v, bias)]
    expected, expected_lse = strobe.attention(
        *tensors[:3], bias=tensors[3], alibi_slopes=torch.from_numpy(slopes), **options, return_lse=True
    )
    np.testing.assert_array_equal(out, expected.detach().numpy())
    np.testing.assert_array_equal(lse, expected_lse.detach().numpy())
    dout = np.random.default_rng(2).standard_normal(out.shape).astype(dtype)
    dlse = np.random.default_rng(3).standard_normal(lse.shape).astype(np.float32)
    grads = strobe.numpy.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, need_dbias=True, bias=bias, alibi_slopes=slopes, **options
    )
    exact = torch.autograd.grad((expected, expected_lse), tensors, (torch.from_numpy(dout), torch.from_numpy(dlse)))
    for a, b in zip(grads, exact):
        np.testing.assert_array_equal(a, b.numpy())


def test_varlen_and_strides():
    q, k, v = (np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1, 2) for x in arrays())
    assert not q.flags.c_contiguous
    expected = strobe.numpy.attention(q, k, v)
    cu_q, cu_k = np.array([0, 9, 18], np.int32), np.array([0, 11, 22], np.int32)
    flat = strobe.numpy.attention(
        *(np.ascontiguousarray(x).reshape(-1, *x.shape[2:]) for x in (q, k, v)), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=9, max_seqlen_k=11, num_threads=1,
    )  # fmt: skip
    np.testing.assert_allclose(flat.reshape(expected.shape), expected, atol=1e-6)


def test_refusals():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="q: dtype is float64"):
        strobe.numpy.attention(q.astype(np.float64), k, v)
    with pytest.raises(TypeError, match="k: is a list"):
        strobe.numpy.attention(q, k.tolist(), v)
    with pytest.raises(ValueError, match="k: head_dim is 8"):
        strobe.numpy.attention(q, k[..., :8], v)
    with pytest.raises(TypeError, match="unknown arguments: casual"):
        strobe.numpy.attention(q, k, v, casual=True)
    with pytest.raises(ValueError, match="max_seqlen_q: is not given"):
        strobe.numpy.attention(q[0], k, v, cu_seqlens_q=np.array([0, 9], np.int32))
    with pytest.raises(ValueError, match="the last stride is"):
        strobe.numpy.attention(q[..., ::2], k[..., :8], v)


WITHOUT_TORCH = """
import importlib.abc
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else real(name, package)
sys.meta_path.insert(0, NoTorch())
import numpy as np, strobe, strobe.numpy
x = np.ones((1, 2, 1, 4), np.float32)
assert np.allclose(strobe.numpy.attention(x, x, x), 1.0) and "torch" not in sys.modules
assert strobe.implementations() and strobe.__version__
try:
    strobe.attention
except AttributeError as e:
    assert "without torch" in str(e)
else:
    raise SystemExit("strobe.attention exists without torch")
"""


def test_without_torch():
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{WITHOUT_TORCH}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
