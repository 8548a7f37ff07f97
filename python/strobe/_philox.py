"""The dropout mask in torch operations, for devices where the library itself does not write it out.

Same numbers as src/core/philox.hpp: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC 2011), one call for eight elements of a 16 x 16 block, 16 bits for each.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF



def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low halves of the product of 32-bit numbers. int64 products wrap, which keeps every bit."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def _philox(counter: list[Tensor], key0: int, key1: int) -> list[Tensor]:
    x0, x1, x2, x3 = counter
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, x0)
        high1, low1 = _multiply(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 = (key0 + 0x9E3779B9) & _LOW
        key1 = (key1 + 0xBB67AE85) & _LOW
    return [x0, x1, x2, x3]


def keep_mask(rng_state: Tensor, dropout_p: float, shape: tuple[int, int, int, int], device) -> Tensor:
    """bool (B, H, Sq, Sk) on `device`."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: is {dropout_p}; it must be at least 0 and below 1")
    batch, num_heads, rows, cols = shape
    drop_below = min(round(dropout_p * 65536), 65535)
    seed, offset = (int(x) for x in rng_state.tolist())
    key = (seed + offset * 0x9E3779B97F4A7C15) % 2**64

    def index(n):
        return torch.arange(n, dtype=torch.int64, device=device)

    row_blocks, col_blocks = -(-rows // 16), -(-cols // 16)
    counter = torch.broadcast_tensors(
        index(col_blocks * 4), index(row_blocks * 8)[:, None], index(batch * num_heads)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    )  # fmt: skip
    words = torch.stack(_philox(list(counter), key & _LOW, key >> 32))
    # A group is rows {i, i + 8} x columns {2t, 2t + 1, 2t + 8, 2t + 9}: word = 2 * (row bit 3) + (column bit 3), half =
    # column bit 0.
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    bits = bits.view(2, 2, batch * num_heads, row_blocks, 8, col_blocks, 4, 2)  # row bit, col bit, bh, rb, i, cb, t, half
    bits = bits.permute(2, 3, 0, 4, 5, 1, 6, 7).reshape(batch, num_heads, row_blocks * 16, col_blocks * 16)
    return bits[:, :, :rows, :cols] >= drop_below
