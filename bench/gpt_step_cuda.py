"""Times whole training steps (forward, backward, clip, AdamW) of GPT-3's shapes on one GPU, in strobe and in PyTorch,
in turn, and prints the table of the FlashAttention-2 announcement: TFLOP/s and model FLOPs utilisation by model and
context.

    python3 bench/gpt_step_cuda.py build/cuda/bin/gpt_cuda_step_bench --json results/FILE.json

FLOPs of a step: 6 * tokens * parameters + 12 * layers * width * tokens * seqlen (attention counted as if it were full).
PyTorch's side is pure bf16 with fused AdamW, its best case, and its steps are timed on the GPU while the host runs
ahead; strobe's keeps fp32 masters (with its option bf16-masters weights in bf16 that are rounded stochastically),
gradients of matrices in bf16 as PyTorch does, and moments in bf16 that are rounded stochastically, and its steps are
timed on the host with their loss and norm read back. Rows are printed and recorded as they come, each from a process of
its own. With --compile-first the compilers of all rows run side by side before
the first is timed; what they have compiled then waits without memory on the GPU for its turn.

The rows fa3 need the flash_attn_3 package of FlashAttention's repository (its folder hopper/) where Python finds it:
PyTorch loads it by activate_flash_attention_impl("FA3"). Without it they say so.
"""

import argparse
import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time

import measuring

SHAPES = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 32)}
CASES = ["1.3B:2048x8", "1.3B:8192x2", "2.7B:2048x8", "2.7B:8192x2"]
PEERS = ["math", "fa2", "fa2:compile", "cudnn:compile", "fa3:compile"]
VOCAB = 50304
PEAK = 989e12  # dense bf16 of an H100
WARM_UP = 3
ROW_SECONDS = 150  # that a row may take once it is its turn
COMPILED = "compiled"


def build_model(torch, layers, width, heads, seqlen, attention):
    from torch import nn
    import torch.nn.functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, heads, -1).transpose(1, 3).unbind(2)
            x = x + self.proj(attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(seqlen, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))

    return Model()


