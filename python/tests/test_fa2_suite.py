"""The runner of FlashAttention-2's test file, on a small file of the same form."""

import json
import os
import subprocess
import sys

import fa2_suite
import pytest
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


def run(folder, text, *options):
    """(exit status and output, record) of the runner on a file of that text, in two processes."""
    file, record = folder / "file.py", folder / "record.json"
    file.write_text(text)
    command = [sys.executable, fa2_suite.__file__, str(file), "--cases", "100", "--processes", "2", "--json", str(record), *options]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert record.exists(), result.stderr
    return result, json.loads(record.read_text())


def test_counts_failures_and_skips(tmp_path):
    result, counts = run(tmp_path, FILE)
    assert result.returncode == 1, result.stderr
    assert [counts[n] for n in ("available", "passed", "failed", "skipped", "not_run")] == [6, 3, 1, 2, 0]
    ((name, why),) = counts["failures"].items()
    assert "cols=4" in name and "bfloat16" in name and "a planted failure" in why
    assert counts["passed_by_test"] == {"test_values": 3}


HANGS = """
import time
import pytest

@pytest.mark.parametrize("n", range(6))
def test_one_hangs(n):
    if n == 3:
        time.sleep(1000)
"""


def test_a_process_that_hangs_is_ended(tmp_path):
    """Its other results count, the case that it was in has failed, and the output says where."""
    result, counts = run(tmp_path, HANGS, "--seconds", "2", "--grace", "3")
    assert result.returncode == 1 and "in test_one_hangs" in result.stdout
    ((name, why),) = counts["failures"].items()
    assert name == "test_one_hangs[n=3]" and "ended early" in why
    assert counts["failed"] == 1 and counts["passed"] >= 3 and counts["passed"] + counts["not_run"] == 5


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("too_often", [False, True])
def test_a_case_without_memory_is_repeated(tmp_path, monkeypatch, too_often, alone):
    monkeypatch.setattr(fa2_suite.time, "sleep", lambda seconds: None)
    tries = []

    def function(n):
        tries.append(n)
        if too_often or len(tries) < 2:
            raise torch.OutOfMemoryError("no room")

    share = fa2_suite.Share(tmp_path / "share.json", 1, alone=alone)
    function.pytestmark = [pytest.mark.parametrize("n", [4, 5]).mark]
    share.run(fa2_suite.Test("case", function), 1, 0)
    record = share.record
    assert tries == [5, 5] and record["repeated"] == (2 if too_often else 1) and record["alone"] == alone
    assert record["passed"] == (not too_often) and record["failed"] == (too_often and alone)
    assert ("no room" in str(record["failures"])) == (too_often and alone)
    assert record["too_large"] == ([["case", 1]] if too_often and not alone else [])


NEEDS_ALL_MEMORY = """
import sys
import pytest
import torch

@pytest.mark.parametrize("n", range(6))
def test_some_are_large(n):
    alone = "--only" in sys.argv and sys.argv[sys.argv.index("--processes") + 1] == "1"
    if n in (1, 4) and not alone or n == 4 and NEVER:
        raise torch.OutOfMemoryError("no room")
"""


@pytest.mark.parametrize("never", [False, True])
def test_cases_without_memory_run_alone_at_the_end(tmp_path, never):
    """A case that not even one process has the memory for has failed."""
    result, counts = run(tmp_path, NEEDS_ALL_MEMORY.replace("NEVER", str(never)))
    assert result.returncode == never
    assert counts["passed"] == 6 - never and counts["failed"] == never and counts["alone"] == 2 and counts["not_run"] == 0
    assert list(counts["failures"]) == (["test_some_are_large[n=4]"] if never else [])


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
