"""The strobe command: what info, verify and bench print, write and return. Exit codes: 0 done, 1 the answer is no, 2 unusable
arguments, 3 the machine cannot."""

import json
import os
import pathlib
import subprocess

import pytest

STROBE = pathlib.Path(os.environ.get("STROBE_BUILD_DIR", "build")) / "bin" / "strobe"
SMALL = "f32-d16-b2-h2-s33x45"  # some forty small cases


def strobe(*arguments, **environment):
    return subprocess.run([STROBE, *map(str, arguments)], capture_output=True, text=True, env=dict(os.environ, **environment))


def test_info_tells_what_there_is(tmp_path):
    done = strobe("info", "--json", tmp_path / "info.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "info.json").read_text())
    assert record["record"] == "info" and record["command"].startswith("strobe info")
    names = [row["name"] for row in record["implementations"]]
    assert names[-2:] == ["cpu", "reference"] and all(name in done.stdout for name in names)
    used = record["machine"]["instruction_set_used"]
    assert used in record["machine"]["instruction_sets"] and f"(uses {used})" in done.stdout
    assert record["fma_peak_gflops_per_core"] > 1
    assert record["cases"]["verify"] == len(strobe("verify", "--list").stdout.split()) and record["cases"]["bench"] == 48


def test_info_counts_the_cases_of_a_filter():
    count = len(strobe("verify", "--list", "--filter", "d64*causal").stdout.split())
    assert f"cases             {count} of strobe verify, 12 of strobe bench" in strobe("info", "--filter", "d64*causal").stdout


def test_an_instruction_set_can_be_forced():
    assert "(uses portable)" in strobe("info", STROBE_CPU_ISA="portable").stdout
    for arguments in (("info",), ("bench", "--filter", "s512")):
        done = strobe(*arguments, STROBE_CPU_ISA="mmx")
        assert done.returncode == 2, done.stdout
        assert 'STROBE_CPU_ISA is "mmx"; this machine and build have portable' in done.stderr


def test_verify_passes_and_records_every_case(tmp_path):
    done = strobe("verify", "--filter", SMALL, "--json", tmp_path / "verify.json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "verify.json").read_text())
    assert record["failed"] == record["unsupported"] == 0 and record["passed"] == len(record["cases"]) >= 40
    assert f"{record['passed']} passed, 0 failed, 0 not supported" in done.stdout
    assert 0 < record["worst_error_over_bound"] <= 1
    for case in record["cases"]:
        assert SMALL in case["case"] and case["outcome"] == "passed"
        assert {"out", "lse", "dq", "dk", "dv"} <= set(case["errors"])
        assert all(error <= bound for error, _, bound in case["errors"].values())


def test_verify_lists_its_cases():
    names = strobe("verify", "--list").stdout.split()
    assert len(names) == len(set(names)) >= 3000
    only = strobe("verify", "--list", "--filter", "bf16*dropout,!varlen").stdout.split()
    assert only == [n for n in names if "bf16" in n and "dropout" in n.split("bf16", 1)[1] and "varlen" not in n]


def test_verify_takes_an_implementation_and_threads(tmp_path):
    for options in (("--implementation", "reference"), ("--implementation", "cpu", "--threads", 1)):
        done = strobe("verify", "--filter", SMALL, *options, "--json", tmp_path / "verify.json")
        assert done.returncode == 0, done.stdout + done.stderr
    # One thread altogether, those that compute the references included.
    assert json.loads((tmp_path / "verify.json").read_text())["machine"]["threads"] == 1


def test_bench_times_both_directions(tmp_path):
    done = strobe("bench", "--filter", "f32-d64*s512*causal", "--seconds", 0.01, "--threads", 1, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["threads"] == 1
    assert [cell["direction"] for cell in record["cells"]] == ["forward", "backward"] * 2
    for cell in record["cells"]:
        assert cell["implementation"] == "cpu" and cell["seconds"] > 0 and cell["repeats"] >= 1
        assert cell["fraction_of_fma_peak"] == pytest.approx(cell["flops_per_second"] / record["fma_peak_gflops_per_core"] / 1e9)


@pytest.mark.parametrize("arguments,code,message", [
    (("--help",), 0, ""),
    (("verify", "--help"), 0, ""),
    (("--version",), 0, ""),
    ((), 2, "subcommand"),
    (("juggle",), 2, '"juggle" is no command; there are info, verify, bench'),
    (("verify", "--filter", "nothing-is-called-so"), 2, 'no case matches "nothing-is-called-so"'),
    (("bench", "--filter", "d63"), 2, 'no benchmark case matches "d63"'),
    (("verify", "--device", "tpu"), 2, 'is "tpu"; it must be cpu, cuda or cuda:N'),
    (("info", "--filter", "nothing-is-called-so"), 2, 'no case matches "nothing-is-called-so"'),
    (("info", "--device", "cuda:-1"), 2, "it must be cpu, cuda or cuda:N"),
    (("info", "--device", "cuda:99999999999"), 2, "it must be cpu, cuda or cuda:N"),
    (("verify", "--threads", "0"), 2, "--threads: Value 0 not in range 1 to"),
    (("bench", "--seconds", "nan"), 2, "--seconds: is not a number"),
    (("bench", "--vs", "abacus"), 2, "--vs"),
    (("verify", "--implementation", "abacus"), 2, '--implementation: is "abacus"; for cpu there are: cpu, reference'),
    (("bench", "--implementation", "abacus"), 2, '--implementation: is "abacus"; for cpu there are: cpu, reference'),
    (("bench", "--filter", "s512", "--vs", "torch", "--python", "/nowhere/python"), 3, "--python names another interpreter"),
])
def test_exit_codes(arguments, code, message):
    done = strobe(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert not (code == 0 and done.stderr)


@pytest.mark.parametrize("command", ["info", "verify", "bench"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path):
    for path, reason in (("/nowhere/x.json", "No such file or directory"), (tmp_path, "it is a directory")):
        done = strobe(command, "--json", path)
        assert done.returncode == 2 and done.stdout == "", done.stdout
        assert f"--json: cannot write {path}: {reason}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there():
    if subprocess.run(["sh", "-c", "nvidia-smi -L"], capture_output=True).returncode == 0:
        pytest.skip("this machine has a GPU")
    for name in ("info", "verify", "bench"):
        done = strobe(name, "--device", "cuda")
        assert done.returncode == 3 and "--device: is cuda; " in done.stderr, done.stderr
