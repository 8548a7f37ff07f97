"""One GPT of GPT-2's size (124 M parameters) on real text, trained three times from the same checkpoint on the same batches: by strobe
on the GPU, by transformers in PyTorch on the GPU, and, for its first steps, by strobe on the CPU. The curves should lie on one another.

    python3 bench/gpt_loss_curves.py build/cuda/bin/strobe TEXT --json results/FILE.json --plot docs/img/gpt_loss_curves.svg
    python3 bench/gpt_loss_curves.py --draw results/FILE.json --plot docs/img/gpt_loss_curves.svg

With --also OPTIONS strobe trains it on the GPU once more with these options too, for what they cost in accuracy.
PyTorch reads strobe's token shards and draws its rows as gpt/data/sampler.cpp does. Both keep fp32 masters and compute in bf16; the
CPU computes in fp32. Schedule, decay (of matrices only) and clip are strobe's.
"""

import argparse
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import measuring

MASK = (1 << 64) - 1


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


class Rows:
    """The rows of a shard in the order of strobe's Sampler; attention crosses documents."""

    def __init__(self, shard, seqlen, seed):
        import numpy

        with open(shard, "rb") as file:
            header = file.read(80)
        magic, version, width, self.num_tokens = struct.unpack_from("<8sIIQ", header)
        assert magic == b"strobtok" and version == 1, shard
        self.tokens = numpy.memmap(shard, dtype=f"<u{width}", mode="r", offset=80, shape=(self.num_tokens,))
        self.seqlen, self.seed = seqlen, seed
        rows = (self.num_tokens - 1) // seqlen
        self.rows = rows - 1 if rows > 1 else rows
        self.half_bits = max(1, ((self.rows - 1).bit_length() + 1) // 2)
        self.epoch, self.next_row = 0, 0
        self.start_epoch()

    def start_epoch(self):
        self.key = mix(mix(self.seed) ^ self.epoch)
        slack = min(self.seqlen, self.num_tokens - 1 - self.rows * self.seqlen)
        self.offset = mix(self.key ^ mix(1)) % (slack + 1)

    def shuffled(self, row):
        mask = (1 << self.half_bits) - 1
        while True:
            left, right = row >> self.half_bits, row & mask
            for turn in range(4):
                left, right = right, left ^ (mix((self.key + (turn << 56) + right) & MASK) & mask)
            row = left << self.half_bits | right
            if row < self.rows:
                return row

    def next(self):
        if self.next_row == self.rows:
            self.epoch, self.next_row = self.epoch + 1, 0
            self.start_epoch()
        begin = self.offset + self.shuffled(self.next_row) * self.seqlen
        self.next_row += 1
        return self.tokens[begin : begin + self.seqlen + 1].astype("int64")


def learning_rate(options, step):
    if step <= options.warmup:
        return options.lr * step / options.warmup
    progress = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    return options.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def write_start(folder, context):
    """A fresh GPT-2 by transformers, which strobe reads as it is."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_positions=context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).save_pretrained(folder)


def train_torch(start, shard, options):
    """Losses of each step, and seconds of the steps."""
    import numpy
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(start, attn_implementation="sdpa", dtype=torch.float32).to("cuda").train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=options.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    rows = Rows(shard, options.seqlen, options.seed)
    losses, begin = [], time.perf_counter()
    for step in range(1, options.torch_steps + 1):
        batch = torch.from_numpy(numpy.stack([rows.next() for _ in range(options.batch)])).to("cuda")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), time.perf_counter() - begin


def losses_of(folder):
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


def held_out_of(folder):
    """Of the whole held-out part, at the end of the run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return next((line["held_out_loss"] for line in reversed(lines) if "held_out_loss" in line), None)


def start_strobe(options, work, device, *more, out=None):
    command = [options.strobe, "train", "--quiet", "--device", device, "--init", work / "start", "--tokenizer", work / "tokenizer",
               "--data", options.text, "--out", out or work / device, "--across-documents", "--batch", options.batch, "--seqlen", options.seqlen,
               "--steps", options.steps, "--lr", options.lr, "--warmup", options.warmup, "--seed", options.seed, "--eval-every", 0,
               "--save-every", 0, *more]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, env=dict(os.environ, STROBE_CACHE=str(work / "cache")))


