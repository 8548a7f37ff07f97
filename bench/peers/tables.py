"""Writes the tables of a document from the records that they name.

    python bench/peers/tables.py docs/benchmarks.md README.md            writes them anew
    python bench/peers/tables.py --check docs/benchmarks.md README.md    fails where one is not what its record says

A table stands between two comments, the first of which names it and its record (several: with commas between them), relative to the root
of the repository:

    <!-- table: grid-forward results/<gpu>/peers-<commit>.json -->
    <!-- end of table -->

Tables: summary, bars, grid-forward, grid-backward, grid-both, gqa, varlen, short, window, deterministic, others-both,
memory, machine.
"""

import argparse
import functools
import json
import pathlib
import re
import shlex
import sys

import report

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) (?P<record>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_CLOSE = ("strobe", "FA3", "cuDNN", "FA2")


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines) + "\n"


def _speed(cell: dict, name: str, direction: str) -> str:
    return f"{cell['results'][name][direction]['tflops']:.0f}" if name in cell["results"] else "-"


def _ratio(cell: dict, direction: str) -> str:
    relative = report.ratio(cell, direction)
    return f"{relative:.2f}" if relative else "-"


def _cells(record: dict, section: str) -> list[dict]:
    found = [c for c in record["cells"] if c["case"]["section"] == section]
    if not found:
        raise SystemExit(f"the record has no section {section}")
    return found


def _length(case: dict) -> str:
    return f"8 to {case['seqlen']}" if case.get("lengths") else str(case["seqlen"])


def one_direction(record: dict, section: str, direction: str, names=_CLOSE) -> str:
    """TFLOP/s of the contenders, and strobe's part of the faster of FA3 and cuDNN."""
    names = [n for n in names if any(n in c["results"] for c in _cells(record, section))]
    with_best = any(n in report.BEST for n in names)
    rows = [
        [c["case"]["head_dim"], c["case"]["mask"], _length(c["case"]), *(_speed(c, n, direction) for n in names),
         *([_ratio(c, direction)] if with_best else [])]
        for c in _cells(record, section)
    ]  # fmt: skip
    return markdown(["head dim", "mask", "rows", *names, *(["strobe / best"] if with_best else [])], rows)


def both_directions(record: dict, section: str) -> str:
    """Forward and backward side by side: "forward, backward" in every column."""
    names = [n for n in _CLOSE if any(n in c["results"] for c in _cells(record, section))]
    rows = [
        [c["case"]["head_dim"], c["case"]["mask"], _length(c["case"]),
         *(f"{_speed(c, n, 'forward')}, {_speed(c, n, 'backward')}" for n in names),
         f"{_ratio(c, 'forward')}, {_ratio(c, 'backward')}"]
        for c in _cells(record, section)
    ]  # fmt: skip
    return markdown(["head dim", "mask", "rows", *names, "strobe / best"], rows)


def deterministic(record: dict) -> str:
    """The backward that repeats its bits beside the plain one."""
    names = ("strobe", "strobe deterministic", "FA3", "FA3 deterministic", "FA2", "FA2 deterministic")
    cells = _cells(record, "deterministic")
    names = [n for n in names if any(n in c["results"] for c in cells)]

    def part(cell):
        plain, repeats = (cell["results"].get(n) for n in ("strobe", "strobe deterministic"))
        return f"{repeats['backward']['tflops'] / plain['backward']['tflops']:.2f}" if plain and repeats else "-"

    rows = [
        [c["case"]["head_dim"], c["case"]["mask"], _length(c["case"]), *(_speed(c, n, "backward") for n in names), part(c)]
        for c in cells
    ]  # fmt: skip
    return markdown(["head dim", "mask", "rows", *names, "strobe's deterministic / plain"], rows)


