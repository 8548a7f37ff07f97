"""Times attention from PyTorch: strobe beside its peers in one process, on the grid of the FlashAttention papers and beyond.

    python bench/peers                          the whole list, in the time that --seconds gives
    python bench/peers --quick                  a few cells of each section
    python bench/peers --sections grid,gqa --peers strobe,FA3,cuDNN --seconds 120 --json results/peers.json

Sections: grid (16k tokens, hidden size 2048), gqa (64 query heads, 8 key heads), varlen (lengths from 8 to 8192, 32k tokens), short
(128 and 256 rows), deterministic, window (1024 keys), options (softcap, ALiBi, bias, dropout), others (the grid beside Triton,
memory-efficient and plain attention), memory (peak over the sequence length). bfloat16; CUDA events; the L2 is flushed before every
run; contenders take turns run by run; medians. Backward is timed through autograd; "both" is the sum of the two medians. Every
contender's results are compared with strobe's before they are timed. FA3 takes part where flash_attn_interface can be imported.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import report
from cases import MEMORY_SEQLENS, QUICK, SECTIONS
from contenders import CONTENDERS


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="bench/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells of each section")
    parser.add_argument("--sections", default=",".join([*SECTIONS, "memory"]), help="comma-separated, in this order (default: all)")
    parser.add_argument("--peers", default=",".join(CONTENDERS), help="comma-separated contenders; strobe always runs")
    parser.add_argument("--seconds", type=float, help="when to stop, counted from the start (default: 600, quick: 60)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="the record, written anew after every cell")
    options = parser.parse_args(arguments)
    options.sections = _names(parser, "--sections", options.sections, [*SECTIONS, "memory"])
    options.peers = _names(parser, "--peers", options.peers, CONTENDERS)
    options.seconds = options.seconds or (60.0 if options.quick else 600.0)
    if options.seconds <= 0:
        parser.error("--seconds: must be positive")
    if "strobe" not in options.peers:
        options.peers.insert(0, "strobe")
    return options


def _names(parser, flag: str, text: str, known) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"{flag}: {name!r} is not one of {', '.join(known)}")
    return names


def cells_of(options):
    sections = QUICK if options.quick else SECTIONS
    return [case for name in options.sections if name != "memory" for case in sections[name]()]


def command_of(options) -> list[str]:
    """What repeats the measurement; where the record went is no part of it."""
    quick = ["--quick"] if options.quick else []
    chosen = [f"--sections={','.join(options.sections)}", f"--peers={','.join(options.peers)}", f"--seconds={options.seconds:g}"]
    return ["python", "bench/peers", *quick, *chosen]


def work_of(options):
    """(section, case or sequence length) in the order of the sections."""
    cells = cells_of(options)
    lengths = MEMORY_SEQLENS[:: 3 if options.quick else 1]
    for name in options.sections:
        yield from ((name, x) for x in (lengths if name == "memory" else [c for c in cells if c.section == name]))


def write(record: dict, path: pathlib.Path | None):
    """Replaces the file in one step: whoever ends the process, a whole record is there."""
    if not path:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record | {"bars": report.bars(record)}, indent=1) + "\n")
    os.replace(partial, path)


def run(record: dict, work: list, runner, deadline: float, path: pathlib.Path | None, clock=time.monotonic):
    """Measures what the time allows: each piece gets an equal part of what is left. Names the rest in the record."""
    section = None
    for i, (name, what) in enumerate(work):
        left = deadline - clock()
        if left <= 0:
            record["left_out"] = [f"memory {x}" if n == "memory" else x.name for n, x in work[i:]]
            break
        if name != section:
            section = name
            print(report.memory_heading() if name == "memory" else report.heading(name, runner.contenders(name)), flush=True)
        if name == "memory":
            record["memory"].append(row := runner.memory(what))
            print(report.memory_line(row), flush=True)
        else:
            record["cells"].append(cell := runner.cell(what, left / (len(work) - i)))
            print(report.lines(cell, runner.contenders(name)), flush=True)
        write(record, path)


def main():
    begin = time.monotonic()
    options = parse()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/peers: needs a CUDA device")
    import machine
    import measure

    record = {"machine": machine.describe(command_of(options)), "cells": [], "memory": [], "left_out": []}
    try:
        run(record, list(work_of(options)), measure.Runner(options.peers), begin + options.seconds, options.json)
    finally:
        write(record, options.json)
        print(report.summary(record))


if __name__ == "__main__":
    main()
