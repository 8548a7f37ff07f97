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


@pytest.fixture(scope="module")
def compile_check():
    """Compiles a text against torch's headers without output; gives the errors."""
    compiler = shutil.which("c++") or shutil.which("g++")
    include = pathlib.Path(torch.__file__).parent / "include"
    if compiler is None or not (include / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip("needs a C++ compiler and torch's headers")

    def run(text: str, folder, *options: str) -> str:
        source = folder / "check.cpp"
        source.write_text(
            "#define USE_CUDA 1\n#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n" + text
        )
        command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", *options, source]
        return subprocess.run(command, capture_output=True, text=True).stderr

    return run


def test_declarations_agree_with_torch(tmp_path, compile_check):
    """torch's own headers first, then ours: the compiler refuses a declaration that differs."""
    text = '#include "torch_abi.h"\n'
    assert compile_check(text, tmp_path, f"-I{SOURCES}") == ""
    header = (SOURCES / "torch_abi.h").read_text()
    wrong = header.replace("AOTITorchError torch_get_num_threads", "int64_t torch_get_num_threads")
    assert wrong != header
    (tmp_path / "torch_abi.h").write_text(wrong)
    assert "torch_get_num_threads" in compile_check(text, tmp_path, f"-I{tmp_path}")


def test_torch_2_9_has_every_function(tmp_path, compile_check):
    """With torch's headers restricted to version 2.9, all functions but the optional one are still declared."""
    names = sorted(s.split("@")[0] for s in undefined_symbols() if s.startswith(("aoti_torch_", "torch_")))
    assert "torch_get_num_threads" in names
    names.remove("torch_get_num_threads")  # a weak reference: null before 2.10
    text = "".join(f"auto* use_{name} = &{name};\n" for name in names)
    assert compile_check(text, tmp_path, "-DTORCH_TARGET_VERSION=0x0209000000000000ULL") == ""
    text += "auto* newer = &torch_get_num_threads;\n"
    assert "torch_get_num_threads" in compile_check(text, tmp_path, "-DTORCH_TARGET_VERSION=0x0209000000000000ULL")
