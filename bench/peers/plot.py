"""Draws the record of bench/peers as SVG: speed over the sequence length by head dim and mask, and peak memory.

    python bench/peers/plot.py results/<gpu>/peers-<commit>.json --output docs/img
"""

import argparse
import json
import pathlib

COLOURS = {
    "math": "#9e9e9e", "efficient": "#8d6e63", "Triton": "#f9a825", "FA2": "#1e88e5", "cuDNN": "#43a047", "FA3": "#8e24aa",
    "strobe": "#d81b60",
}  # fmt: skip
LABELS = {"math": "standard attention", "efficient": "memory-efficient", "FA2": "FlashAttention-2", "FA3": "FlashAttention-3"}


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen >= 1024 else str(seqlen)


def blank(width: float, height: float):
    """A figure whose SVG is the same file for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "strobe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def loss_curves(curves: dict, styles: dict, unit: str, path: pathlib.Path) -> None:
    """Losses by step; `styles` by name, in the order of the legend. A name without losses is left out."""
    figure = blank(5.6, 3.6)
    axes = figure.subplots()
    for name, style in styles.items():
        if curves.get(name):
            axes.plot(range(1, len(curves[name]) + 1), curves[name], style, label=name, linewidth=1.2, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
    axes.grid(linewidth=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def grid_cells(record: dict) -> dict[tuple[int, str], list[dict]]:
    """The cells of the grid by (head dim, mask), in the order of their lengths. Peers of the section `others` join them."""
    cells: dict[tuple[int, str, int], dict] = {}
    for section in ("grid", "others"):
        for cell in (c for c in record["cells"] if c["case"]["section"] == section):
            case = cell["case"]
            place = cells.setdefault((case["head_dim"], case["mask"], case["seqlen"]), {"case": case, "results": {}})
            place["results"] = cell["results"] | place["results"]
    rows: dict[tuple[int, str], list[dict]] = {}
    for dim, mask, seqlen in sorted(cells, key=lambda at: (at[1] == "causal", at[0], at[2])):
        rows.setdefault((dim, mask), []).append(cells[dim, mask, seqlen])
    return rows


def speed(record: dict, direction: str):
    """Bars of TFLOP/s over the sequence length, a panel for each head dim and mask."""
    cells = grid_cells(record)
    masks = list(dict.fromkeys(mask for _, mask in cells))
    dims = sorted({dim for dim, _ in cells})
    names = [n for n in COLOURS if any(n in c["results"] for row in cells.values() for c in row)]
    figure = blank(4.6 * len(dims), 2.9 * len(masks) + 0.5)
    panels = figure.subplots(len(masks), len(dims), squeeze=False, sharey=True)
    for (dim, mask), row in cells.items():
        axes = panels[masks.index(mask)][dims.index(dim)]
        bar = 0.85 / len(names)
        for i, name in enumerate(names):
            at = [(x, c["results"][name][direction]["tflops"]) for x, c in enumerate(row) if name in c["results"]]
            places = [x + (i - (len(names) - 1) / 2) * bar for x, _ in at]
            axes.bar(places, [y for _, y in at], bar, color=COLOURS[name], label=_label(name))
        axes.set_xticks(range(len(row)), [_length(c["case"]["seqlen"]) for c in row])
        axes.set_title(f"head dim {dim}, {mask} mask")
        axes.grid(axis="y", linewidth=0.4)
        axes.set_axisbelow(True)
        if dim == dims[0]:
            axes.set_ylabel("TFLOP/s")
        if mask == masks[-1]:
            axes.set_xlabel("sequence length")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    title = {"both": "forward + backward", "forward": "forward", "backward": "backward"}[direction]
    figure.supxlabel(f"{title}, bf16, 16k tokens per call, hidden size 2048; {_machine(record)}", fontsize=8, color="#555555")
    return figure


def memory(record: dict):
    """Peak memory beyond the inputs over the sequence length, both axes logarithmic."""
    figure = blank(5.6, 3.8)
    axes = figure.subplots()
    rows = sorted(record["memory"], key=lambda r: r["seqlen"])
    for name, colour in COLOURS.items():
        points = [(r["seqlen"], r["peak"][name] / 2**20) for r in rows if name in r["peak"]]
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3.5, color=colour, label=_label(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([r["seqlen"] for r in rows], [_length(r["seqlen"]) for r in rows])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y / 1024:g} GiB" if y >= 1024 else f"{y:g} MiB")
    axes.set_xlabel("sequence length")
    axes.set_ylabel("peak beyond inputs")
    axes.grid(linewidth=0.4)
    axes.legend(frameon=False)
    axes.set_title("memory of one forward and backward\nbatch 1, 16 heads, head dim 128, causal, bf16", fontsize=9)
    figure.supxlabel(_machine(record), fontsize=8, color="#555555")
    return figure


def _machine(record: dict) -> str:
    m = record["machine"]
    return f"{m['gpu']}, torch {m['torch']}, cuDNN {m['cudnn']}, strobe {m['commit']}"


def draw(record: dict, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes every plot that the record has data for, and returns their paths."""
    figures = {}
    if grid_cells(record):
        figures = {f"{d}.svg": speed(record, d) for d in ("forward", "backward")} | {"forward_backward.svg": speed(record, "both")}
    if any(row["peak"] for row in record["memory"]):
        figures["memory.svg"] = memory(record)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, metadata={"Date": None})
    return [output / name for name in figures]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/img"))
    options = parser.parse_args()
    for path in draw(json.loads(options.record.read_text()), options.output):
        print(path)


if __name__ == "__main__":
    main()