def bars(record: dict) -> str:
    """Geometric means and least cells of strobe's speed over the peers'."""
    names = ("best", "FA3", "cuDNN", "FA2")
    found = {(b["what"], b["direction"], b["against"]): b for b in report.bars(record)}
    rows = []
    for what, direction in dict.fromkeys((b["what"], b["direction"]) for b in report.bars(record)):
        some = [found.get((what, direction, n)) for n in names]
        if what in ("deterministic", "options", "others") or not some[0]:
            continue
        rows.append([what, direction, some[0]["cells"], *(f"{b['mean']:.2f} ({b['least']:.2f})" if b else "-" for b in some),
                     some[0]["least_cell"]])  # fmt: skip
    return markdown(["problems", "direction", "cells", *names, "least of best"], rows)


_PROBLEMS = {
    "grid": "the grid, 512 to 16k rows",
    "up to 1k": "the grid's problems with 128 to 1024 rows",
    "gqa": "64 query heads, 8 key heads",
    "varlen": "sequences of 8 to 8192 rows",
    "window": "window of 1024 keys",
}


def summary(record: dict) -> str:
    """A line for each kind of problem: strobe over the faster of FA3 and cuDNN."""
    found = {(b["what"], b["direction"]): b for b in report.bars(record) if b["against"] == "best"}
    rows = [
        [text, found[what, "both"]["cells"], *(f"{b['mean']:.2f} ({b['least']:.2f})" for d in report.DIRECTIONS if (b := found[what, d]))]
        for what, text in _PROBLEMS.items() if (what, "both") in found
    ]  # fmt: skip
    return markdown(["", "cells", "forward", "backward", "forward + backward"], rows)


def memory(record: dict) -> str:
    """Peak MiB beyond the inputs."""
    rows = sorted(record["memory"], key=lambda r: r["seqlen"])
    names = list(dict.fromkeys(n for r in rows for n in r["peak"]))

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.0f}"

    return markdown(["rows", "inputs", *names], [[r["seqlen"], mib(r["inputs"]), *(mib(r["peak"].get(n)) for n in names)] for r in rows])


def machine(record: dict) -> str:
    m = record["machine"]
    clocks = [c["clocks"][d]["sm_mhz"] for c in record["cells"] for d in ("forward", "backward") if c["clocks"].get(d)]
    clocks = [c for c in clocks if c]
    under_load = f", SM clock under load {min(clocks)} to {max(clocks)} MHz" if clocks else ""
    commands = ", then ".join(f"`{shlex.join(command)}`" for command in [m["command"], *m.get("more_commands", [])])
    return (f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, PyTorch {m['torch']}, cuDNN {m['cudnn']}, "
            f"FlashAttention-3 {m.get('flash_attn_3') or 'absent'}; strobe {m['commit']}, {m['date'][:10]}{under_load}.\n"
            f"{commands}\n")  # fmt: skip


TABLES = {
    "summary": summary,
    "bars": bars,
    **{f"grid-{d}": functools.partial(one_direction, section="grid", direction=d) for d in report.DIRECTIONS},
    **{s: functools.partial(both_directions, section=s) for s in ("gqa", "varlen", "short", "window")},
    "others-both": functools.partial(
        one_direction, section="others", direction="both", names=("strobe", "Triton", "efficient", "math")
    ),
    "deterministic": deterministic,
    "memory": memory,
    "machine": machine,
}


def renewed(text: str, root: pathlib.Path = _ROOT, makers=TABLES) -> str:
    """The text with each of its tables as its records have it."""

    def table(match):
        name, paths = match["name"], [root / record for record in match["record"].split(",")]
        if name not in makers:
            raise SystemExit(f"table {name}: not one of {', '.join(makers)}")
        for path in paths:
            if not path.is_file():
                raise SystemExit(f"table {name}: there is no {path}")
        return f"{match[1]}\n{makers[name](*(json.loads(path.read_text()) for path in paths))}\n{match[4]}"

    return _BLOCK.sub(table, text)


def main(makers=TABLES, description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=pathlib.Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table differs from its record")
    options = parser.parse_args()
    stale = []
    for path in options.documents:
        before = path.read_text()
        after = renewed(before, makers=makers)
        if after == before:
            continue
        stale.append(str(path))
        if not options.check:
            path.write_text(after)
    if options.check and stale:
        sys.exit(f"not what the records say: {', '.join(stale)}")
    print("\n".join(stale))


if __name__ == "__main__":
    main()
