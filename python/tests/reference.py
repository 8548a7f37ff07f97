"""What the tests compare with: attention in plain torch operations, in float64 and in the working precision."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def near(ours: Tensor, exact: Tensor) -> None:
    """Equal up to the rounding of one attention call, by the dtype of `ours`; `exact` may be of another."""
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[ours.dtype]
    torch.testing.assert_close(ours, exact.to(ours.dtype), atol=bound, rtol=bound)


def visible(rows, cols, causal=False, window_size=(-1, -1), positions=None, device="cpu"):
    """bool (rows, cols): the band that causality, window and alignment leave."""
    diagonal = cols - rows if positions is None else positions[0] - positions[1]
    distance = torch.arange(cols, device=device) - (torch.arange(rows, device=device)[:, None] + diagonal)
    left, right = window_size
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if causal or right >= 0:
        seen &= distance <= max(right, 0)
    return seen, distance


def attention(
    q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0, bias=None, alibi_slopes=None,
    positions=None, keep=None, dropout_p=0.0,
):  # fmt: skip
    """(out, lse) of q (B, Sq, H, D), k, v (B, Sk, Hk, D) in the dtype of the inputs. keep: bool (B, H, Sq, Sk)."""
    rows, cols, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen, distance = visible(rows, cols, causal, window_size, positions, q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).view(-1, q.shape[2], 1, 1) * distance.abs()
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    if keep is not None:
        p = round(dropout_p * 65536) / 65536
        weights = weights * keep / (1 - p)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


@dataclass
class Result:
    """Outputs and gradients of one way to compute a case."""

    out: Tensor
    lse: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)


def run(function, tensors: dict[str, Tensor], dout: Tensor, dlse: Tensor | None, dtype=None) -> Result:
    """Calls function(**tensors) -> (out, lse), in `dtype` if given, and differentiates it."""
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_(name != "alibi_slopes")
        for name, t in tensors.items()
    }
    out, lse = function(**leaves)
    names = [n for n in leaves if leaves[n].requires_grad]
    outputs, weights = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        weights.append(dlse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, [leaves[n] for n in names], weights)
    return Result(out.detach(), lse.detach(), dict(zip(names, grads)))


def assert_close(ours: Tensor, exact: Tensor, naive: Tensor, what: str, factor: float = 2.0, atol: float = 1e-5) -> None:
    """The rule of the field: our error is at most twice that of the same arithmetic done plainly in the working precision."""
    assert ours.shape == exact.shape, what
    ours, exact, naive = (x.detach().to(exact.device, torch.float64) for x in (ours, exact, naive))
    infinite = torch.isinf(exact)
    assert torch.equal(ours[infinite], exact[infinite]), f"{what}: infinities differ"
    ours, exact, naive = (x.masked_fill(infinite, 0.0) for x in (ours, exact, naive))
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error = (ours - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (naive - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= factor * allowed + atol, f"{what}: error {error:.3g}, plain arithmetic {allowed:.3g}"


def compare(ours: Result, exact: Result, naive: Result, what: str = "") -> None:
    assert_close(ours.out, exact.out, naive.out, f"{what} out")
    if ours.lse is not None:
        assert_close(ours.lse, exact.lse, naive.lse, f"{what} lse")
    assert ours.grads.keys() == exact.grads.keys()
    for name in exact.grads:
        assert_close(ours.grads[name], exact.grads[name], naive.grads[name], f"{what} d{name}", factor=3.0)
