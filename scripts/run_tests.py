"""Builds strobe with its tests and runs every kind of them; prints one line per step and a count at the end."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent
JOBS = str(len(os.sched_getaffinity(0)))


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def add(self, passed=0, failed=0, skipped=0):
        self.passed += passed
        self.failed += failed
        self.skipped += skipped

    def add_junit(self, path):
        """Counts the test cases of a JUnit XML file."""
        for case in ET.parse(path).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
                self.add(failed=1)
            elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
                self.add(skipped=1)
            else:
                self.add(passed=1)


def step(name):
    print(f"== {name}", flush=True)


def run(command, **options):
    """Runs a command with its output on ours; returns its exit status."""
    return subprocess.run([str(c) for c in command], cwd=ROOT, **options).returncode


def fixed_addresses():
    """A prefix for commands, or nothing where it is not permitted: the thread sanitizer's programs end at once where the kernel
    spreads addresses over more than 28 bits, and run anywhere without that."""
    prefix = ["setarch", "-R"]
    return prefix if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


def build(preset, *options, prefix=()):
    """Configures and builds a preset; the log is shown only when that fails."""
    step(f"build ({preset})")
    with tempfile.TemporaryFile("w+") as log:
        for command in (["cmake", "--preset", preset, *options], ["cmake", "--build", "--preset", preset, "-j", JOBS]):
            if subprocess.run([*prefix, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
                log.seek(0)
                sys.stdout.write(log.read())
                sys.exit(f"the build of preset {preset} failed")
    return ROOT / "build" / preset


def run_ctest(tree, tally, *options, prefix=()):
    junit = tree / "ctest.xml"
    junit.unlink(missing_ok=True)
    status = run([*prefix, "ctest", "--test-dir", tree, "-j", JOBS, "--output-on-failure", "--output-junit", junit, "--progress",
                  "--no-tests=error", *options])
    if not junit.exists():
        tally.add(failed=1)
        return
    before = tally.failed
    tally.add_junit(junit)
    if status and tally.failed == before:
        tally.add(failed=1)


def run_pytest(tree, tally):
    step("Python tests")
    junit = tree / "pytest.xml"
    junit.unlink(missing_ok=True)
    environment = dict(os.environ, STROBE_BUILD_DIR=str(tree), STROBE_LIBRARY_DIR=str(tree / "lib"),
                       PYTHONPATH=str(ROOT / "python"), HF_HUB_OFFLINE="1")
    status = run([sys.executable, "-m", "pytest", "-q", "tests/python", "python/tests", f"--junitxml={junit}"],
                 env=environment)
    if not junit.exists():
        tally.add(failed=1)
        return
    before = tally.failed
    tally.add_junit(junit)
    if status and tally.failed == before:
        tally.add(failed=1)


def run_consumers(tree, tally):
    """Installs the library and builds the projects under tests/consumer against the installed package alone."""
    step("installed package: find_package in C++, plain C through pkg-config")
    prefix = tree / "install"
    shutil.rmtree(prefix, ignore_errors=True)
    if run(["cmake", "--install", tree, "--prefix", prefix], stdout=subprocess.DEVNULL):
        tally.add(failed=1)
        return
    for project in sorted((ROOT / "tests" / "consumer").iterdir()):
        if not (project / "CMakeLists.txt").exists():
            continue
        out = tree / "consumer" / project.name
        shutil.rmtree(out, ignore_errors=True)
        pkg_config_dirs = ":".join(str(p) for p in prefix.glob("lib*/**/pkgconfig"))
        environment = dict(os.environ, PKG_CONFIG_PATH=pkg_config_dirs)
        good = all(run(c, env=environment, stdout=subprocess.DEVNULL) == 0 for c in (
            ["cmake", "-S", project, "-B", out, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"],
            ["cmake", "--build", out],
            ["ctest", "--test-dir", out, "--no-tests=error", "--output-on-failure"]))
        print(f"   {project.name}: {'passed' if good else 'FAILED'}", flush=True)
        tally.add(passed=good, failed=not good)


def run_fuzzers(tally, seconds):
    tree = build("fuzz")
    seeds = tree / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    if run([tree / "bin" / "fuzz_seeds", seeds]):
        sys.exit("the seeds of the fuzzers could not be written")
    for target in sorted(t for t in (tree / "bin").glob("fuzz_*") if t.name != "fuzz_seeds"):
        limit = seconds or (60 if target.name == "fuzz_validate" else 20)
        step(f"{target.name}, {limit} s")
        corpus = tree / "corpus" / target.name
        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile("w+") as log:
            status = run([target, f"-max_total_time={limit}", "-rss_limit_mb=4096", "-timeout=120",
                          f"-artifact_prefix={corpus.parent}/{target.name}-", corpus,
                          *[s for s in [seeds / target.name] if s.exists()]], stdout=log, stderr=subprocess.STDOUT)
            if status:
                log.seek(0)
                sys.stdout.write(log.read()[-8000:])
        tally.add(passed=status == 0, failed=status != 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitizers", action="store_true", help="also run the C++ tests under asan+ubsan and tsan")
    parser.add_argument("--fuzz", type=int, default=0, metavar="SECONDS", help="fuzz each target that long")
    arguments = parser.parse_args()

    start = time.monotonic()
    tally = Tally()
    tree = build("test")
    step("C++ tests")
    run_ctest(tree, tally)
    run_consumers(tree, tally)
    run_pytest(tree, tally)
    run_fuzzers(tally, arguments.fuzz)
    if arguments.sanitizers:
        for preset in ("asan-ubsan", "tsan"):
            prefix = fixed_addresses()
            sanitized = build(preset, prefix=prefix)
            step(f"C++ tests ({preset})")
            run_ctest(sanitized, tally, "-LE", "large", prefix=prefix)
    print(f"\nall steps took {time.monotonic() - start:.0f} s")
    print(f"{tally.passed} passed, {tally.failed} failed" + (f", {tally.skipped} skipped" if tally.skipped else ""))
    sys.exit(1 if tally.failed or not tally.passed else 0)


if __name__ == "__main__":
    main()
