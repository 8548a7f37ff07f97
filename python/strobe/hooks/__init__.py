"""Puts strobe behind attention calls that frameworks make. Nothing is changed until one of these is called.

``torch.nn.attention.activate_flash_attention_impl("strobe")``
    torch >= 2.11: ``scaled_dot_product_attention`` runs on strobe wherever torch picks its flash kernel, until
    ``restore_flash_attention_impl()``. Serves everything on top of SDPA: transformers' "sdpa", diffusers, torch's varlen
    attention and context parallelism.
``strobe.hooks.sdpa()``
    the same for every torch version, as a handle with ``remove()`` and as a context manager.
``strobe.hooks.transformers()``
    registers ``attn_implementation="strobe"``.
"""

from ._sdpa import register as _register_with_torch
from ._sdpa import sdpa
from ._transformers import transformers

_register_with_torch()

__all__ = ["sdpa", "transformers"]
