"""The torch library is one binary for every torch >= 2.9: it uses nothing of torch but functions of the stable C ABI."""

import pathlib
import re
import shutil
import subprocess

import pytest
import torch

from strobe import _native

SOURCES = pathlib.Path(__file__).resolve().parents[1] / "src"


def undefined_symbols() -> list[str]:
    nm = shutil.which("nm")
    assert nm, "nm (binutils) is needed to look into the library"
    text = subprocess.run([nm, "-D", "-C", "--undefined-only", _native.library_path("torch")], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in text.stdout.splitlines()]


def test_no_cxx_symbols_of_torch():
    symbols = undefined_symbols()
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", s) or s.startswith("Py")] == []


def test_every_torch_symbol_is_declared_here():
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", (SOURCES / "torch_abi.h").read_text()))
    used = {s.split("@")[0] for s in undefined_symbols() if s.startswith(("aoti_torch_", "torch_"))}
    assert used <= declared


def test_needed_libraries():
    readelf = shutil.which("readelf")
    assert readelf, "readelf (binutils) is needed to look into the library"
    text = subprocess.run([readelf, "-d", _native.library_path("torch")], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert "libtorch.so" in needed and "libstrobe.so.0" in needed
    assert not [n for n in needed if "c10" in n or "python" in n or "cuda" in n]


def test_declarations_agree_with_torch(tmp_path):
    """torch's own headers first, then ours: the compiler refuses a declaration that differs."""
    compiler = shutil.which("c++") or shutil.which("g++")
    include = pathlib.Path(torch.__file__).parent / "include"
    if compiler is None or not (include / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("needs a C++ compiler and torch's headers")
    both = tmp_path / "both.cpp"
    both.write_text(
        "#define USE_CUDA 1\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
        '#include "torch_abi.h"\n'
    )
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{SOURCES}", both]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wrong = (SOURCES / "torch_abi.h").read_text().replace("aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim)",
                                                         "aoti_torch_get_dim(AtenTensorHandle tensor, int64_t dim, int)")
    (tmp_path / "torch_abi.h").write_text(wrong.replace("AOTITorchError torch_get_num_threads", "int64_t torch_get_num_threads"))
    command[4] = f"-I{tmp_path}"
    assert subprocess.run(command, capture_output=True).returncode != 0
