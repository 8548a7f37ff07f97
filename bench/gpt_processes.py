"""Data parallelism, checked and timed: losses of 1 and of N processes from the same options, runs resumed by the other number, and
tokens/s of 1 and of N, each process with the same number of rows. On GPUs the steps timed are GPT-3's shapes.

    NCCL_NVLS_ENABLE=0 python3 bench/gpt_processes.py build/cuda/bin --device cuda --processes 2 --json results/FILE.json

Exits with 1 where losses differ by more than their tolerance: 1e-2 of the loss in bf16, 1e-3 in fp32.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import measuring

SMALL = ["--heads", "4", "--batch", "8", "--accumulate", "2", "--steps", "40", "--warmup", "10", "--save-every", "20", "--eval-every", "0"]
SHAPES = {"cuda": ["--layers", "4", "--hidden", "256", "--context", "256"],
          "cpu": ["--layers", "2", "--hidden", "64", "--context", "64", "--held-out", "0.01"]}
MODELS = ["1.3B", "124M"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in log(folder) if "loss" in line}


class Runs:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder

    def train(self, name, processes, *options):
        out = self.folder / name
        command = [self.arguments.bin / "strobe", "train", "--quiet", "--device", self.arguments.device, "--data", self.arguments.text,
                   "--out", out, "--processes", str(processes), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        return out

    def resume(self, name, start, processes):
        out = self.folder / name
        shutil.copytree(start / "step-00000020", out / "step-00000020")
        shutil.copy(start / "log.jsonl", out)
        return self.train(name, processes, "--resume")


def compare(name, a, b, tolerance):
    a, b = losses(a), losses(b)
    worst = max(abs(b[step] / a[step] - 1) for step in a.keys() | b.keys())
    good = worst < tolerance
    print(f"{name:<34} {len(a)} steps, loss {a[1]:.4f} -> {a[max(a)]:.4f}; at most {worst:.1e} apart ({'good' if good else 'BEYOND'} {tolerance})")
    return {"steps": len(a), "first": a[1], "last": [a[max(a)], b[max(b)]], "largest_relative_difference": worst, "tolerance": tolerance,
            "good": good}


def bench(arguments, model, processes):
    command = [arguments.bin / "gpt_cuda_step_bench", model, "2048", str(arguments.rows), "10", f"processes={processes}"]
    output, busy = measuring.run(command)
    record = json.loads(output)
    for key in ("parts", "products"):
        record.pop(key)
    return {**record, "others_used_processors": busy}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=pathlib.Path, help="folder of the built programs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of 2048 tokens, for each process")
    parser.add_argument("--text", type=pathlib.Path, default=measuring.ROOT / "docs")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    several, tolerance = arguments.processes, 1e-2 if arguments.device == "cuda" else 1e-3
    record = {**measuring.header(), "device": arguments.device, "processes": several, "losses": {}, "speed": {}}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(arguments, pathlib.Path(folder))
        options = [*SMALL, *SHAPES[arguments.device]]
        one, more = runs.train("one", 1, *options), runs.train("more", several, *options)
        for name, a, b in [(f"1 and {several} processes", one, more),
                           (f"resumed: 1, then {several}", one, runs.resume("one-more", one, several)),
                           (f"resumed: {several}, then 1", more, runs.resume("more-one", more, 1))]:
            record["losses"][name] = compare(name, a, b, tolerance)
    for model in MODELS if arguments.device == "cuda" else []:
        alone, together = bench(arguments, model, 1), bench(arguments, model, several)
        ratio = together["tokens_per_second"] / alone["tokens_per_second"]
        record["speed"][model] = {"one": alone, "several": together, "ratio": ratio}
        waits = together["operators"]["communication"]["milliseconds"]
        print(f"{model}: {alone['tokens_per_second']:.0f} tokens/s alone, {together['tokens_per_second']:.0f} by {several} "
              f"({1e3 * together['seconds_median']:.1f} ms, {waits:.1f} of them waiting): {ratio:.3f} times")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["good"] for row in record["losses"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
