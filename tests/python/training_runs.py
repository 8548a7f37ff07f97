"""Small runs of `strobe train`: their text, their command line, and what they leave behind."""

import json
import os
import pathlib
import subprocess
import time

STROBE = (pathlib.Path(os.environ.get("STROBE_BUILD_DIR", "build")) / "bin" / "strobe").absolute()
WORDS = ["strobe", "lights", "the", "room", "and", "stops", "a", "wheel"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def sentence(dice):
    """Eight words of which a model learns something in a few steps."""
    return " ".join(dice.choice(WORDS) for _ in range(8))


class Trainer:
    """`strobe train` on one text file, with options that later ones override."""

    def __init__(self, text, options):
        self.text, self.options = text, options

    def command(self, out, *more):
        return [STROBE, "train", "--data", self.text, "--out", out, *self.options, *more]

    def environment(self, **variables):
        """Ours without a launcher's; None leaves a variable out."""
        ours = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        given = {name: str(value) for name, value in variables.items() if value is not None}
        return {**ours, "STROBE_CACHE": str(self.text.parent / "cache"), **given}

    def start(self, out, *more, stdout=subprocess.PIPE, stderr=None, **variables):
        return subprocess.Popen(self.command(out, *more), stdout=stdout, stderr=stderr, text=True,
                                env=self.environment(**variables))

    def attempt(self, out, *more, timeout=180, **variables):
        return subprocess.run(self.command(out, *more), capture_output=True, text=True,
                              env=self.environment(**variables), timeout=timeout)

    def run(self, out, *more):
        """The result of a run that comes to its end."""
        done = self.attempt(out, "--json", *more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def log(out, key="loss"):
    """One of the logged figures by step."""
    return {line["step"]: line[key] for line in log_lines(out) if key in line}


def checkpoint(out, step):
    return out / f"step-{step:08d}"


def wait_until(condition, *processes, interval=0.01):
    """Returns once the condition holds; fails if a process has ended before."""
    while not condition():
        assert all(p.poll() is None for p in processes), [(p.poll(), *p.communicate(timeout=60)) for p in processes]
        time.sleep(interval)


def wait_for_log(out, lines, *processes):
    file = out / "log.jsonl"
    wait_until(lambda: file.exists() and len(file.read_text().splitlines()) >= lines, *processes)
