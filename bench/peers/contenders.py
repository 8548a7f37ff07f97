"""The contenders: each turns a case and its tensors into a call that computes out, or refuses with the reason."""

import contextlib
import dataclasses
import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import strobe
from cases import Case

# S x S matrices that the plain formula keeps at once, forward and backward, in units of the working precision.
_MATH_MATRICES = 6
_MATH_BYTES = 40 << 30


class Refused(Exception):
    """The contender does not serve the case; the text says why."""


@dataclasses.dataclass
class Inputs:
    """q, k, v as leaves, (B, S, H, D) or for varlen (T, H, D); dout of the shape of out."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int

    @property
    def leaves(self):
        return self.q, self.k, self.v


def make_inputs(case: Case, device: str = "cuda") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def randn(heads: int) -> Tensor:
        shape = (case.tokens, heads, case.head_dim) if case.lengths else (case.batch, case.seqlen, heads, case.head_dim)
        return torch.randn(shape, device=device, dtype=getattr(torch, case.dtype), generator=generator)

    q, k, v = (randn(h).requires_grad_() for h in (case.num_heads, case.num_heads_k, case.num_heads_k))
    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], dtype=torch.int32, device=device)
    return Inputs(q, k, v, randn(case.num_heads), cu_seqlens, case.seqlen)


def _dense_only(case: Case) -> None:
    if case.lengths or case.window is not None:
        raise Refused("has no interface for varlen or windows here")


# ---- strobe -----------------------------------------------------------------------------------------------------------------


def strobe_call(case: Case, x: Inputs, **more):
    options = {"causal": case.causal, **more}
    if case.window is not None:
        options["window_size"] = (case.window, -1)
    if case.lengths:
        options |= {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens}
        options |= {"max_seqlen_q": x.max_seqlen, "max_seqlen_k": x.max_seqlen}
    return lambda: strobe.attention(*x.leaves, **options)


def strobe_alibi(case: Case, x: Inputs, **more):
    slopes = torch.linspace(0.5, 0.004, case.num_heads, device=x.q.device)
    return strobe_call(case, x, alibi_slopes=slopes, **more)


def strobe_bias(case: Case, x: Inputs, **more):
    """A bias for each head, without its gradient."""
    bias = torch.randn(1, case.num_heads, case.seqlen, case.seqlen, device=x.q.device, dtype=x.q.dtype)
    return strobe_call(case, x, bias=bias, **more)


# ---- torch ------------------------------------------------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, case: Case, x: Inputs):
    _dense_only(case)
    grouped = case.num_heads != case.num_heads_k
    if backend == SDPBackend.MATH:
        matrix = case.batch * case.num_heads * case.seqlen**2 * x.q.element_size()
        if _MATH_MATRICES * matrix > _MATH_BYTES:
            raise Refused(f"its {matrix / 2**30:.0f} GiB matrices do not fit beside the others")
    if backend == SDPBackend.EFFICIENT_ATTENTION and grouped:
        raise Refused("has no grouped heads")

    def call():
        with sdpa_kernel(backend):
            heads_first = (t.transpose(1, 2) for t in x.leaves)
            return F.scaled_dot_product_attention(*heads_first, is_causal=case.causal, enable_gqa=grouped).transpose(1, 2)

    return call


def _cudnn(case: Case, x: Inputs):
    """Lengths by the operator below SDPA."""
    if not case.lengths:
        return _sdpa(SDPBackend.CUDNN_ATTENTION, case, x)
    lengths = (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    operator = torch.ops.aten._cudnn_attention_forward
    return lambda: operator(*x.leaves, None, *lengths, True, 0.0, case.causal, False)[0]


def _torch_fa2(case: Case, x: Inputs):
    """torch's FlashAttention-2 by the operator below SDPA where the case has lengths or a window."""
    if not case.lengths and case.window is None:
        return _sdpa(SDPBackend.FLASH_ATTENTION, case, x)
    window = {} if case.window is None else {"window_size_left": case.window, "window_size_right": 0}
    lengths = (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    causal = case.causal and case.window is None
    operator = torch.ops.aten._flash_attention_forward
    return lambda: operator(*x.leaves, *lengths, 0.0, causal, False, **window)[0]


@contextlib.contextmanager
def _deterministic():
    """torch's own switch, without its filling of fresh memory, which would be timed too."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- others -----------------------------------------------------------------------------------------------------------------


def _triton(case: Case, x: Inputs):
    _dense_only(case)
    if case.num_heads != case.num_heads_k:
        raise Refused("has no grouped heads")
    module = importlib.import_module("triton_attention")
    return lambda: module.attention(*x.leaves, case.causal)


def _fa3(case: Case, x: Inputs, **more):
    module = importlib.import_module("flash_attn_interface")
    options = {"causal": case.causal, **more}
    if case.window is not None:
        options |= {"causal": False, "window_size": (case.window, 0)}
    if case.lengths:
        lengths = (x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
        return lambda: _first(module.flash_attn_varlen_func(*x.leaves, *lengths, **options))
    return lambda: _first(module.flash_attn_func(*x.leaves, **options))


def _first(result):
    return result[0] if isinstance(result, tuple) else result


@dataclasses.dataclass(frozen=True)
class Contender:
    prepare: object  # (case, inputs) -> call
    sections: frozenset[str]
    deterministic: bool = False

    def gradients(self, out: Tensor, x: Inputs):
        with _deterministic() if self.deterministic else contextlib.nullcontext():
            return torch.autograd.grad(out, x.leaves, x.dout, retain_graph=True)


_CLOSE = frozenset({"grid", "gqa", "varlen", "window", "short"})
_FAR = frozenset({"others"})
_DETERMINISTIC, _OPTIONS, _MEMORY = frozenset({"deterministic"}), frozenset({"options"}), frozenset({"memory"})
CONTENDERS: dict[str, Contender] = {
    "strobe": Contender(strobe_call, _CLOSE | _FAR | _DETERMINISTIC | _OPTIONS | _MEMORY),
    "FA3": Contender(_fa3, _CLOSE | _DETERMINISTIC | _MEMORY),
    "cuDNN": Contender(_cudnn, _CLOSE | _MEMORY),
    "FA2": Contender(_torch_fa2, _CLOSE | _DETERMINISTIC | _MEMORY),
    "Triton": Contender(_triton, _FAR),
    "efficient": Contender(functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), _FAR),
    "math": Contender(functools.partial(_sdpa, SDPBackend.MATH), _FAR | _MEMORY),
    "strobe deterministic": Contender(functools.partial(strobe_call, deterministic=True), _DETERMINISTIC),
    "FA3 deterministic": Contender(functools.partial(_fa3, deterministic=True), _DETERMINISTIC),
    "FA2 deterministic": Contender(_torch_fa2, _DETERMINISTIC, deterministic=True),
    "strobe softcap": Contender(functools.partial(strobe_call, softcap=30.0), _OPTIONS),
    "strobe ALiBi": Contender(strobe_alibi, _OPTIONS),
    "strobe bias": Contender(strobe_bias, _OPTIONS),
    "strobe dropout": Contender(functools.partial(strobe_call, dropout_p=0.1, rng_state=(1, 2)), _OPTIONS),
}
# Contenders that compute something else than `strobe` does.
OTHER_RESULTS = frozenset({"strobe softcap", "strobe ALiBi", "strobe bias", "strobe dropout"})
