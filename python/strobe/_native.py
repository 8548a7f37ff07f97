"""Finds the shared libraries that belong to this package, and speaks strobe's C ABI far enough for information.

The libraries lie in ``strobe/lib`` of an installed package. ``STROBE_LIBRARY_DIR`` names another folder, such as the ``lib``
folder of a build.
"""

import ctypes
import functools
import os
import pathlib

_NAMES = {"strobe": "libstrobe.so.0", "torch": "libstrobe_torch.so"}


def library_path(which: str) -> pathlib.Path:
    """The path of the C ABI library ("strobe") or of the torch operators ("torch")."""
    name = _NAMES[which]
    override = os.environ.get("STROBE_LIBRARY_DIR")
    folder = pathlib.Path(override) if override else pathlib.Path(__file__).parent / "lib"
    path = folder / name
    if not path.exists():
        raise ImportError(
            f"strobe: {path} does not exist. Install the package (pip install .), or set STROBE_LIBRARY_DIR to the lib folder "
            "of a build that was configured with -DSTROBE_BUILD_PYTHON=ON"
        )
    return path


@functools.cache
def c_abi() -> ctypes.CDLL:
    """libstrobe, loaded once."""
    library = ctypes.CDLL(str(library_path("strobe")))
    library.strobe_version.restype = ctypes.c_char_p
    library.strobe_last_error.restype = ctypes.c_char_p
    library.strobe_implementation.restype = ctypes.c_char_p
    library.strobe_implementation.argtypes = [ctypes.c_int32]
    library.strobe_num_threads.restype = ctypes.c_int32
    return library


def _names() -> tuple[str, ...]:
    names = []
    while (name := c_abi().strobe_implementation(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


_IMPLEMENTATIONS = _names()  # a constant for torch's compiler, which cannot look into the library


def implementations() -> tuple[str, ...]:
    """The names of this build's implementations ("sm90", "cpu", ...), in the order in which a call is offered to them. One may still
    refuse every call on this machine; ``strobe.attention(..., implementation=name)`` then says why.
    """
    return _IMPLEMENTATIONS


def implementation_index(name: str | None) -> int:
    """-1 for None, else the index that the operators take; ValueError for a name that this build does not have."""
    if name is None:
        return -1
    if name not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation: is {name!r}; this build has: {', '.join(_IMPLEMENTATIONS)}")
    return _IMPLEMENTATIONS.index(name)


def version() -> str:
    return c_abi().strobe_version().decode()
