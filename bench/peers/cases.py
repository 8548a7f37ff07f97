"""What is measured: problems by section, the FLOPs of each, and the tensors."""

import dataclasses
import math
import random
from dataclasses import replace

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. Dense: `batch` sequences of `seqlen`; varlen: `lengths` sequences behind one another."""

    section: str
    head_dim: int
    seqlen: int  # the longest, for varlen
    batch: int
    num_heads: int
    num_heads_k: int
    causal: bool
    window: int | None = None  # keys to the left that a query sees beside its own; causal
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    @property
    def mask(self) -> str:
        return "window" if self.window is not None else "causal" if self.causal else "full"

    @property
    def name(self) -> str:
        heads = f"h{self.num_heads}" + (f"k{self.num_heads_k}" if self.num_heads_k != self.num_heads else "")
        return f"{self.section} d{self.head_dim} {heads} {self.mask} {self.batch}x{self.seqlen}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.batch * self.seqlen


def flops(case: Case, direction: str) -> float:
    """4 B H S^2 D forward, 2.5 times that backward; half for causal, and the band's share for a window."""
    lengths = case.lengths or (case.seqlen,) * case.batch
    if case.window is not None:
        pairs = sum(sum(min(i, case.window) + 1 for i in range(n)) for n in lengths)
    else:
        pairs = sum(n * n for n in lengths) * (0.5 if case.causal else 1.0)
    forward = 4.0 * case.num_heads * case.head_dim * pairs
    return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]


def skewed_lengths(tokens: int = 32768, low: int = 8, high: int = 8192, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths that fill `tokens` exactly."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) >= low:
        lengths.append(min(left, round(math.exp(draw.uniform(math.log(low), math.log(high))))))
    if left:
        lengths[-1] += left
    return tuple(lengths)


def grid(head_dims=HEAD_DIMS, seqlens=SEQLENS) -> list[Case]:
    """The grid of the FlashAttention papers: 16k tokens per call, hidden size 2048."""
    return [
        Case("grid", d, s, TOKENS // s, HIDDEN // d, HIDDEN // d, causal)
        for d in head_dims for causal in (False, True) for s in seqlens
    ]  # fmt: skip


def short(head_dims=HEAD_DIMS, seqlens=(128, 256)) -> list[Case]:
    """Sequences below the grid's: few blocks each, where a schedule's ends weigh most."""
    return [replace(case, section="short") for case in grid(head_dims, seqlens)]


def others(head_dims=HEAD_DIMS, seqlens=SEQLENS) -> list[Case]:
    """The grid again for peers that are far behind, so that they take no time from the close ones."""
    return [replace(case, section="others") for case in grid(head_dims, seqlens)]


def gqa(seqlens=SEQLENS[1:]) -> list[Case]:
    """Grouped heads, 64 query and 8 key."""
    return [Case("gqa", 128, s, TOKENS // s, 64, 8, causal) for causal in (False, True) for s in seqlens]


def varlen() -> list[Case]:
    """32k tokens in sequences of very different lengths."""
    lengths = skewed_lengths()
    return [Case("varlen", 128, max(lengths), len(lengths), 16, 16, causal, lengths=lengths) for causal in (False, True)]


def window() -> list[Case]:
    """A sliding window of 1024."""
    return [Case("window", d, 16384, 1, HIDDEN // d, HIDDEN // d, True, window=1024) for d in (64, 128)]


def deterministic(head_dims=HEAD_DIMS) -> list[Case]:
    """What a backward that repeats its bits costs."""
    return [
        Case("deterministic", d, s, TOKENS // s, HIDDEN // d, HIDDEN // d, causal)
        for d in head_dims for causal in (False, True) for s in (4096, 16384)
    ]  # fmt: skip


def options(head_dims=(64, 128)) -> list[Case]:
    """What softcap, ALiBi, bias and dropout cost."""
    return [Case("options", d, 4096, TOKENS // 4096, HIDDEN // d, HIDDEN // d, causal) for d in head_dims for causal in (False, True)]


SECTIONS = {
    "grid": grid,
    "gqa": gqa,
    "varlen": varlen,
    "short": short,
    "deterministic": deterministic,
    "window": window,
    "options": options,
    "others": others,
}
QUICK = {
    "grid": lambda: grid(head_dims=(128,), seqlens=(1024, 4096, 16384)),
    "gqa": lambda: gqa(seqlens=(4096,)),
    "varlen": varlen,
    "short": lambda: short(head_dims=(128,)),
    "deterministic": lambda: deterministic(head_dims=(128,)),
    "window": window,
    "options": lambda: options(head_dims=(128,)),
    "others": lambda: others(head_dims=(128,), seqlens=(1024, 4096)),
}
MEMORY_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def memory_case(seqlen: int) -> Case:
    """One sequence at head dim 128, causal, forward and backward."""
    return Case("memory", 128, seqlen, 1, 16, 16, True)
