"""Fills Triton's cache with the kernels of the grid, a process for each head dim and mask, so that the benchmark need not compile.

    python bench/peers/compile_triton.py
"""

import subprocess
import sys

from cases import HEAD_DIMS, HIDDEN


def compile_one(head_dim: int, causal: bool) -> None:
    import torch
    import triton_attention

    # Triton compiles for what the number of heads divides by: it must be the grid's.
    shape = (1, 128, HIDDEN // head_dim, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    triton_attention.attention(q, k, v, causal).sum().backward()


def main():
    if len(sys.argv) == 3:
        return compile_one(int(sys.argv[1]), sys.argv[2] == "causal")
    children = [
        subprocess.Popen([sys.executable, __file__, str(dim), mask]) for dim in HEAD_DIMS for mask in ("full", "causal")
    ]
    sys.exit(max(child.wait() for child in children))


if __name__ == "__main__":
    main()
