"""Runs FlashAttention-2's own test file, unmodified, against strobe.flash_attn: a random sample of its cases.

    python python/tests/fa2_suite.py test_flash_attn.py --cases 3000 --seed 0 --processes 8 --json results/fa2_suite.json

The file comes from the FlashAttention repository (tests/test_flash_attn.py) and needs a CUDA GPU, einops and pytest. Cases of the
KV cache and of paged keys are left out: strobe does not have them. Of the half a million cases only the sampled ones are made: the
test functions are called with the values of their parametrize marks, which is what pytest would do.

The processes share the GPU's memory, of which the tests' own references take most. A case that finds too little is repeated: once in
its own process, and where that does not help, behind all others by one process that has the memory to itself ("alone" in the record;
too little there is a failure). A process that has not finished --grace seconds after --seconds ends itself; what it had found counts,
and the case that it was in counts as a failure, with the place in its log. Exits with 1 if any case fails or none passes.
"""

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback

COUNTS = ("passed", "failed", "skipped", "not_run", "repeated", "alone")
_CONTEXT_BYTES = 2**30  # of a process beside what torch allocates: the CUDA context and the kernels
_ATTEMPTS = 2
_ALONE_SECONDS = 60  # for the cases that need the GPU's memory to themselves
_STARTUP_SECONDS = 180  # until a process has imported torch and ends itself in time


class Test:
    """One test function with the axes of its parametrize marks."""

    def __init__(self, name: str, function):
        self.name, self.function = name, function
        self.axes: list[list[dict]] = []
        for mark in getattr(function, "pytestmark", []):
            if mark.name != "parametrize":
                raise ValueError(f"{name}: has a mark {mark.name}, which this runner does not know")
            names = [n.strip() for n in mark.args[0].split(",")]
            values = [dict(zip(names, v if len(names) > 1 else (v,))) for v in mark.args[1]]
            self.axes.append([v for v in values if v.get("paged_kv_block_size") is None])

    def __len__(self) -> int:
        count = 1
        for axis in self.axes:
            count *= len(axis)
        return count

    def case(self, index: int) -> dict:
        """The parameters of one of its cases."""
        parameters = {}
        for axis in self.axes:
            index, at = divmod(index, len(axis))
            parameters |= axis[at]
        return parameters


def tests_of(path: pathlib.Path) -> list[Test]:
    spec = importlib.util.spec_from_file_location("fa2_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Test(n, f) for n, f in vars(module).items() if n.startswith("test_") and "kvcache" not in n]


def sampled(tests: list[Test], cases: int, seed: int) -> list[tuple[Test, int]]:
    """`cases` different cases in random order, each of all with the same chance."""
    total = sum(map(len, tests))
    chosen = []
    for number in random.Random(seed).sample(range(total), min(cases, total)):
        for test in tests:
            if number < len(test):
                chosen.append((test, number))
                break
            number -= len(test)
    return chosen


def outcome(test: Test, parameters: dict) -> tuple[str, str]:
    """("passed" | "failed" | "skipped" | "no memory", why)."""
    import pytest
    import torch

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            test.function(**parameters)
        return "passed", ""
    except pytest.skip.Exception as e:
        return "skipped", str(e)
    except Exception as e:
        line = traceback.extract_tb(e.__traceback__)[-1]
        kind = "no memory" if isinstance(e, torch.OutOfMemoryError) else "failed"
        return kind, f"{type(e).__name__}: {e} in line {line.lineno}: {line.line}"[:500]


class Share:
    """What one process has found. The file is kept up to date, for a process that does not come to its end."""

    def __init__(self, path: pathlib.Path, available: int, alone: bool = False):
        self.path, self.alone = path, alone
        self.record = {"available": available, **dict.fromkeys(COUNTS, 0), "passed_by_test": {}, "failures": {}, "running": None}
        self.record["too_large"] = []  # [test, index] of what needs more memory than this share has

    def run(self, test: Test, index: int, cases_behind: int) -> None:
        parameters = test.case(index)
        name = f"{test.name}[{', '.join(f'{n}={v}' for n, v in parameters.items())}]"
        self.write(name, cases_behind)
        for attempt in range(_ATTEMPTS):
            result, why = outcome(test, parameters)
            if result != "no memory":
                break
            self._make_room(attempt)
        self.record["alone"] += self.alone
        if result == "no memory" and not self.alone:
            self.record["too_large"].append([test.name, index])
            return
        self.record["failed" if result == "no memory" else result] += 1
        if result == "passed":
            self.record["passed_by_test"][test.name] = self.record["passed_by_test"].get(test.name, 0) + 1
        elif result != "skipped":
            self.record["failures"][name] = why

    def _make_room(self, attempt: int) -> None:
        import torch

        self.record["repeated"] += 1
        gc.collect()
        torch.cuda.empty_cache()
        time.sleep(0.5 * 2**attempt)

    def write(self, running: str | None, not_run: int) -> None:
        """All or nothing: the process may be ended meanwhile."""
        self.record.update(running=running, not_run=not_run)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.record))
        part.replace(self.path)