def fill(torch, model, layers):
    """GPT-2's initial values: what a chip multiplies decides what power it takes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                residual = name.endswith(("proj.weight", "down.weight"))
                p.normal_(0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02)
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def hold(torch, model, layers):
    """Says that the model is compiled and waits to be let on, without memory on the device meanwhile."""
    for p in model.parameters():
        p.untyped_storage().resize_(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(COMPILED, flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody waits for this row any more")
    for p in model.parameters():
        p.untyped_storage().resize_(p.numel() * p.element_size())
    fill(torch, model, layers)


def compile_whole(torch, model, before_first_run):
    """torch.compile, which calls before_first_run() between having compiled both directions and running the first."""
    from torch._inductor.compile_fx import compile_fx

    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
        torch._functorch.config.force_non_lazy_backward_lowering = True
    waiting = [before_first_run]

    def backend(graph, inputs):
        compiled = compile_fx(graph, inputs)
        if waiting:
            waiting.pop()()
        return compiled

    return torch.compile(model, backend=backend)


def time_torch(model_name, seqlen, rows, steps, peer, wait):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend, _, mode = peer.partition(":")
    kernels = {"math": SDPBackend.MATH, "fa2": SDPBackend.FLASH_ATTENTION, "fa3": SDPBackend.FLASH_ATTENTION,
               "cudnn": SDPBackend.CUDNN_ATTENTION}
    if backend == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")  # needs the flash_attn_3 package
    layers, width, heads = SHAPES[model_name]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = build_model(torch, layers, width, heads, seqlen, attention)
        tokens = torch.randint(VOCAB, (rows, seqlen))
        targets = torch.randint(VOCAB, (rows, seqlen))
    torch.set_default_dtype(torch.float32)
    fill(torch, model, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start = time.monotonic()
    compile_seconds = None

    def before_first_run():
        nonlocal compile_seconds
        compile_seconds = time.monotonic() - start
        if wait:
            hold(torch, model, layers)
        torch.cuda.reset_peak_memory_stats()

    forward = compile_whole(torch, model, before_first_run) if mode == "compile" else model
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + WARM_UP + 1)]
    with sdpa_kernel(kernels[backend]):
        for mark in marks[:-1]:
            mark.record()
            optimizer.zero_grad(set_to_none=True)
            loss = forward(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    marks[-1].record()
    torch.cuda.synchronize()
    seconds = [1e-3 * a.elapsed_time(b) for a, b in zip(marks[WARM_UP:], marks[WARM_UP + 1:])]
    return {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "steps": steps,
            "loss": loss.item(), "peak_memory_bytes": torch.cuda.max_memory_reserved(),
            "compile_seconds": compile_seconds, "parameters": sum(p.numel() for p in model.parameters()),
            "torch": torch.__version__}


def figures(record, model_name, seqlen, rows):
    layers, width, _ = SHAPES[model_name]
    tokens = seqlen * rows
    attention = 12.0 * layers * width * seqlen
    flops = tokens * (6.0 * record["parameters"] + attention)
    halved = tokens * (6.0 * record["parameters"] + 0.5 * attention)
    record["tokens_per_second"] = tokens / record["seconds_median"]
    record["tflops_per_second"] = 1e-12 * flops / record["seconds_median"]
    record["mfu"] = flops / record["seconds_median"] / PEAK
    record["tflops_per_second_causal_halved"] = 1e-12 * halved / record["seconds_median"]
    return record


class Row:
    """A process that times one row; one that compiles first says so and waits for its turn."""

    def __init__(self, command, waits):
        self.waits = waits
        self.errors = tempfile.TemporaryFile()
        # Not buffered: what is there to read is what select() sees.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        bufsize=0)

    def wait_until_compiled(self, deadline):
        """False when it is not by then. One that ended instead is asked for its result, too."""
        while select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            line = self.process.stdout.readline()
            if not line or line.strip() == COMPILED.encode():
                return True
        return False

    def result(self):
        try:
            text = self.process.communicate(b"go\n" if self.waits else None, timeout=ROW_SECONDS)[0].decode()
        except subprocess.TimeoutExpired:
            self.end()
            return {"failed": f"no result within {ROW_SECONDS} s"}
        if self.process.returncode == 0:
            return json.loads(text[text.index("{"):])
        self.errors.seek(0)
        words = self.errors.read().decode()
        if "out of memory" in words or "no room" in words:
            return {"failed": "out of memory"}
        return {"failed": (words.strip().splitlines() or [f"no message, status {self.process.returncode}"])[-1]}

    def end(self):
        self.process.kill()
        self.process.wait()  # and not for the end of its output: a compiler's helper may hold that


def time_rows(args, record):
    start = time.monotonic()
    rows, waiting = [], {}

    def torch_row(case, peer, wait):
        model, (seqlen, rows) = case.partition(":")[0], case.partition(":")[2].split("x")
        return Row([sys.executable, __file__, args.program, "--steps", str(args.steps), *(["--wait"] if wait else []),
                    "--torch-only", model, seqlen, rows, peer], wait)

    strobes = [":".join(["strobe", *option.split()]) for option in args.strobe]
    for spec in args.cases:
        case, _, named = spec.partition("=")
        rows += [(case, peer) for peer in (named.split(",") if named else [*args.peers, *strobes])]
    if args.compile_first:
        waiting = {(case, peer): torch_row(case, peer, True) for case, peer in rows if peer.endswith(":compile")}
        for key, row in list(waiting.items()):
            if not row.wait_until_compiled(start + args.compile_first):
                waiting.pop(key).end()
        print(f"[{time.monotonic() - start:.0f} s] compiled: {len(waiting)}", flush=True)

    for case, peer in rows:
        model, (seqlen, count) = case.partition(":")[0], case.partition(":")[2].split("x")
        compiles_first = args.compile_first and peer.endswith(":compile")
        if args.seconds and time.monotonic() - start > args.seconds:
            result = {"failed": "no time left"}
        elif compiles_first and (case, peer) not in waiting:
            result = {"failed": f"not compiled within {args.compile_first:.0f} s"}
        elif compiles_first:
            result = waiting.pop((case, peer)).result()
        elif peer.startswith("strobe"):
            result = Row([args.program, model, seqlen, count, str(args.steps), *peer.split(":")[1:]], False).result()
        else:
            result = torch_row(case, peer, False).result()
        if "failed" in result:
            print(f"{model:>5} {seqlen}x{count} {peer:<18} {result['failed']}", flush=True)
        else:
            figures(result, model, int(seqlen), int(count))
            print(f"{model:>5} {seqlen}x{count} {peer:<18} {result['tflops_per_second']:6.1f} TFLOP/s "
                  f"{100 * result['mfu']:5.1f} % ({result['tflops_per_second_causal_halved']:6.1f} causal halved) "
                  f"{result['tokens_per_second']:9.0f} tokens/s {result['peak_memory_bytes'] / 2**30:5.1f} GiB",
                  flush=True)
        record["rows"].append({"case": case, "peer": peer, **result})
        if args.json:
            with open(args.json + ".part", "w") as file:
                json.dump(record, file, indent=2)
            os.replace(args.json + ".part", args.json)
    for row in waiting.values():
        row.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gpt_cuda_step_bench")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE",
                        help="MODEL:SEQLENxROWS, or with =PEER,... the rows of this case instead of --peers and --strobe")
    parser.add_argument("--peers", nargs="*", default=PEERS,
                        help="math (standard attention), fa2, fa3 or cudnn, with :compile")
    parser.add_argument("--strobe", nargs="*", default=[""],
                        help="options of gpt_cuda_step_bench, a row for each: norms, 'norms bf16-masters', ...")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile-first", type=float, metavar="SECONDS",
                        help="compile all rows side by side before the first is timed; give up those that take longer")
    parser.add_argument("--seconds", type=float, help="no row begins later than this")
    parser.add_argument("--json")
    parser.add_argument("--torch-only", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_only:
        model, seqlen, rows, peer = args.torch_only
        print(json.dumps(time_torch(model, int(seqlen), int(rows), args.steps, peer, args.wait)))
        return
    time_rows(args, {**measuring.header(), "peak_flops_per_second": PEAK, "rows": []})


if __name__ == "__main__":
    main()
