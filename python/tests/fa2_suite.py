"""Runs FlashAttention-2's own test file, unmodified, against strobe.flash_attn: a random sample of its cases.

    python python/tests/fa2_suite.py test_flash_attn.py --cases 3000 --seed 0 --processes 8 --json results/fa2_suite.json

The file comes from the FlashAttention repository (tests/test_flash_attn.py) and needs a CUDA GPU, einops and pytest. Cases of the
KV cache and of paged keys are left out: strobe does not have them. Exits with 1 if any case fails or none passes.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

COUNTS = ("passed", "failed", "skipped", "not_run")


class Sample:
    """A pytest plugin: keeps this process's share of a random sample of the cases and counts what becomes of them."""

    def __init__(self, cases: int, seed: int, share: int, processes: int, seconds: float):
        self.cases, self.seed, self.share, self.processes = cases, seed, share, processes
        self.deadline = time.monotonic() + seconds
        self.available = self.not_run = 0
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.by_test: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    @staticmethod
    def pytest_pycollect_makeitem(name):
        """No items for the KV cache, which would be most of the file."""
        return [] if "kvcache" in name else None

    @staticmethod
    def _served(item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        return "kvcache" not in item.nodeid and parameters.get("paged_kv_block_size") is None

    def pytest_collection_modifyitems(self, items):
        served = [item for item in items if self._served(item)]
        self.available = len(served)
        if self.cases < len(served):
            served = random.Random(self.seed).sample(served, self.cases)
        items[:] = served[self.share :: self.processes]
        self.not_run = len(items)

    def pytest_runtest_logstart(self):
        self.not_run -= 1

    def pytest_runtest_logfinish(self):
        """The order of a sample is random, so what ran until the deadline is a random sample too."""
        if time.monotonic() > self.deadline:
            self.session.shouldstop = "the time is over"

    def pytest_sessionstart(self, session):
        self.session = session

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.counts["skipped"] += 1
        elif report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)[:500]
        elif report.when == "call":
            self.counts["passed"] += 1
            test = report.nodeid.split("::")[-1].split("[")[0]
            self.by_test[test] = self.by_test.get(test, 0) + 1

    def record(self) -> dict:
        return {"available": self.available, **self.counts, "not_run": self.not_run, "passed_by_test": self.by_test, "failures": self.failures}


def run_share(arguments) -> dict:
    """One process's share of the cases, run here."""
    import pytest

    import strobe

    strobe.install_as("flash_attn")
    # The file imports the KV-cache function beside the others; its cases are not run.
    for module in (strobe.flash_attn, strobe.flash_attn.flash_attn_interface):
        module.flash_attn_with_kvcache = None
    sample = Sample(arguments.cases, arguments.seed, arguments.share, arguments.processes, arguments.seconds)
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
    status = pytest.main([str(arguments.file), *options], plugins=[sample])
    return {**sample.record(), "pytest_status": 0 if status == 2 and sample.not_run else int(status)}


def run_all(arguments) -> list[dict]:
    """Every process's share, each in a child of its own."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder) / f"{i}.log" for i in range(arguments.processes)]
        results = [pathlib.Path(folder) / f"{i}.json" for i in range(arguments.processes)]
        command = [sys.executable, __file__, str(arguments.file), "--cases", str(arguments.cases), "--seed", str(arguments.seed)]
        command += ["--processes", str(arguments.processes), "--seconds", str(arguments.seconds)]
        children = []
        for i, (log, result) in enumerate(zip(logs, results)):
            with log.open("w") as output:
                children.append(
                    subprocess.Popen([*command, "--share", str(i), "--json", str(result)], stdout=output, stderr=subprocess.STDOUT)
                )
        try:
            for child, log, result in zip(children, logs, results):
                child.wait()
                if not result.exists():
                    print(log.read_text()[-3000:])
        finally:
            for child in children:
                child.kill()
        return [json.loads(r.read_text()) if r.exists() else {"pytest_status": -1} for r in results]


def merged(shares: list[dict]) -> dict:
    """The counts of all shares together; a share that ended without a result counts as a failure."""
    total = {"available": max(s.get("available", 0) for s in shares), **dict.fromkeys(COUNTS, 0)}
    by_test, failures = {}, {}
    for i, share in enumerate(shares):
        if share["pytest_status"] not in (0, 1):
            failures[f"process {i}"] = f"ended with status {share['pytest_status']}"
        for name in COUNTS:
            total[name] += share.get(name, 0)
        for test, count in share.get("passed_by_test", {}).items():
            by_test[test] = by_test.get(test, 0) + count
        failures.update(share.get("failures", {}))
    return {**total, "passed_by_test": dict(sorted(by_test.items())), "failures": failures}


def describe(arguments, total: dict, seconds: float) -> dict:
    import torch

    import strobe

    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": os.environ.get("STROBE_COMMIT", "unknown"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "strobe": strobe.__version__,
        "file_sha256": hashlib.sha256(arguments.file.read_bytes()).hexdigest(),
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        **total,
    }


def _stop(signal_number, frame):
    sys.exit(1)  # by way of `finally`, which ends the children


def main():
    signal.signal(signal.SIGTERM, _stop)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="how many processes share the GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after that long; counts what did not run")
    parser.add_argument("--share", type=int, help="run only this one of the processes' shares, counted from 0")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    if arguments.share is not None:
        arguments.json.write_text(json.dumps(run_share(arguments)))
        return
    start = time.monotonic()
    total = merged(run_all(arguments))
    record = describe(arguments, total, time.monotonic() - start)
    for name, text in list(total["failures"].items())[:20]:
        print(f"{name}\n    {text}")
    print(", ".join(f"{total[name]} {name}" for name in COUNTS) + f" of {total['available']} (seed {arguments.seed})")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(0 if total["passed"] and not total["failures"] else 1)


if __name__ == "__main__":
    main()
