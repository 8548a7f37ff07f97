"""Data parallelism, checked and timed: losses of 1 and of N processes from the same options, runs resumed by the other
number, a run that loses a process to kill -9 and goes on, and tokens/s of N processes beside those of each of them by
itself. On GPUs the steps timed are GPT-3's shapes.

    NCCL_NVLS_ENABLE=0 python3 bench/gpt_processes.py build/cuda/bin --device cuda --processes 2 --json FILE.json

What the order of sums alone does is measured: runs of one process that takes a step's rows in passes of another size
drift apart too, in bf16 by per cents over hundreds of steps. 1 and N processes may differ by 1e-3 of the loss in the
first ten steps, and by three times as much as the runs of one process in all (in fp32: by 1e-3). Exits with 1 where
they differ by more, where the killed and resumed run is not that which was left alone, bit for bit, or where the
processes' weights differ.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import measuring

STEPS, SAVE_EVERY = 400, 200  # a run keeps two checkpoints
FIRST_STEPS, TOLERANCE, DRIFT = 10, 1e-3, 3.0
SMALL = ["--heads", "4", "--steps", str(STEPS), "--warmup", "10", "--save-every", str(SAVE_EVERY), "--eval-every", "0"]
PASSES, OTHER_PASSES = ["--batch", "8", "--accumulate", "2"], ["--batch", "4", "--accumulate", "4"]
SHAPES = {"cuda": ["--layers", "4", "--hidden", "256", "--context", "256"],
          "cpu": ["--layers", "2", "--hidden", "64", "--context", "64", "--held-out", "0.01", "--threads", "1"]}
MODELS = [("124M", 2048, 8), ("1.3B", 2048, 8), ("1.3B", 8192, 2), ("1.3B", 2048, 16)]  # length, and rows of each process
FIRST, LAST = f"step-{SAVE_EVERY:08d}", f"step-{STEPS:08d}"


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in log(folder) if "loss" in line}


def side_by_side(*calls):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [job.result() for job in [pool.submit(*call) for call in calls]]


class Runs:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.small = [*SMALL, *SHAPES[arguments.device]]
        self.options = [*self.small, *PASSES]

    def command(self, out, *options):
        return [str(x) for x in (self.arguments.bin / "strobe", "train", "--quiet", "--device", self.arguments.device,
                                 "--data", self.arguments.text, "--out", out, *options)]

    def train(self, name, processes, *options):
        out = self.folder / name
        command = self.command(out, "--processes", processes, *(options or self.options))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        return out

    def resume(self, name, start, processes):
        out = self.folder / name
        shutil.copytree(start / FIRST, out / FIRST)
        shutil.copy(start / "log.jsonl", out)
        return self.train(name, processes, "--resume")

    def kill_one(self, name, processes):
        """The last rank is killed when it may, the others must end by themselves and name it. Returns the folder and
        their words."""
        out = self.folder / name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        several = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [subprocess.Popen(self.command(out, *self.options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True, env={**several, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(processes)]
        while not (out / FIRST).exists() and all(rank.poll() is None for rank in ranks):
            time.sleep(0.002)
        ranks[-1].send_signal(signal.SIGKILL)
        start, words = time.monotonic(), []
        for rank in ranks:
            try:
                words.append(rank.communicate(timeout=30)[1].strip())
            except subprocess.TimeoutExpired:
                rank.kill()
                words.append("did not end")
        named = all(rank.returncode == 1 and f"rank {processes - 1} (process {ranks[-1].pid} on " in text
                    for rank, text in zip(ranks[:-1], words))
        killed = ranks[-1].returncode == -signal.SIGKILL and not (out / LAST).exists()
        return out, {"good": named and killed, "seconds": time.monotonic() - start, "rank 0 said": words[0]}


def compare(name, a, b, tolerance_at_first, tolerance):
    a, b = losses(a), losses(b)
    apart = {step: abs(b[step] / a[step] - 1) for step in a.keys() | b.keys()}
    at_first, worst = max(apart[step] for step in range(1, FIRST_STEPS + 1)), max(apart.values())
    good = at_first <= tolerance_at_first and worst <= tolerance
    print(f"{name:<34} {len(a)} steps, loss {a[1]:.4f} -> {a[max(a)]:.4f}; apart in {FIRST_STEPS} steps "
          f"{at_first:.1e} (may {tolerance_at_first:.0e}), in all {worst:.1e} (may {tolerance:.1e})"
          f"{'' if good else ': BEYOND'}", flush=True)
    return {"steps": len(a), "first": a[1], "last": [a[max(a)], b[max(b)]],
            "largest_relative_difference": [at_first, worst],
            "tolerance": [tolerance_at_first, tolerance], "good": good}


def same_checkpoint(a, b):
    return all((a / LAST / name).read_bytes() == (b / LAST / name).read_bytes()
               for name in ("model.safetensors", "optimizer.safetensors"))


def check(arguments, folder, record):
    runs, several = Runs(arguments, folder), arguments.processes
    more = runs.train("more", several)
    one, other, (killed, end) = side_by_side((runs.train, "one", 1),
                                             (runs.train, "other", 1, *runs.small, *OTHER_PASSES),
                                             (runs.kill_one, "killed", several))
    record["a killed rank"] = end
    print(f"rank {several - 1} of {several} killed: the others ended {end['seconds']:.1f} s later "
          f"({'good' if end['good'] else 'BAD'}): {end['rank 0 said']}", flush=True)
    one_more, more_one = side_by_side((runs.resume, "one-more", one, several), (runs.resume, "more-one", more, 1))
    runs.train("killed", several, "--resume")
    order = "1 process, passes of 8 and of 4"
    record["losses"][order] = compare(order, one, other, TOLERANCE, 1.0)
    drift = record["losses"][order]["largest_relative_difference"][1]
    tolerance = DRIFT * drift if arguments.device == "cuda" else TOLERANCE
    for name, a, b, limit in [(f"1 and {several} processes", one, more, tolerance),
                              (f"resumed: 1, then {several}", one, one_more, tolerance),
                              (f"resumed: {several}, then 1", more, more_one, tolerance),
                              (f"killed and resumed: {several}", more, killed, 0.0)]:
        record["losses"][name] = compare(name, a, b, min(TOLERANCE, limit), limit)
    record["killed and resumed, weights and moments the same bits"] = same = same_checkpoint(more, killed)
    print(f"killed and resumed: weights and moments {'the same' if same else 'DIFFER'}", flush=True)
    return same and end["good"] and all(row["good"] for row in record["losses"].values())


def bench(arguments, model, seqlen, rows, processes):
    command = [arguments.bin / "gpt_cuda_step_bench", model, seqlen, rows, arguments.steps, f"processes={processes}"]
    output, busy = measuring.run(command)
    record = json.loads(output)
    for key in ("parts", "products"):
        record.pop(key)
    return {**record, "others_used_processors": busy}


def describe(r):
    several = r["several"]

    def waits(name):
        return ", ".join(f"{milliseconds:.2f} for {what}" for what, milliseconds in several[name].items())

    alone = " and ".join(f"{x:.0f}" for x in several["tokens_per_second_of_each_alone"])
    states = ", ".join(f"{gpu['sm_mhz'][1]:.0f} MHz {gpu['celsius'][1]:.0f} C {gpu['watts'][1]:.0f} W"
                       for gpu in several["gpus_while_timed"] if gpu)
    return (f"{r['model']} {r['seqlen']} x {r['rows']}: {r['tokens_per_second']:.0f} tokens/s by {r['processes']}, "
            f"alone {alone}: {several['speedup']:.3f} times\n"
            f"  a step {1e3 * r['seconds_median']:.1f} ms, of them waiting {waits('waits_milliseconds')} (without a "
            f"backward {waits('waits_milliseconds_without_passes')}); MFU {r['mfu']:.3f}, "
            f"{r['peak_memory_bytes'] / 2**30:.1f} GiB; {states}; "
            f"replicas {'the same bits' if several['replicas_identical'] else 'DIFFER'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=pathlib.Path, help="folder of the built programs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed, of all processes and of each alone in turn")
    parser.add_argument("--text", type=pathlib.Path, default=measuring.ROOT / "docs")
    parser.add_argument("--json", type=pathlib.Path, help="written after each part")
    arguments = parser.parse_args()
    record = {**measuring.header(), "device": arguments.device, "processes": arguments.processes,
              "losses": {}, "speed": []}
    if arguments.device == "cuda":
        gpus = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm",
                "--format=csv,noheader"]
        record["gpus"] = subprocess.run(gpus, check=True, capture_output=True, text=True).stdout.splitlines()

    def keep():
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        good = check(arguments, pathlib.Path(folder), record)
    keep()
    for model, seqlen, rows in MODELS if arguments.device == "cuda" else []:
        record["speed"].append(bench(arguments, model, seqlen, rows, arguments.processes))
        print(describe(record["speed"][-1]), flush=True)
        good &= record["speed"][-1]["several"]["replicas_identical"]
        keep()
    for model, seqlen, rows in MODELS[:1] if arguments.device == "cuda" else []:
        record["single"] = bench(arguments, model, seqlen, rows, 1)
        alone = record["single"]["tokens_per_second"]
        print(f"{model} {seqlen} x {rows}: {alone:.0f} tokens/s by 1 without the others", flush=True)
        keep()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
