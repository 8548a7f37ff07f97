"""Runs of `strobe train`: repeatable, resumable from any moment of death, stoppable; `strobe generate` with and without
cache.

STROBE_DEVICE=cuda runs all of it on a GPU; STROBE_KILLS says how often a run is killed."""

import fcntl
import json
import os
import random
import re
import signal
import struct
import subprocess
import termios
import time

import pytest

from training_runs import STROBE, Trainer, checkpoint, log, log_lines, sentence, wait_for_log

KILLS = int(os.environ.get("STROBE_KILLS", "24"))
STEPS = 60

OPTIONS = ["--layers", "2", "--hidden", "32", "--heads", "4", "--kv-heads", "2", "--context", "32", "--batch", "4",
           "--steps", str(STEPS), "--warmup", "5", "--lr", "5e-3", "--accumulate", "2", "--eval-every", "20",
           "--save-every", "4", "--threads", "2", "--device", os.environ.get("STROBE_DEVICE", "cpu")]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    dice = random.Random(3)
    text.write_text("\n".join(sentence(dice) for _ in range(2000)))
    return Trainer(text, OPTIONS)


def weights(out):
    return (checkpoint(out, STEPS) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, trainer.run(out)


def test_learns_and_reports(finished):
    out, result = finished
    assert result["steps"] == STEPS and not result["interrupted"]
    assert result["held_out_loss_per_byte"] < 2.6 < 5.5  # of 5.55 at the start
    assert [line["step"] for line in log_lines(out) if "loss" in line] == list(range(1, STEPS + 1))
    assert list(log(out, "held_out_loss")) == [20, 40, 60]
    svg = (out / "loss.svg").read_text()
    assert svg.startswith("<svg") and svg.count("<polyline") == 3


def test_a_person_sees_how_it_goes(trainer, tmp_path):
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = trainer.start(tmp_path / "run", stderr=end)
    os.close(end)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    summary, _ = process.communicate()
    assert process.returncode == 0
    lines = seen.decode().split("\r")
    shape = (r" +\d+ % │[█▏▎▍▌▋▊▉ ]{24}│ step \d+/60  loss \d\.\d{4}  held out \d\.\d{4}  [\d.]+ [kM]?tok/s  "
             r"[\d.]+ [MGT]FLOP/s  MFU \d+ %  \d+:\d\d left")
    assert any(re.match(shape, line) for line in lines), lines[-3:]
    assert any("100 %" in line and "step 60/60" in line for line in lines)
    picture = str(tmp_path / "run" / "loss.svg")
    for word in ("held-out loss", "nats per byte", "linear", "attention", picture, "log.jsonl"):
        assert word in summary, summary


def test_same_seed_same_bits_and_other_seed_other_bits(trainer, finished, tmp_path):
    trainer.run(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(finished[0])
    trainer.run(tmp_path / "other", "--seed", "2")
    assert weights(tmp_path / "other") != weights(finished[0])


@pytest.mark.parametrize("recompute", ["norms", "pointwise", "block"])
def test_recomputation_changes_no_bit(trainer, finished, tmp_path, recompute):
    trainer.run(tmp_path / "run", "--recompute", recompute)
    assert weights(tmp_path / "run") == weights(finished[0])


def wait_for_a_write(process, out, saves):
    """Returns while the run writes a checkpoint, its `saves`-th from now; or when the process has ended."""
    seen = set()
    while process.poll() is None:
        fresh = {name for name in os.listdir(out) if name.startswith(".step-")} if out.exists() else set()
        seen |= fresh
        if fresh and len(seen) >= saves:
            return


def test_killed_at_any_moment_it_resumes_to_the_same_bits(trainer, tmp_path):
    """kill -9 at random moments of a run, and at random moments of its checkpoint writes."""
    long_run = ["--steps", "300", "--save-every", "3", "--eval-every", "0"]
    reference = tmp_path / "reference"
    duration = -time.monotonic()
    trainer.run(reference, *long_run)
    duration += time.monotonic()
    expected = (checkpoint(reference, 300) / "model.safetensors").read_bytes()

    def start(out):
        return trainer.start(out, "--resume", "--quiet", *long_run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finished_well(process, out):
        """The process ended by itself: so it came to the end of the run."""
        assert process.wait() == 0, process.stderr.read()
        assert (checkpoint(out, 300) / "model.safetensors").read_bytes() == expected, f"{out.name} after kills {kills}"

    dice = random.Random(11)
    kills = {"anywhere": 0, "in a write": 0}
    out = tmp_path / "run-0"
    for attempt in range(1000):
        if kills["anywhere"] >= KILLS // 2 and kills["in a write"] >= KILLS // 2:
            break
        process = start(out)
        if kills["in a write"] < KILLS // 2 and attempt % 2:
            wait_for_a_write(process, out, saves=dice.randint(1, 4))
            time.sleep(dice.choice([0.0, 0.0, dice.uniform(0.0, 0.003)]))
        else:
            try:
                process.wait(timeout=dice.uniform(0.0, duration))
            except subprocess.TimeoutExpired:
                pass
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            finished_well(process, out)
            out = tmp_path / f"run-{attempt + 1}"
            continue
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        # A killed write leaves its folder behind under a hidden name.
        left = out.exists() and any(name.startswith(".step-") for name in os.listdir(out))
        kills["in a write" if left else "anywhere"] += 1
    assert min(kills.values()) >= KILLS // 2, kills
    finished_well(start(out), out)


def test_interrupt_saves_and_resume_goes_on(trainer, finished, tmp_path):
    out = tmp_path / "run"
    process = trainer.start(out, "--quiet", "--save-every", "0")
    wait_for_log(out, 5, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped after" in output and "--resume" in output
    assert len(list(out.glob("step-*"))) == 1
    trainer.run(out, "--resume")
    assert weights(out) == weights(finished[0])


def test_refuses_what_would_destroy_or_mislead(trainer, finished, tmp_path):
    def refusal(*more):
        done = trainer.attempt(finished[0], *more)
        assert done.returncode != 0
        return done.stderr

    assert "--resume" in refusal()
    assert "learning_rate" in refusal("--resume", "--lr", "0.1")
    assert "gradients" in refusal("--resume", "--gradients", "bf16")
    assert "gradients" in refusal("--overwrite", "--gradients", "bf16")
    assert "masters" in refusal("--overwrite", "--masters", "bf16")
    assert weights(finished[0])
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, " * 400)
    done = Trainer(other, []).attempt(finished[0], "--resume")
    assert done.returncode != 0 and "data" in done.stderr


def test_fine_tunes_from_a_checkpoint(trainer, finished, tmp_path):
    result = trainer.run(tmp_path / "tuned", "--init", finished[0], "--lr", "1e-3")
    assert result["held_out_loss"] < finished[1]["held_out_loss"]


def generate(checkpoint, *options):
    return subprocess.run([STROBE, "generate", "--checkpoint", checkpoint, "--prompt", "the room", *options],
                          capture_output=True, text=True)


@pytest.mark.parametrize("sampling", [["--temperature", "0"],
                                      ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "5"]])
def test_cache_and_no_cache_give_the_same_tokens(finished, sampling):
    def tokens(*more):
        # More than the context of 32 tokens: the window slides too.
        done = generate(finished[0], "--tokens", "80", "--json", *sampling, *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["tokens"]

    assert len(tokens()) == 80
    assert tokens() == tokens("--no-cache")


def test_generate_prints_the_prompt_and_the_text(finished):
    options = ("--tokens", "20", "--temperature", "0")
    text = json.loads(generate(finished[0], *options, "--json").stdout)["text"]
    assert generate(finished[0], *options).stdout == "the room" + text + "\n"


def test_generate_refuses_before_it_prints(tmp_path, finished):
    for checkpoint_of, options, said in ((tmp_path / "none", (), str(tmp_path / "none")),
                                         (finished[0], ("--tokens", "0"), "tokens is 0")):
        done = generate(checkpoint_of, *options)
        assert done.returncode != 0 and said in done.stderr
        assert done.stdout == ""
