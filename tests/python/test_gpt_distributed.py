"""Runs of `strobe train` by several processes: the same result for any number of them, resumable with any other number,
ended together when one of them ends, started by every launcher's variables."""

import json
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from training_runs import STROBE, Trainer, checkpoint, log, sentence, wait_for_log, wait_until

STEPS = 24
# 6 rows per step: 3 for each of two processes, 2 for each of three; 4 processes have 1 or 2.
OPTIONS = ["--layers", "3", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--context", "32",
           "--batch", "3", "--accumulate", "2", "--steps", str(STEPS), "--warmup", "5", "--lr", "3e-3",
           "--eval-every", "8", "--eval-rows", "7", "--save-every", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    dice = random.Random(3)
    documents = ["\n".join(sentence(dice) for _ in range(dice.randint(1, 12))) for _ in range(120)]
    text.write_text("<|endoftext|>".join(documents))
    return Trainer(text, OPTIONS)


def states(out, step=STEPS):
    folder = checkpoint(out, step)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_alike(a, b, tolerance):
    """Every tensor within `tolerance` of its size. AdamW makes whole steps of gradients that are nothing but rounding, so
    this is no matter of a few digits."""
    assert a.keys() == b.keys()
    for name in a:
        difference = np.linalg.norm(a[name] - b[name]) / max(np.linalg.norm(b[name]), 1e-12)
        assert difference < tolerance, (name, difference)


@pytest.fixture(scope="module")
def single(trainer, tmp_path_factory):
    out = tmp_path_factory.mktemp("single")
    return out, trainer.run(out)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_trains_alike(trainer, single, tmp_path, processes):
    result = trainer.run(tmp_path / "run", "--processes", str(processes))
    assert result["steps"] == STEPS and result["operators"]["communication"]["calls"] > 0
    for key in ("loss", "gradient_norm", "held_out_loss", "tokens"):
        expected, actual = log(single[0], key), log(tmp_path / "run", key)
        assert expected.keys() == actual.keys() and len(expected) >= 3
        for step in expected:
            assert actual[step] == pytest.approx(expected[step], rel=2e-4), (key, step)
    assert result["held_out_loss"] == pytest.approx(single[1]["held_out_loss"], rel=2e-4)
    assert_alike(states(tmp_path / "run"), states(single[0]), 2e-2)
    # And the same number of processes the same bits.
    trainer.run(tmp_path / "again", "--processes", str(processes))
    first, second = (checkpoint(tmp_path / name, STEPS) / "model.safetensors" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("before,after", [(1, 3), (3, 1), (3, 2), (2, 4)])
def test_resumes_with_any_other_number(trainer, single, tmp_path, before, after):
    start = single[0]
    if before > 1:
        start = tmp_path / "start"
        trainer.run(start, "--processes", str(before))
    out = tmp_path / "run"
    shutil.copytree(checkpoint(start, 16), checkpoint(out, 16))
    shutil.copy(start / "log.jsonl", out)
    trainer.run(out, "--resume", "--processes", str(after))
    expected, actual = log(single[0]), log(out)
    assert expected.keys() == actual.keys()
    for step in expected:
        assert actual[step] == pytest.approx(expected[step], rel=2e-4), step
    assert_alike(states(out), states(single[0]), 2e-2)


def launcher_variables(launcher, rank, count, port):
    if launcher == "torchrun":
        return {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if launcher == "mpirun":
        return {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": count, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_SIZE": count, "MASTER_PORT": port}
    assert launcher == "srun"
    return {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": rank, "SLURM_NODEID": 0,
            "SLURM_STEP_TASKS_PER_NODE": count, "SLURM_STEP_NODELIST": "here", "MASTER_PORT": port}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(trainer, out, count, *more, launcher="torchrun", changes=None):
    """One process per rank, started as a launcher does it; `changes`, by rank, are variables unlike the launcher's."""
    port = free_port()
    return [trainer.start(out, "--quiet", *more, stderr=subprocess.PIPE,
                          **{**launcher_variables(launcher, rank, count, port), **(changes or {}).get(rank, {})})
            for rank in range(count)]


def ends(processes, timeout=60):
    """Exit status, standard output and standard error of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "srun"])
def test_launchers_variables_make_a_group(trainer, single, tmp_path, launcher):
    done = ends(start_ranks(trainer, tmp_path / "run", 2, launcher=launcher))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "held-out loss" in done[0][1] and done[1][1] == ""
    assert log(tmp_path / "run")[STEPS] == pytest.approx(log(single[0])[STEPS], rel=2e-4)


def test_under_torchrun_itself(trainer, single, tmp_path):
    torchrun = pathlib.Path(sys.executable).with_name("torchrun")
    if not torchrun.exists():
        pytest.skip("PyTorch is not installed")
    done = subprocess.run([torchrun, "--standalone", "--nproc-per-node", "2", "--no-python",
                           *trainer.command(tmp_path / "run", "--quiet")],
                          capture_output=True, text=True, env=trainer.environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path / "run")[STEPS] == pytest.approx(log(single[0])[STEPS], rel=2e-4)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all_with_a_message(trainer, tmp_path, victim):
    out = tmp_path / "run"
    processes = start_ranks(trainer, out, 3, "--steps", "100000", "--eval-every", "0", "--save-every", "5")
    wait_until(checkpoint(out, 5).exists, *processes)
    processes[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    done = ends(processes)
    assert time.monotonic() - start < 20
    for rank, (code, _, stderr) in enumerate(done):
        if rank == victim:
            assert code == -signal.SIGKILL
        else:
            assert code == 1, stderr
            assert f"rank {rank} of 3 ends: rank {victim} (process {processes[victim].pid} on " in stderr, stderr
    # What was saved before is whole.
    subprocess.run([STROBE, "checkpoint", "show", sorted(out.glob("step-*"))[-1]], check=True, capture_output=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_and_resumed_by_two_as_if_left_alone(trainer, tmp_path, victim):
    options = ["--steps", "300", "--save-every", "100", "--eval-every", "0"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    trainer.run(whole, "--processes", "2", *options)
    processes = start_ranks(trainer, out, 2, *options)
    wait_until(checkpoint(out, 100).exists, *processes, interval=0.002)
    processes[victim].send_signal(signal.SIGKILL)
    assert ends(processes)[1 - victim][0] == 1
    assert not checkpoint(out, 300).exists()
    trainer.run(out, "--resume", "--processes", "2", *options)
    assert log(out) == log(whole) and len(log(out)) == 300
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoint(out, 300) / name).read_bytes() == (checkpoint(whole, 300) / name).read_bytes(), name


def test_rows_that_do_not_divide_evenly(trainer, tmp_path):
    """9 rows, one in a pass, and 15 rows, 3 at most in a pass: of the latter 3 rows are one pass, 4 are two."""
    for batch, accumulate in (("1", "9"), ("3", "5")):
        options = ["--batch", batch, "--accumulate", accumulate, "--steps", "4"]
        one, four = tmp_path / f"one-{batch}", tmp_path / f"four-{batch}"
        trainer.run(one, *options)
        trainer.run(four, "--processes", "4", *options)
        assert log(four) == pytest.approx(log(one), rel=2e-4)


def test_a_rank_that_fails_by_itself_ends_all(trainer, tmp_path):
    """Rank 0 cannot write its checkpoint: the others hear why."""
    out = tmp_path / "run"
    processes = start_ranks(trainer, out, 2, "--steps", "100000", "--eval-every", "0", "--save-every", "1000")
    wait_for_log(out, 3, *processes)
    (out / ".lock").unlink()
    (out / "log.jsonl").unlink()
    out.rmdir()
    out.write_text("in the way")
    done = ends(processes)
    assert [code for code, _, _ in done] == [1, 1], done
    assert "run" in done[0][2] and "rank 0 (process" in done[1][2] and "failed:" in done[1][2], done


def test_interrupt_of_one_rank_saves_and_ends_all(trainer, single, tmp_path):
    out = tmp_path / "run"
    processes = start_ranks(trainer, out, 3, "--save-every", "0", "--eval-every", "0", "--steps", "100000")
    wait_for_log(out, 5, *processes)
    processes[1].send_signal(signal.SIGINT)
    assert [code for code, _, _ in ends(processes)] == [128 + signal.SIGINT] * 3
    assert len(list(out.glob("step-*"))) == 1


def test_interrupt_of_the_parent_reaches_its_processes(trainer, tmp_path):
    out = tmp_path / "run"
    process = trainer.start(out, "--quiet", "--processes", "2", "--save-every", "0", "--steps", "100000")
    wait_for_log(out, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "stopped after" in output
    assert len(list(out.glob("step-*"))) == 1


def refusals(processes):
    done = ends(processes)
    assert all(code not in (0, None) for code, _, _ in done), done
    return [stderr for _, _, stderr in done]


def test_what_cannot_be_is_refused_by_name_and_value(trainer, single, tmp_path):
    out = tmp_path / "run"
    quick = {"STROBE_RENDEZVOUS_SECONDS": 3}

    def alone(**variables):
        """What rank 0 says that is started by itself."""
        return refusals(start_ranks(trainer, out, 1, changes={0: variables}))[0]

    for stderr in refusals(start_ranks(trainer, out, 2, changes={0: quick, 1: {**quick, "WORLD_SIZE": 3}})):
        assert "rank 1 (process" in stderr and "as one of 3 processes" in stderr and "as one of 2" in stderr, stderr
    assert "RANK is '7'" in alone(RANK=7, WORLD_SIZE=2)
    assert "MASTER_PORT is 'http'" in alone(WORLD_SIZE=2, MASTER_PORT="http")
    assert "MASTER_ADDR is not set" in alone(WORLD_SIZE=2, MASTER_ADDR=None)
    assert "within 3 s: rank 1" in alone(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, **quick)
    # Ranks that disagree.
    port = free_port()
    processes = [trainer.start(out, "--quiet", *options, stderr=subprocess.PIPE,
                               **launcher_variables("torchrun", rank, 2, port))
                 for rank, options in enumerate((["--lr", "1e-3"], []))]
    for stderr in refusals(processes):
        assert "learning_rate is 0.00" in stderr and "for rank 1" in stderr and "for rank 0" in stderr, stderr
    # More processes than rows.
    for stderr in refusals(start_ranks(trainer, out, 2, "--batch", "1", "--accumulate", "1")):
        assert "1 rows" in stderr and "2 processes" in stderr, stderr
    done = trainer.attempt(out, "--processes", "3", **launcher_variables("torchrun", 0, 2, free_port()))
    assert done.returncode != 0 and "processes is 3" in done.stderr and "started 2" in done.stderr


def test_the_plan_knows_of_the_processes(trainer, tmp_path):
    def plan(*more):
        done = trainer.attempt(tmp_path / "run", "--plan", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    one, three = plan(), plan("--processes", "3")
    assert (one["processes"], three["processes"]) == (1, 3)
    assert three["bytes"]["moments"] == one["bytes"]["moments"] // 3
    assert three["bytes"]["activations"] < one["bytes"]["activations"]
