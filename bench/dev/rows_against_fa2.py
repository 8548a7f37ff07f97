#!/usr/bin/env python3
"""The sm80 rows beside FlashAttention-2 as PyTorch's scaled_dot_product_attention has it, in turn on one GPU, and the general and
deterministic rows beside the plain ones. On Hopper the library itself would take the sm90 rows: so row_bench times them by name.

rows_against_fa2.py ROW_BENCH [--commit COMMIT] [--json PATH]
"""
import argparse
import json
import math
import re
import subprocess
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
DIMS = (64, 128, 256)
FEATURES = ("softcap", "alibi", "dropout", "bias")
LINE = re.compile(r"sm80 (forward|backward) bf16 d(\d+) band (\w+) (\d+x\d+, \d+ stages, \d+ warps)\s+(full|causal)\s+([\d ]+)$")


def rows(program, features, *arguments):
    """{(direction, dim, mask): (tile, TFLOP/s by length)}: of rows that differ in their tile, the first is the one that is taken."""
    wanted = f"sm80 .* bf16 d({'|'.join(map(str, DIMS))}) band {features}"
    text = subprocess.run([program, "--filter", wanted, *arguments], capture_output=True, text=True, check=True).stdout
    found = {}
    for line in text.splitlines():
        if match := LINE.match(line.strip()):
            direction, dim, _, tile, mask, numbers = match.groups()
            found.setdefault((direction, int(dim), mask), (tile, [float(x) for x in numbers.split()]))
    return found


def median_ms(call, flush, repeats=7):
    times = []
    for i in range(repeats + 2):
        flush.fill_(i)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def fa2():
    flush = torch.empty(160 << 20, dtype=torch.uint8, device="cuda")
    attention = torch.nn.functional.scaled_dot_product_attention
    found = {}
    for dim in DIMS:
        for mask in ("full", "causal"):
            forward, backward = [], []
            for seqlen in SEQLENS:
                q, k, v = (torch.randn(TOKENS // seqlen, seqlen, HIDDEN // dim, dim, device="cuda", dtype=torch.bfloat16)
                           .transpose(1, 2).requires_grad_() for _ in range(3))
                flops = 4e-9 * TOKENS * seqlen * HIDDEN / (2 if mask == "causal" else 1)
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    with torch.no_grad():
                        forward.append(flops / median_ms(lambda: attention(q, k, v, is_causal=mask == "causal"), flush))
                    out = attention(q, k, v, is_causal=mask == "causal")
                    dout = torch.randn_like(out)
                    grads = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                    backward.append(2.5 * flops / median_ms(grads, flush))
            found["forward", dim, mask], found["backward", dim, mask] = forward, backward
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row_bench")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--json")
    options = parser.parse_args()
    plain, peer = rows(options.row_bench, "plain"), fa2()
    record = {"record": "sm80-rows-against-fa2", "commit": options.commit, "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": TOKENS, "hidden": HIDDEN, "dtype": "bf16",
              "unit": "TFLOP/s", "cells": [], "options": [], "deterministic": []}
    for direction in ("forward", "backward"):
        ratios = []
        for dim in DIMS:
            for mask in ("full", "causal"):
                key = (direction, dim, mask)
                tile, ours = plain[key]
                for seqlen, x, y in zip(SEQLENS, ours, peer[key]):
                    record["cells"].append({"direction": direction, "head_dim": dim, "mask": mask, "seqlen": seqlen, "row": tile,
                                            "strobe": x, "fa2": round(y, 1), "ratio": round(x / y, 3)})
                    ratios.append(x / y)
                print(f"{direction:8} {dim:3} {mask:6} " + " ".join(f"{x:.0f}/{y:.0f}" for x, y in zip(ours, peer[key])), flush=True)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        record[direction] = {"geometric_mean": round(mean, 3), "least": round(min(ratios), 3), "cells_below_1": sum(r < 1 for r in ratios)}
        print(f"{direction}: {record[direction]}", flush=True)
    at_4k, long = SEQLENS.index(4096), ("--seqlens", "4096,16384", "--repeats", "5")
    for feature in ("none", *FEATURES):
        features = {"bias": "biased", "dropout": "dropout"}.get(feature, "general")
        for (direction, dim, mask), (tile, (speed,)) in rows(options.row_bench, features, "--seqlens", "4096", "--masks", "causal", "--feature", feature).items():
            ratio = speed / plain[direction, dim, mask][1][at_4k]
            record["options"].append({"direction": direction, "head_dim": dim, "option": feature, "row": tile, "strobe": speed, "of_plain": round(ratio, 3)})
            print(f"{feature:8} {direction:8} {dim:3} {speed:.0f} = {ratio:.2f} of plain", flush=True)
    # The deterministic mode takes the row with the most stages: select.cpp.
    deterministic = {}
    for stages in (1, 2):
        deterministic |= rows(options.row_bench, f"plain [0-9x]*, {stages} stages", *long, "--deterministic")
    deterministic = {key: found for key, found in deterministic.items() if key[0] == "backward"}
    for (direction, dim, mask), (tile, speeds) in deterministic.items():
        ratios = [x / y for x, y in zip(speeds, plain[direction, dim, mask][1][at_4k::2])]
        record["deterministic"].append({"head_dim": dim, "mask": mask, "seqlens": [4096, 16384], "row": tile, "strobe": speeds,
                                        "of_default": [round(r, 3) for r in ratios]})
        print(f"deterministic {dim:3} {mask:6} {speeds} = " + " ".join(f"{r:.2f}" for r in ratios) + " of the default", flush=True)
    if options.json:
        with open(options.json, "w") as out:
            json.dump(record, out, indent=1)
            out.write("\n")


if __name__ == "__main__":
    main()