def _share_memory(processes: int, fraction: float) -> None:
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(fraction / processes - _CONTEXT_BYTES / total)


def run_share(arguments) -> None:
    """One process's share of the cases, run here."""
    import strobe

    _share_memory(arguments.processes, arguments.memory)
    strobe.install_as("flash_attn")
    # The file imports the KV-cache function beside the others; its cases are not run.
    for module in (strobe.flash_attn, strobe.flash_attn.flash_attn_interface):
        module.flash_attn_with_kvcache = None
    tests = tests_of(arguments.file)
    if arguments.only:
        by_name = {test.name: test for test in tests}
        cases = [(by_name[name], index) for name, index in json.loads(arguments.only.read_text())]
    else:
        cases = sampled(tests, arguments.cases, arguments.seed)[arguments.share :: arguments.processes]
    share = Share(arguments.json, sum(map(len, tests)), alone=arguments.only is not None)
    left = len(cases)
    # The clock starts with the first case: importing torch takes its time on a busy machine.
    deadline = time.monotonic() + arguments.seconds
    if arguments.seconds < float("inf"):
        faulthandler.dump_traceback_later(arguments.seconds + arguments.grace, exit=True)
    for test, index in cases:
        # The order is random, so what ran until the deadline is a random sample too.
        if time.monotonic() > deadline:
            break
        left -= 1
        share.run(test, index, left)
    share.write(None, left)


def run_all(arguments) -> list[dict]:
    """All shares, each in a process of its own: a fault of the device in one does not take the others with it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        limits = {"memory": arguments.memory, "seconds": arguments.seconds, "grace": arguments.grace}
        own = [["--share", str(i)] for i in range(arguments.processes)]
        shares = run_processes(arguments, folder, {**limits, "processes": arguments.processes}, own)
        too_large = [case for share in shares for case in share.get("too_large", [])]
        if too_large:
            only = folder / "too_large.json"
            only.write_text(json.dumps(too_large))
            limits["seconds"] = min(arguments.seconds, _ALONE_SECONDS)
            shares += run_processes(arguments, folder, {**limits, "processes": 1}, [["--share", "0", "--only", str(only)]])
        return shares


def run_processes(arguments, folder: pathlib.Path, limits: dict, own: list[list[str]]) -> list[dict]:
    """The records of processes that run at the same time, one for each entry of `own`, its options."""
    deadline = time.monotonic() + limits["seconds"] + limits["grace"] + _STARTUP_SECONDS
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    results = [pathlib.Path(tempfile.mkdtemp(dir=folder)) / "share.json" for _ in own]
    logs = [r.with_suffix(".log") for r in results]
    command = [sys.executable, __file__, str(arguments.file), "--cases", str(arguments.cases), "--seed", str(arguments.seed)]
    for name, value in limits.items():
        command += [f"--{name}", str(value)]
    children = []
    try:
        for options, log, result in zip(own, logs, results):
            with log.open("w") as output:
                options = [*options, "--json", str(result)]
                children.append(subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT, env=environment))
        return [share_of(*x, deadline) for x in zip(range(len(children)), children, logs, results)]
    finally:
        for child in children:
            child.kill()
            child.wait()


def share_of(number: int, child: subprocess.Popen, log: pathlib.Path, result: pathlib.Path, deadline: float) -> dict:
    """The record of a process, waited for until the deadline. One that did not come to its end has failed where it was."""
    try:
        child.wait(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    share = json.loads(result.read_text()) if result.exists() else {"running": f"the start of process {number}", "failures": {}}
    if share["running"]:
        text = log.read_text()[-3000:]
        print(text)
        share["failed"] = share.get("failed", 0) + 1
        share["failures"][share["running"]] = f"process {number} ended early: {text[-300:]}"
    return share


def merged(shares: list[dict]) -> dict:
    """The counts of all shares together."""
    total = {"available": max(s.get("available", 0) for s in shares), **dict.fromkeys(COUNTS, 0)}
    by_test, failures = {}, {}
    for share in shares:
        for name in COUNTS:
            total[name] += share.get(name, 0)
        for test, count in share.get("passed_by_test", {}).items():
            by_test[test] = by_test.get(test, 0) + count
        failures.update(share["failures"])
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
    parser.add_argument("--memory", type=float, default=0.95, help="their part of the GPU's memory, all together")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after that long; counts what did not run")
    parser.add_argument("--grace", type=float, default=60, help="seconds after --seconds until a process is ended")
    parser.add_argument("--share", type=int, help="run only this one of the processes' shares, counted from 0")
    parser.add_argument("--only", type=pathlib.Path, help="of a share: run the cases of this file instead, [[test, index], ...]")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()

    if arguments.share is not None:
        run_share(arguments)
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
