"""FlashAttention-2's Python interface on strobe, name by name and default by default.

``strobe.install_as("flash_attn")`` puts this package where ``import flash_attn`` finds it. Wider than the original: float32 and
the CPU work, head_dim goes to 512, and the log-sum-exp is differentiable. Not here: the KV-cache function and paged keys.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .flash_attn_interface import __getattr__ as __getattr__

__version__ = "2.8.3"  # the version of the interface; packages compare it before they call

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]
