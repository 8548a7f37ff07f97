"""Times attention from PyTorch: strobe beside its peers in one process, on the grid of the FlashAttention papers and beyond.

    python bench/peers                          the whole list, in the time that --seconds gives
    python bench/peers --quick                  a few cells of each section
    python bench/peers --sections grid,gqa --peers strobe,FA3,cuDNN --seconds 120 --json results/peers.json

Sections: grid (16k tokens, hidden size 2048), gqa (64 query heads, 8 key heads), varlen (lengths from 8 to 8192, 32k tokens), window
(1024 keys), deterministic, options (softcap, ALiBi, bias, dropout), memory (peak over the sequence length). bfloat16; CUDA events;
the L2 is flushed before every run; contenders take turns run by run; medians. Backward is timed through autograd; "both" is the sum
of the two medians. Every contender's results are compared with strobe's before they are timed.
"""

import argparse
import json
import pathlib
import sys

import report
from cases import QUICK, SECTIONS
from contenders import CONTENDERS

_SHARE_OF_SETUP = 0.5  # of --seconds, for what is not timed: inputs, first calls, compiling


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="bench/peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cells of each section")
    parser.add_argument("--sections", default=",".join([*SECTIONS, "memory"]), help="comma-separated (default: all)")
    parser.add_argument("--peers", default=",".join(CONTENDERS), help="comma-separated contenders; strobe always runs")
    parser.add_argument("--seconds", type=float, help="about how long the whole call may take (default: 600, quick: 60)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
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


def main():
    options = parse()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench/peers: needs a CUDA device")
    import machine
    import measure

    record = {"machine": machine.describe(), "seconds": options.seconds, "quick": options.quick, "cells": [], "memory": []}
    cells = cells_of(options)
    runner = measure.Runner(options.peers, options.seconds * _SHARE_OF_SETUP / max(1, len(cells)))
    try:
        section = None
        for case in cells:
            if case.section != section:
                section = case.section
                print(report.heading(section, runner.contenders(section)), flush=True)
            cell = runner.cell(case)
            record["cells"].append(cell)
            print(report.lines(cell, runner.contenders(section)), flush=True)
        if "memory" in options.sections:
            print(report.memory_heading(), flush=True)
            for row in runner.memory(options.quick):
                record["memory"].append(row)
                print(report.memory_line(row), flush=True)
    finally:
        print(report.summary(record))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
