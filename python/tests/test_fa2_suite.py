"""The runner of FlashAttention-2's test file, on a small file of the same form."""

import json
import os
import subprocess
import sys

import fa2_suite
import torch

FILE = '''
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_with_kvcache

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,cols", [(3, 5), (4, 4), (1, 9)])
@pytest.mark.parametrize("paged_kv_block_size", [None, 256])
def test_values(rows, cols, dtype, paged_kv_block_size):
    if rows == 1:
        pytest.skip("not this one")
    assert paged_kv_block_size is None
    q, k = torch.randn(1, rows, 2, 8, dtype=dtype), torch.randn(1, cols, 2, 8, dtype=dtype)
    assert flash_attn_func(q, k, k).shape == q.shape
    assert cols != 4 or dtype == torch.float32, "a planted failure"

@pytest.mark.parametrize("n", range(1000))
def test_kvcache(n):
    raise RuntimeError("strobe has no cache")
'''


def test_counts_failures_and_skips(tmp_path):
    file, record = tmp_path / "file.py", tmp_path / "record.json"
    file.write_text(FILE)
    command = [sys.executable, fa2_suite.__file__, str(file), "--cases", "100", "--processes", "2", "--json", str(record)]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    counts = json.loads(record.read_text())
    assert [counts[n] for n in ("available", "passed", "failed", "skipped", "not_run")] == [6, 3, 1, 2, 0]
    ((name, why),) = counts["failures"].items()
    assert "cols=4" in name and "bfloat16" in name and "a planted failure" in why
    assert counts["passed_by_test"] == {"test_values": 3}


def test_a_sample_is_repeatable_and_spread():
    class Marked:
        def __init__(self, *axes):
            self.pytestmark = [type("Mark", (), {"name": "parametrize", "args": a}) for a in axes]

    tests = [
        fa2_suite.Test("a", Marked(("x", range(10)), ("y,z", [(i, -i) for i in range(100)]))),
        fa2_suite.Test("b", Marked(("x", [torch.float16]))),
    ]
    assert [len(t) for t in tests] == [1000, 1]
    cases = fa2_suite.sampled(tests, 200, seed=4)
    assert cases == fa2_suite.sampled(tests, 200, seed=4) != fa2_suite.sampled(tests, 200, seed=5)
    assert len({(t.name, i) for t, i in cases}) == 200
    everything = [t.case(i) for t, i in fa2_suite.sampled(tests, 10**6, seed=0)]
    assert len(everything) == 1001 and len({tuple(sorted(c.items(), key=str)) for c in everything}) == 1001
    assert all(c["z"] == -c["y"] for c in everything if "y" in c)
