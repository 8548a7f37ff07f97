"""Finds the package: the one in this source tree with the libraries of STROBE_BUILD_DIR, else the installed one.

With --record FILE a run leaves its counts as JSON, and what tests measured (`record_property`), beside versions and the device.
"""

import fcntl
import json
import os
import pathlib
import sys
import time

import pytest

_SOURCE = pathlib.Path(__file__).resolve().parents[1]

if "STROBE_BUILD_DIR" in os.environ:
    os.environ.setdefault("STROBE_LIBRARY_DIR", str(pathlib.Path(os.environ["STROBE_BUILD_DIR"]) / "lib"))
if "STROBE_LIBRARY_DIR" in os.environ:
    sys.path.insert(0, str(_SOURCE))

import torch  # noqa: E402

# What one worker's allocator keeps, another cannot have; a rest is left for the tests that need more than a share.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
_SHARE, _LARGE_SHARE = (0.55 / _WORKERS, 0.35) if _WORKERS > 1 else (1.0, 1.0)
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction(_SHARE)


@pytest.fixture
def large_memory(tmp_path_factory):
    """A third of the GPU's memory instead of a worker's share, for one test at a time."""
    folder = tmp_path_factory.getbasetemp()
    with open((folder.parent if _WORKERS > 1 else folder) / "large_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(_LARGE_SHARE)
        yield
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(_SHARE)


def pytest_addoption(parser):
    parser.addoption("--record", type=pathlib.Path, metavar="FILE", help="write counts and measured values as JSON")


def pytest_configure(config):
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(config.getoption("--record")))


class Record:
    """Counts by file, and the properties of tests that have some; with several workers, of all of them."""

    def __init__(self, path: pathlib.Path):
        self.path, self.start = path, time.monotonic()
        self.counts: dict[str, dict[str, int]] = {}
        self.measured: dict[str, dict] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        file, _, test = report.nodeid.rpartition("/")[2].partition("::")
        counts = self.counts.setdefault(file, {})
        counts[report.outcome] = counts.get(report.outcome, 0) + 1
        if report.user_properties:
            self.measured.setdefault(file, {})[test] = dict(report.user_properties)
        if report.failed:
            self.failures.append(report.nodeid)

    def pytest_sessionfinish(self, session):
        total: dict[str, int] = {}
        for counts in self.counts.values():
            for outcome, count in counts.items():
                total[outcome] = total.get(outcome, 0) + count
        record = {
            "record": "python-tests",
            **_versions(),
            "command": sys.argv[1:],
            "seconds": round(time.monotonic() - self.start, 1),
            "total": total,
            "files": dict(sorted(self.counts.items())),
            "failures": self.failures,
            "measured": {file: dict(sorted(tests.items())) for file, tests in sorted(self.measured.items())},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n")


def _versions() -> dict:
    import importlib.util

    import strobe

    transformers = importlib.import_module("transformers").__version__ if importlib.util.find_spec("transformers") else None
    return {
        "commit": os.environ.get("STROBE_COMMIT", "unknown"),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "strobe": strobe.__version__,
        "implementations": list(strobe.implementations()),
        "torch": torch.__version__,
        "transformers": transformers,
        "python": sys.version.split()[0],
    }


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu"] + (["cuda"] if torch.cuda.is_available() else []))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
