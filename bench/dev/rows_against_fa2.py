#!/usr/bin/env python3
"""The sm80 rows beside FlashAttention-2 as PyTorch's scaled_dot_product_attention has it, and the options and the deterministic mode beside
plain calls: in one process, in turn, the device kept busy while the host launches (bench/peers/timing.py). On Hopper the library itself
would take the sm90 rows: so calls ask for sm80 by name. Results are compared before anything is timed.

    PYTHONPATH=... python bench/dev/rows_against_fa2.py [--seconds 120] [--json PATH]
"""

import argparse
import functools
import json
import math
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "peers"))

import cases
import contenders
import machine
import measure
import timing
import torch

DIRECTIONS = ("forward", "backward", "both")
OPTIONS = {
    "softcap": functools.partial(contenders.strobe_call, softcap=30.0),
    "ALiBi": contenders.strobe_alibi,
    "dropout": functools.partial(contenders.strobe_call, dropout_p=0.17, rng_state=(1, 2)),
    "bias": contenders.strobe_bias,
}
sm80 = functools.partial(contenders.strobe_call, implementation="sm80")


def long_first(grid):
    """Head dim 128, 16k tokens, full mask before all others: a figure of its own, taken before the card is hot."""
    return sorted(grid, key=lambda c: (c.head_dim, c.seqlen, c.causal) != (128, 16384, False))


def speeds(clock, case, prepared, seconds, compared=()) -> dict:
    """TFLOP/s of the calls by name and direction; `compared` must agree with the first."""
    x = contenders.make_inputs(case)
    calls = {name: prepare(case, x) for name, prepare in prepared.items()}
    outs = {name: call() for name, call in calls.items()}
    gradients = {name: functools.partial(torch.autograd.grad, out, x.leaves, x.dout, retain_graph=True) for name, out in outs.items()}
    first = next(iter(calls))
    expected = (outs[first].detach(), *gradients[first]())
    for name in compared:
        apart = measure.differences(expected, (outs[name].detach(), *gradients[name]()))
        if not all(difference < measure.AGREE for difference in apart.values()):
            raise RuntimeError(f"{case.name}: {first} and {name} differ: {apart}")
    del expected

    def without_graph(call):
        with torch.no_grad():
            call()

    forwards = {name: functools.partial(without_graph, call) for name, call in calls.items()}
    forward, _ = timing.measure(clock, forwards, 0.3 * seconds)
    backward, clocks = timing.measure(clock, gradients, 0.7 * seconds, machine.clocks)
    taken = {"forward": forward, "backward": backward}
    taken["both"] = {name: {"seconds": forward[name]["seconds"] + backward[name]["seconds"]} for name in calls}
    result = {d: {n: round(cases.flops(case, d) / r["seconds"] * 1e-12, 1) for n, r in runs.items()} for d, runs in taken.items()}
    result["clocks"] = clocks
    result["waits"] = sorted({f"{n} {d}" for d in ("forward", "backward") for n, r in taken[d].items() if r.get("waits")})
    return result


def line(case, result, direction, base) -> str:
    """Every contender's speed, and its ratio to `base`'s."""
    numbers = "  ".join(f"{name} {x:.0f} ({x / result[direction][base]:.2f})" for name, x in result[direction].items())
    return f"{case.name:32s} {direction:8s} {numbers}" + (f"   waits: {result['waits']}" if result["waits"] else "")


def summary(cells) -> dict:
    found = {}
    for direction in DIRECTIONS:
        ratios = [c[direction]["sm80"] / c[direction]["FA2"] for c in cells]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found[direction] = {"geometric_mean": round(mean, 3), "least": round(min(ratios), 3), "below_1": sum(r < 1 for r in ratios)}
    return found


def write(record, path):
    """Replaces the file in one step: whoever ends the process, a whole record is there."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing (default: 120)")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    fa2 = contenders.CONTENDERS["FA2"].prepare
    grid, long = long_first(cases.grid()), [c for c in cases.grid() if c.seqlen in (4096, 16384)]
    plan = [("cells", case, {"sm80": sm80, "FA2": fa2}, ("FA2",), DIRECTIONS, "FA2") for case in grid]
    with_option = {name: functools.partial(prepare, implementation="sm80") for name, prepare in OPTIONS.items()}
    plan += [("options", c, {"plain": sm80, **with_option}, (), DIRECTIONS[:2], "plain") for c in long if c.causal and c.seqlen == 4096]
    repeats = {"default": sm80, "deterministic": functools.partial(sm80, deterministic=True)}
    plan += [("deterministic", c, repeats, ("deterministic",), ("backward",), "default") for c in long]
    weight = sum(len(prepared) for _, _, prepared, *_ in plan)
    record = {"record": "sm80-rows-against-fa2", "machine": machine.describe(), "unit": "TFLOP/s", "cells": [], "options": [], "deterministic": []}
    clock = timing.Clock()
    for kind, case, prepared, compared, directions, base in plan:
        result = speeds(clock, case, prepared, options.seconds * len(prepared) / weight, compared)
        record[kind].append({"head_dim": case.head_dim, "mask": case.mask, "seqlen": case.seqlen, **result})
        for direction in directions:
            print(line(case, result, direction, base), flush=True)
        if kind == "cells":
            record["against_fa2"] = summary(record["cells"])
        write(record, options.json)
    print(json.dumps(record["against_fa2"]))


if __name__ == "__main__":
    main()
