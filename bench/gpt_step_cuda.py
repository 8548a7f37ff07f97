"""Times whole training steps (forward, backward, clip, AdamW) of GPT-3's shapes on one GPU, in strobe and in PyTorch, in turn, and
prints the table of the FlashAttention-2 announcement: TFLOP/s and model FLOPs utilisation by model and context.

    python3 bench/gpt_step_cuda.py build/cuda/bin/gpt_cuda_step_bench --json results/FILE.json

FLOPs of a step: 6 * tokens * parameters + 12 * layers * width * tokens * seqlen (attention counted as if it were full).
PyTorch's side is pure bf16 with fused AdamW, its best case; strobe's keeps fp32 masters, gradients of matrices in bf16 as PyTorch does,
and moments in bf16 that are rounded stochastically. Rows are printed and recorded as they come, each from a process of its own.

The rows fa3 need the flash_attn_3 package of FlashAttention's repository (its folder hopper/) where Python finds it: PyTorch loads it by
activate_flash_attention_impl("FA3"). Without it they say so.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time

import measuring

SHAPES = {"124M": (12, 768, 12), "350M": (24, 1024, 16), "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 32)}
VOCAB = 50304
PEAK = 989e12  # dense bf16 of an H100


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


def time_torch(model_name, seqlen, rows, steps, backend, compiled):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"math": SDPBackend.MATH, "fa2": SDPBackend.FLASH_ATTENTION, "fa3": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    if backend == "fa3":
        torch.nn.attention.activate_flash_attention_impl("FA3")  # needs the flash_attn_3 package
    layers, width, heads = SHAPES[model_name]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.manual_seed(1)
    with torch.device("cuda"):
        model = build_model(torch, layers, width, heads, seqlen, attention).to(torch.bfloat16)
        tokens = torch.randint(VOCAB, (rows, seqlen))
        targets = torch.randint(VOCAB, (rows, seqlen))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if compiled else model
    seconds = []
    with sdpa_kernel(kernels[backend]):
        for i in range(steps + 3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            forward(tokens, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            torch.cuda.synchronize()
            if i >= 3:
                seconds.append(time.perf_counter() - begin)
    return {"seconds_median": statistics.median(seconds), "seconds_min": min(seconds), "peak_memory_bytes": torch.cuda.max_memory_reserved(),
            "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}


def figures(record, model_name, seqlen, rows):
    layers, width, _ = SHAPES[model_name]
    tokens = seqlen * rows
    attention = 12.0 * layers * width * seqlen
    flops = tokens * (6.0 * record["parameters"] + attention)
    record["tokens_per_second"] = tokens / record["seconds_median"]
    record["tflops_per_second"] = 1e-12 * flops / record["seconds_median"]
    record["mfu"] = flops / record["seconds_median"] / PEAK
    record["tflops_per_second_causal_halved"] = 1e-12 * tokens * (6.0 * record["parameters"] + 0.5 * attention) / record["seconds_median"]
    return record


def in_process(command):
    """A process of its own for each row: neither side's memory is in the other's way."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return json.loads(run.stdout[run.stdout.index("{"):])
    text = (run.stderr.strip().splitlines() or ["no message"])[-1]
    return {"failed": "out of memory" if "out of memory" in run.stderr or "no room" in run.stderr else text}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="gpt_cuda_step_bench")
    parser.add_argument("--cases", nargs="+", default=["1.3B:2048x8", "1.3B:8192x2", "2.7B:2048x4", "2.7B:8192x1"], help="MODEL:SEQLENxROWS")
    parser.add_argument("--peers", nargs="*", default=["math", "fa2", "fa2:compile", "cudnn:compile", "fa3:compile"],
                        help="math (standard attention), fa2, fa3 or cudnn, with :compile")
    parser.add_argument("--strobe", nargs="*", default=[""], help="options of gpt_cuda_step_bench, a row for each: norms, no-graph, ...")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json")
    parser.add_argument("--torch-only", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch_only:
        model, seqlen, rows, peer = args.torch_only
        backend, _, mode = peer.partition(":")
        gc.collect()
        print(json.dumps(time_torch(model, int(seqlen), int(rows), args.steps, backend, mode == "compile")))
        return

    record = {**measuring.header(), "peak_flops_per_second": PEAK, "rows": []}
    for case in args.cases:
        model, _, sizes = case.partition(":")
        seqlen, rows = sizes.split("x")
        for peer in [*args.peers, *(":".join(["strobe", *option.split()]) for option in args.strobe)]:
            if peer.startswith("strobe"):
                row = in_process([args.program, model, seqlen, rows, str(args.steps), *peer.split(":")[1:]])
            else:
                row = in_process([sys.executable, __file__, args.program, "--steps", str(args.steps), "--torch-only", model, seqlen, rows, peer])
            if "failed" in row:
                print(f"{model:>5} {sizes:>7} {peer:<18} {row['failed']}")
            else:
                figures(row, model, int(seqlen), int(rows))
                print(f"{model:>5} {sizes:>7} {peer:<18} {row['tflops_per_second']:6.1f} TFLOP/s {100 * row['mfu']:5.1f} % "
                      f"({row['tflops_per_second_causal_halved']:6.1f} causal halved) {row['tokens_per_second']:9.0f} tokens/s "
                      f"{row['peak_memory_bytes'] / 2**30:5.1f} GiB", flush=True)
            record["rows"].append({"case": case, "peer": peer, **row})
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
