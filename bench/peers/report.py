"""What is printed: a line per cell and direction with TFLOP/s, strobe's ratio to the best peer, and geometric means at the end."""

import math

DIRECTIONS = ("forward", "backward", "both")
_WIDTH = 9


def _own(name: str) -> bool:
    return name.startswith("strobe")


def best_peer(cell: dict, direction: str) -> float | None:
    """TFLOP/s of the fastest contender that is not strobe; None where there is none."""
    speeds = [r[direction]["tflops"] for name, r in cell["results"].items() if not _own(name)]
    return max(speeds, default=None)


def ratio(cell: dict, direction: str) -> float | None:
    """strobe's speed over that of the best peer."""
    best = best_peer(cell, direction)
    return cell["results"]["strobe"][direction]["tflops"] / best if best and "strobe" in cell["results"] else None


def heading(section: str, names: list[str]) -> str:
    short = [n.replace("strobe ", "+")[: _WIDTH - 1] for n in names]
    return f"\n{section}\n{'TFLOP/s':34s}" + "".join(f"{n:>{_WIDTH}s}" for n in [*short, "/best"])


def lines(cell: dict, names: list[str]) -> str:
    case = cell["case"]
    text = []
    for direction in DIRECTIONS:
        start = f"d{case['head_dim']} {case['mask']} {case['batch']}x{case['seqlen']} {direction}"
        results = [cell["results"].get(n) for n in names]
        numbers = "".join(f"{r[direction]['tflops']:{_WIDTH}.0f}" if r else f"{'-':>{_WIDTH}s}" for r in results)
        relative = ratio(cell, direction)
        text.append(f"{start:34s}{numbers}" + (f"{relative:{_WIDTH}.2f}" if relative else ""))
    reasons = [f"    {name}: {why}" for name, why in cell["refused"].items() if "no interface" not in why]
    return "\n".join(text + reasons)


def memory_heading() -> str:
    return "\npeak memory beyond inputs, forward and backward, head dim 128, 16 heads, causal (MiB)"


def memory_line(row: dict) -> str:
    peaks = "  ".join(f"{name} {peak / 2**20:.1f}" for name, peak in row["peak"].items())
    return f"S {row['seqlen']:6d}  inputs {row['inputs'] / 2**20:.1f}  {peaks}"


def geometric_mean(values) -> float | None:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def summary(record: dict) -> str:
    """strobe over each peer and over the best one: geometric mean and least, by section and direction."""
    text = ["\nstrobe over its peers, geometric mean (least) of the cells that both have"]
    sections = dict.fromkeys(cell["case"]["section"] for cell in record["cells"])
    for section in sections:
        cells = [c for c in record["cells"] if c["case"]["section"] == section and "strobe" in c["results"]]
        others = dict.fromkeys(n for c in cells for n in c["results"] if n != "strobe")
        for direction in DIRECTIONS:
            parts = []
            for name in others:
                ratios = [
                    c["results"]["strobe"][direction]["tflops"] / c["results"][name][direction]["tflops"]
                    for c in cells if name in c["results"]
                ]  # fmt: skip
                parts.append(f"{name} {geometric_mean(ratios):.2f} ({min(ratios):.2f})")
            ratios = [r for c in cells if (r := ratio(c, direction))]
            if ratios:
                parts.append(f"best {geometric_mean(ratios):.2f} ({min(ratios):.2f})")
            text.append(f"{section:14s}{direction:10s}" + "  ".join(parts))
    return "\n".join(text)
