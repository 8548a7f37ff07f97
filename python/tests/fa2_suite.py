"""Runs FlashAttention-2's own test file, unmodified, against strobe.flash_attn: a random sample of its cases.

    python python/tests/fa2_suite.py test_flash_attn.py --cases 3000 --seed 0 --json results/fa2_suite.json

The file comes from the FlashAttention repository (tests/test_flash_attn.py) and needs a CUDA GPU, einops and pytest. Cases of the
KV cache and of paged keys are left out: strobe does not have them. Exits with 1 if any case fails.
"""

import argparse
import hashlib
import json
import pathlib
import random
import sys

import pytest
import torch

import strobe


class Sample:
    """A pytest plugin: keeps a random sample of the cases and counts what becomes of them."""

    def __init__(self, cases: int, seed: int):
        self.cases, self.seed = cases, seed
        self.available = self.passed = self.failed = self.skipped = 0
        self.failures: list[str] = []

    @staticmethod
    def _served(item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        return "kvcache" not in item.nodeid and parameters.get("paged_kv_block_size") is None

    def pytest_collection_modifyitems(self, items):
        served = [item for item in items if self._served(item)]
        self.available = len(served)
        if self.cases < len(served):
            served = random.Random(self.seed).sample(served, self.cases)
        items[:] = served

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.skipped += 1
        elif report.failed:
            self.failed += 1
            self.failures.append(report.nodeid)
        elif report.when == "call":
            self.passed += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    strobe.install_as("flash_attn")
    # The file imports the KV-cache function beside the others; its cases are not run.
    for module in (strobe.flash_attn, strobe.flash_attn.flash_attn_interface):
        module.flash_attn_with_kvcache = None
    sample = Sample(arguments.cases, arguments.seed)
    status = pytest.main([str(arguments.file), "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"], plugins=[sample])

    record = {
        "command": sys.argv,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "strobe": strobe.__version__,
        "file_sha256": hashlib.sha256(arguments.file.read_bytes()).hexdigest(),
        "seed": arguments.seed,
        "cases_available": sample.available,
        "passed": sample.passed,
        "failed": sample.failed,
        "skipped": sample.skipped,
        "failures": sample.failures,
    }
    print(f"{sample.passed} passed, {sample.failed} failed, {sample.skipped} skipped of {sample.available} (seed {arguments.seed})")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if status == 0 and sample.passed and not sample.failed else 1)


if __name__ == "__main__":
    main()
