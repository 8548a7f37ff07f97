"""Writes the tables of docs/gpt.md from the records that they name.

    python bench/gpt_tables.py docs/gpt.md            writes them anew
    python bench/gpt_tables.py --check docs/gpt.md    fails where one is not what its records say

A table stands between two comments, as those of bench/peers/tables.py do: <!-- table: NAME RECORD,RECORD... -->.

steps: a row for each record of gpt_cuda_step_bench.
parts: where a step's time goes, two columns and a bound for each of these records.
peers: the rows of records of bench/gpt_step_cuda.py by model and context, those without a kernel of attention first. A row that several
records have is that of the first.
norms: a record of bench/dev/norm_bandwidth, a column for each width: time and share of the copy's rate.
processes: a record of bench/gpt_processes.py: steps of several GPUs together beside those of each by itself.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "peers"))

import tables  # noqa: E402

_PEERS = {"math": "none (standard attention)", "fa2": "FlashAttention-2", "cudnn": "cuDNN", "fa3": "FlashAttention-3", "strobe": "strobe"}
_MODES = {"compile": "compiled", "norms": "`--recompute norms`", "bf16-masters": "`--masters bf16`", "": ""}


def _memory(byte_count: int) -> str:
    return f"{byte_count / 2**30:.1f} GiB"


def _shape(row: dict) -> str:
    return f"{row['seqlen']} x {row['rows']}"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.1f} ms" if milliseconds < 1e4 else f"{1e-3 * milliseconds:.1f} s"


def _rates(row: dict) -> list[str]:
    return [f"{row['tflops_per_second']:.0f}", f"{100 * row['mfu']:.1f} %", f"{row['tflops_per_second_causal_halved']:.0f}",
            f"{row['tokens_per_second'] / 1e3:.1f}k"]  # fmt: skip


def steps(*records: dict) -> str:
    rows = []
    for r in records:
        masters = ", `--masters bf16`" if r.get("masters") == "bf16" else ""
        milliseconds, least = 1e3 * r["seconds_median"], 1e3 * r["seconds_min"]
        fastest = r["tflops_per_second"] * milliseconds / least
        rows.append([f"{r['model']}, {_shape(r)}, `--recompute {r['recompute']}`{masters}", _time(milliseconds), *_rates(r),
                     f"{_time(least)}: {fastest:.0f}" if least < milliseconds else "", _memory(r["peak_memory_bytes"])])  # fmt: skip
    return tables.markdown(
        ["model, length x rows", "median", "TFLOP/s", "MFU", "causal counted half", "tokens/s", "fastest step: TFLOP/s", "peak memory"], rows
    )


_PARTS = [
    ("products, forward", "linear forward"), ("products, backward, with bias gradients", "linear b"),
    ("attention forward", "attention forward"), ("attention backward", "attention backward"), ("norm forward", "norm forward"),
    ("norm backward, with the norm's output again", "norm backward"), ("cross-entropy", "cross_entropy"), ("AdamW", "optimizer adamw"),
    ("norm of the gradients", "optimizer norm"), ("embedding", "embedding"),
]  # fmt: skip


def _part(record: dict, prefix: str) -> list[str]:
    """Milliseconds, rate and the bound's share of the parts whose names begin so."""
    parts = [p for name, p in record["parts"].items() if name.startswith(prefix)]
    ms = sum(p["milliseconds"] for p in parts)
    tflops, terabytes, bound = (
        sum(p["milliseconds"] * p[key] for p in parts) / ms for key in ("tflops_per_second", "terabytes_per_second", "bound_over_time")
    )
    return [f"{ms:.1f}", f"{tflops:.0f} TFLOP/s" if tflops > 0 else f"{terabytes:.1f} TB/s", f"{100 * bound:.0f} %"]


def parts(*records: dict) -> str:
    head = [f"{_shape(r)}, ms" for r in records]
    columns = [column for name in head for column in (name, "rate", "bound / time")]
    return tables.markdown(["part", *columns], [[title, *(x for r in records for x in _part(r, prefix))] for title, prefix in _PARTS])


def _peer(name: str) -> str:
    backend, *modes = name.split(":")
    mode = ", ".join(_MODES.get(m, m) for m in modes) or ("" if backend == "strobe" else "eager")
    return ", ".join(text for text in (_PEERS.get(backend, backend), mode) if text)


def peers(*records: dict) -> str:
    found: dict[tuple[str, str], tuple[dict, int]] = {}
    for number, record in enumerate(records, 1):
        for row in record["rows"]:
            if row.get("failed") != "no time left":
                found.setdefault((row["case"], row["peer"]), (row, number))
    order = list(_PEERS)
    numbered = len(records) > 1
    rows = []
    for case in dict.fromkeys(case for case, _ in found):
        model, shape = case.split(":")
        names = sorted((p for c, p in found if c == case), key=lambda p: (order.index(p.split(":")[0]), p))
        for name in names:
            row, number = found[case, name]
            figures = [row["failed"], "", "", "", ""] if "failed" in row else [*_rates(row), _memory(row["peak_memory_bytes"])]
            rows.append([model, shape.replace("x", " x "), _peer(name), *figures, *([number] if numbered else [])])
    head = ["model", "length x rows", "attention", "TFLOP/s", "MFU", "causal counted half", "tokens/s", "peak memory"]
    return tables.markdown([*head, *(["record"] if numbered else [])], rows)


def norms(record: dict) -> str:
    widths = list(dict.fromkeys(row["hidden"] for row in record["rows"]))
    found = {(row["what"], row["hidden"]): row for row in record["rows"]}
    rows = []
    for what in dict.fromkeys(row["what"] for row in record["rows"]):
        cells = [found[what, width] for width in widths]
        rows.append([what, *(f"{r['microseconds']:.1f} us, {r['of_the_copy']:.2f}" for r in cells)])
    return tables.markdown(["operator", *(f"{record['rows'][0]['rows']} x {width}" for width in widths)], rows)


def processes(record: dict) -> str:
    rows = []
    for r in record["speed"]:
        several = r["several"]
        alone, waits = several["tokens_per_second_of_each_alone"], several["waits_milliseconds"]
        rows.append([f"{r['model']}, {_shape(r)} each", ", ".join(f"{x / 1e3:.1f}k" for x in alone), f"{r['tokens_per_second'] / 1e3:.1f}k",
                     f"{several['speedup']:.2f}", _time(1e3 * r["seconds_median"]), f"{waits['gradients']:.1f}, {waits['values']:.1f} ms",
                     f"{100 * r['mfu']:.1f} %", _memory(r["peak_memory_bytes"])])  # fmt: skip
    gpu = record["speed"][0]["gpu"].removeprefix("NVIDIA ")
    return tables.markdown(
        [f"tokens/s on {gpu}", "each GPU by itself", "together", "ratio", "a step", "of it waiting for gradients, new values", "MFU",
         "memory of each"], rows,
    )  # fmt: skip


TABLES = {"steps": steps, "parts": parts, "peers": peers, "norms": norms, "processes": processes}

if __name__ == "__main__":
    tables.main(TABLES, __doc__)
