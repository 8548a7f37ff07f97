"""What is printed and concluded: a line per cell and direction with TFLOP/s and strobe's ratio to the best peer, and geometric means."""

import math

DIRECTIONS = ("forward", "backward", "both")
# The peers that stand for the state of the art: `best` is the faster of them.
BEST = ("FA3", "cuDNN")
_WIDTH = 9


def _own(name: str) -> bool:
    return name.startswith("strobe")


def best_peer(cell: dict, direction: str) -> float | None:
    """TFLOP/s of the faster of FA3 and cuDNN, or of the fastest contender that is not strobe where neither ran; None without any."""
    speeds = {name: r[direction]["tflops"] for name, r in cell["results"].items() if not _own(name)}
    best = [speed for name, speed in speeds.items() if name in BEST]
    return max(best or speeds.values(), default=None)


def ratio(cell: dict, direction: str) -> float | None:
    """strobe's speed over that of the best peer."""
    best = best_peer(cell, direction)
    return cell["results"]["strobe"][direction]["tflops"] / best if best and "strobe" in cell["results"] else None


def title(cell: dict) -> str:
    case = cell["case"]
    return f"d{case['head_dim']} {case['mask']} {case['batch']}x{case['seqlen']}"


def heading(section: str, names: list[str]) -> str:
    short = [n.replace("strobe ", "+").replace(" deterministic", "+det")[: _WIDTH - 1] for n in names]
    return f"\n{section}\n{'TFLOP/s':34s}" + "".join(f"{n:>{_WIDTH}s}" for n in [*short, "/best"])


def lines(cell: dict, names: list[str]) -> str:
    text = []
    for direction in DIRECTIONS:
        results = [cell["results"].get(n) for n in names]
        numbers = "".join(f"{r[direction]['tflops']:{_WIDTH}.0f}" if r else f"{'-':>{_WIDTH}s}" for r in results)
        relative = ratio(cell, direction)
        text.append(f"{title(cell) + ' ' + direction:34s}{numbers}" + (f"{relative:{_WIDTH}.2f}" if relative else ""))
    reasons = [f"    {name}: {why}" for name, why in cell["refused"].items() if "no interface" not in why]
    waits = [
        f"    {name}: the device waited for the host, {direction}"
        for name, r in cell["results"].items() for direction in ("forward", "backward") if r[direction].get("waits")
    ]  # fmt: skip
    return "\n".join(text + reasons + waits)


def memory_heading() -> str:
    return "\npeak memory beyond inputs, forward and backward, head dim 128, 16 heads, causal (MiB)"


def memory_line(row: dict) -> str:
    peaks = "  ".join(f"{name} {peak / 2**20:.1f}" for name, peak in row["peak"].items())
    return f"S {row['seqlen']:6d}  inputs {row['inputs'] / 2**20:.1f}  {peaks}"


def geometric_mean(values) -> float | None:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _bar(what: str, against: str, direction: str, ratios: dict[str, float]) -> dict:
    least = min(ratios, key=ratios.get)
    mean = geometric_mean(ratios.values())
    return {"what": what, "against": against, "direction": direction, "cells": len(ratios), "mean": mean,
            "least": ratios[least], "least_cell": least}  # fmt: skip


def _groups(record: dict) -> dict[str, list[dict]]:
    """The cells by section; those of the grid and of `short` up to 1024 rows once more together, as "up to 1k"."""
    groups: dict[str, list[dict]] = {}
    for cell in record["cells"]:
        case = cell["case"]
        if "strobe" in cell["results"]:
            groups.setdefault(case["section"], []).append(cell)
            if case["section"] in ("grid", "short") and case["seqlen"] <= 1024:
                groups.setdefault("up to 1k", []).append(cell)
    return groups


def bars(record: dict) -> list[dict]:
    """By group of cells and direction: strobe's speed over each peer's and over the best one's, geometric mean and least. A
    deterministic peer is held against strobe's deterministic backward; strobe with an option against plain strobe."""
    found = []
    for group, cells in _groups(record).items():
        others = dict.fromkeys(n for c in cells for n in c["results"] if n != "strobe")
        for direction in DIRECTIONS:
            for name in others:
                ours = "strobe deterministic" if name.endswith(" deterministic") else "strobe"
                above, below = (name, "strobe") if _own(name) else (ours, name)
                if ratios := _ratios(cells, above, below, direction):
                    found.append(_bar(group, name, direction, ratios))
            if ratios := {title(c): r for c in cells if (r := ratio(c, direction))}:
                found.append(_bar(group, "best", direction, ratios))
    return found


def _ratios(cells: list[dict], above: str, below: str, direction: str) -> dict[str, float]:
    return {
        title(c): c["results"][above][direction]["tflops"] / c["results"][below][direction]["tflops"]
        for c in cells if above in c["results"] and below in c["results"]
    }  # fmt: skip


def summary(record: dict) -> str:
    text = ["\nstrobe over its peers (with an option: over plain strobe), geometric mean (least) of the cells that both have"]
    lines_of: dict[tuple[str, str], list[str]] = {}
    for bar in bars(record):
        part = f"{bar['against']} {bar['mean']:.2f} ({bar['least']:.2f})"
        lines_of.setdefault((bar["what"], bar["direction"]), []).append(part)
    text += [f"{what:14s}{direction:10s}" + "  ".join(parts) for (what, direction), parts in lines_of.items()]
    if record.get("left_out"):
        text.append(f"left out for want of time: {len(record['left_out'])} of the list, from {record['left_out'][0]} on")
    return "\n".join(text)
