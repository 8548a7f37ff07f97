"""strobe: exact attention. For torch: ``strobe.attention``; without torch: ``strobe.numpy``.

``strobe.flash_attn`` and ``strobe.flash_attn_3`` have the names of FlashAttention-2 and -3, ``strobe.hooks`` puts strobe behind
torch's and transformers' own attention calls. Importing strobe changes nothing outside of it.
"""

import importlib.util as _importlib_util

from ._native import implementations
from ._native import version as _version

__version__ = _version()
__all__ = ["implementations", "install_as"]

from ._install import install_as

if _importlib_util.find_spec("torch") is not None:
    from . import flash_attn, flash_attn_3, hooks
    from ._attention import attention, new_rng_state
    from ._extras import attention_backward, dropout_mask, merge, scaled_dot_product_attention

    __all__ += [
        "attention",
        "attention_backward",
        "dropout_mask",
        "flash_attn",
        "flash_attn_3",
        "hooks",
        "merge",
        "new_rng_state",
        "scaled_dot_product_attention",
    ]
else:

    def __getattr__(name: str):
        raise AttributeError(
            f"module 'strobe' has no attribute {name!r} here: only strobe.numpy works without torch (pip install torch)"
        )
