"""``strobe.install_as``: strobe under the module names that other packages import."""

import importlib
import sys

_MODULES = {
    "flash_attn": {
        "flash_attn": "strobe.flash_attn",
        "flash_attn.flash_attn_interface": "strobe.flash_attn.flash_attn_interface",
        "flash_attn.bert_padding": "strobe.flash_attn.bert_padding",
        "flash_attn.layers": "strobe.flash_attn.layers",
        "flash_attn.layers.rotary": "strobe.flash_attn.layers.rotary",
    },
    "flash_attn_interface": {"flash_attn_interface": "strobe.flash_attn_3"},
}


def install_as(name: str) -> None:
    """Lets code that imports another attention package get strobe, from now on in this process.

    Args:
        name: "flash_attn" (FlashAttention-2's package, with ``flash_attn_interface``, ``bert_padding`` and
            ``layers.rotary``) or "flash_attn_interface" (FlashAttention-3's module).

    Raises:
        ValueError: another name.
        RuntimeError: the real package has been imported already; modules that hold its functions would keep them.
    """
    if name not in _MODULES:
        raise ValueError(f"install_as: {name!r} is not a name that strobe can stand in for: {', '.join(_MODULES)}")
    modules = {alias: importlib.import_module(target) for alias, target in _MODULES[name].items()}
    for alias, module in modules.items():
        if sys.modules.get(alias, module) is not module:
            raise RuntimeError(f"install_as: {alias} is imported already, from {getattr(sys.modules[alias], '__file__', '?')}")
    sys.modules.update(modules)