def run_cpu(options, work):
    """The CPU's run is stopped behind its first steps: its schedule is that of the whole."""
    process = start_strobe(options, work, "cpu")
    while process.poll() is None and len(losses_of(work / "cpu")) < options.cpu_steps:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return losses_of(work / "cpu")[: options.cpu_steps]


def distances(a, b):
    """Of two curves over the steps that both have, relative: at most, and of their means over 20 steps."""
    n = min(len(a), len(b))
    smooth = [abs(sum(a[i : i + 20]) / sum(b[i : i + 20]) - 1) for i in range(0, n - 19, 20)]
    return {"steps": n, "largest": max(abs(x / y - 1) for x, y in zip(a, b)), "largest_of_20_step_means": max(smooth, default=None)}


def draw(curves, path):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "peers"))
    import plot

    plot.loss_curves(curves, {"PyTorch, GPU": "-", "strobe, GPU": ":", "strobe, CPU": "o"}, "loss, nats per token", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strobe", type=pathlib.Path, nargs="?", help="the program")
    parser.add_argument("text", type=pathlib.Path, nargs="?")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--torch-steps", type=int, default=1000)
    parser.add_argument("--cpu-steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer, learned from the text; the model has 50304 rows")
    parser.add_argument("--strobe-options", default="", help="more options of strobe train on the GPU, such as '--moments bf16'")
    parser.add_argument("--also", action="append", default=[], metavar="OPTIONS", help="a run by strobe on the GPU with these options more; repeatable")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--draw", type=pathlib.Path, metavar="RECORD", help="draw the curves of a record into --plot, and leave")
    options = parser.parse_args()
    if options.draw:
        if not options.plot:
            parser.error("--draw: --plot says where to")
        return draw(json.loads(options.draw.read_text())["curves"], options.plot)
    if not (options.strobe and options.text):
        parser.error("the program and a text are needed")

    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        tokenizer = [options.strobe, "tokenizer", "train", "--data", options.text, "--out", work / "tokenizer", "--vocab-size", options.vocab_size]
        subprocess.run([str(c) for c in tokenizer], check=True, stdout=subprocess.DEVNULL)
        write_start(work / "start", options.seqlen)
        seconds, curves, held_out = {}, {}, {}

        def record():
            """After each run, so that what there is is kept."""
            ours = curves["strobe, GPU"]
            out = {**measuring.header(), "tokens_per_step": options.batch * options.seqlen, "seconds": seconds,
                   "held_out_loss": held_out,
                   "distances": {name: distances(curve, ours) for name, curve in curves.items() if curve is not ours}, "curves": curves}
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(out))
            return out

        for number, more in enumerate(["", *options.also]):
            name, out = f"strobe, GPU {more}".strip(), work / f"cuda-{number}"
            if start_strobe(options, work, "cuda", *options.strobe_options.split(), *more.split(), out=out).wait():
                sys.exit(f"strobe train --device cuda {more} failed")
            log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            curves[name], held_out[name] = losses_of(out), held_out_of(out)
            seconds[name] = sum(line["seconds"] for line in log if "loss" in line)
            record()
        # The CPU works while PyTorch has the GPU.
        cpu = ThreadPoolExecutor(1).submit(run_cpu, options, work) if options.cpu_steps > 0 else None
        if options.torch_steps > 0:
            shard = next((work / "cache").glob("*.train.tok"))
            curves["PyTorch, GPU"], seconds["PyTorch, GPU"] = train_torch(work / "start", shard, options)
            record()
        if cpu:
            curves["strobe, CPU"] = cpu.result()
        written = record()
    for name, curve in curves.items():
        print(f"{name:<13} {len(curve)} steps: {curve[0]:.4f} ... {curve[-1]:.4f}; held out {held_out.get(name)}; {written['distances'].get(name, '')}")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
