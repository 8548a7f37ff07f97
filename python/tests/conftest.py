"""Finds the package: the one in this source tree with the libraries of STROBE_BUILD_DIR, else the installed one."""

import os
import pathlib
import sys

import pytest

_SOURCE = pathlib.Path(__file__).resolve().parents[1]

if "STROBE_BUILD_DIR" in os.environ:
    os.environ.setdefault("STROBE_LIBRARY_DIR", str(pathlib.Path(os.environ["STROBE_BUILD_DIR"]) / "lib"))
if "STROBE_LIBRARY_DIR" in os.environ:
    sys.path.insert(0, str(_SOURCE))

import torch  # noqa: E402

if "PYTEST_XDIST_WORKER_COUNT" in os.environ and torch.cuda.is_available():
    # What one worker's allocator keeps, another cannot have.
    torch.cuda.set_per_process_memory_fraction(0.8 / int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu"] + (["cuda"] if torch.cuda.is_available() else []))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
