"""The build's reading of the assembler's report: what it keeps, what it lets pass, what it stops."""
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "cmake" / "kernel_budget.py"

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6strobe4sm8014forward_kernelILm123EEEvNS_13ForwardParamsENS0_9TileOrderE' for 'sm_80'
ptxas info    : Function properties for _ZN6strobe4sm8014forward_kernelILm123EEEvNS_13ForwardParamsENS0_9TileOrderE
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem
"""
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo 'Cuda compilation tools, release {release}, V0'; exit 0; fi
cat >&2 <<'END'
{report}END
touch "$2"
"""


@pytest.fixture(name="budget")
def _budget():
    spec = importlib.util.spec_from_file_location("kernel_budget", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_row(tmp_path, row, spill, release):
    compiler = tmp_path / "nvcc"
    compiler.write_text(COMPILER.format(release=release, report=REPORT.format(stack=spill, spill=spill)))
    compiler.chmod(0o755)
    target = tmp_path / f"{row}.cu.o"
    run = subprocess.run([sys.executable, SCRIPT, compiler, "-o", target], capture_output=True, text=True)
    return run, target


def test_the_report_is_read(budget):
    assert budget.reports_of(REPORT.format(stack=16, spill=8)) == [
        {"arch": "sm_80", "kernel": "forward_kernel", "registers": 255, "stack_bytes": 16, "spilled_bytes": 8, "static_shared_bytes": 512}]


def test_a_plain_row_that_spills_stops_the_build(budget, tmp_path):
    release = budget.allowances()[0]
    run, target = compile_row(tmp_path, "sm80_forward_bf16_64_band_plain_128_128_2_4", 8, release)
    assert run.returncode == 1
    assert "sm_80/sm80_forward_bf16_64_band_plain_128_128_2_4/forward_kernel: 255 registers and 8 bytes spilled" in run.stderr
    assert not target.exists()


def test_what_fits_passes_and_leaves_its_report(budget, tmp_path):
    run, target = compile_row(tmp_path, "sm80_forward_bf16_64_band_plain_128_128_2_4", 0, budget.allowances()[0])
    assert run.returncode == 0 and target.exists()
    report = json.loads(pathlib.Path(f"{target}.budget").read_text())
    assert report["kernels"][0]["registers"] == 255


@pytest.mark.parametrize("row, release", [("sm80_forward_bf16_64_band_general_128_64_2_4", None),
                                          ("sm80_forward_bf16_64_band_plain_128_128_2_4", "1.0")])
def test_general_rows_and_other_compilers_are_not_stopped(budget, tmp_path, row, release):
    run, target = compile_row(tmp_path, row, 8, release or budget.allowances()[0])
    assert run.returncode == 0 and target.exists()


def test_a_failed_compilation_stays_failed(tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 3\n")
    compiler.chmod(0o755)
    run = subprocess.run([sys.executable, SCRIPT, compiler, "-o", tmp_path / "x.o"], capture_output=True, text=True)
    assert run.returncode == 3 and "error: no" in run.stderr
