"""The peer benchmark as far as no GPU is needed: arguments, FLOPs, lengths, turns, results that differ, records, tables, plots."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(_BENCH), str(_BENCH / "peers")]

import importlib.util  # noqa: E402

import cases  # noqa: E402
import contenders  # noqa: E402
import gpt_tables  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

_spec = importlib.util.spec_from_file_location("bench_peers_main", pathlib.Path(cases.__file__).parent / "__main__.py")
command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(command)


def test_arguments():
    whole = command.parse([])
    assert whole.sections == [*cases.SECTIONS, "memory"] and whole.seconds == 600 and len(command.cells_of(whole)) > 60
    quick = command.parse(["--quick"])
    assert quick.seconds == 60 and len(command.cells_of(quick)) < 30
    some = command.parse(["--sections", "gqa,memory", "--peers", "cuDNN", "--seconds", "5"])
    assert some.peers == ["strobe", "cuDNN"] and {c.section for c in command.cells_of(some)} == {"gqa"} and some.seconds == 5
    assert [name for name, _ in command.work_of(some)] == ["gqa"] * 10 + ["memory"] * len(cases.MEMORY_SEQLENS)
    assert command.parse(command.command_of(some)[2:]) == some and "--json" not in command.command_of(some)


@pytest.mark.parametrize("wrong", [["--sections", "grids"], ["--peers", "FA4"], ["--seconds", "-1"]])
def test_wrong_arguments_are_named(wrong, capsys):
    with pytest.raises(SystemExit):
        command.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_flops():
    full = cases.Case("grid", 128, 1024, 16, 16, 16, False)
    assert cases.flops(full, "forward") == 4 * 16 * 16 * 1024**2 * 128
    assert cases.flops(full, "both") == cases.flops(full, "forward") + cases.flops(full, "backward")
    causal = cases.Case("grid", 128, 1024, 16, 16, 16, True)
    assert cases.flops(causal, "forward") == cases.flops(full, "forward") / 2
    whole = cases.Case("window", 128, 64, 1, 1, 1, True, window=63)
    assert cases.flops(whole, "forward") == 4 * 128 * (64 * 65 / 2)
    assert cases.flops(cases.Case("window", 128, 64, 1, 1, 1, True, window=0), "forward") == 4 * 128 * 64
    ragged = cases.Case("varlen", 128, 30, 2, 1, 1, False, lengths=(10, 30))
    assert cases.flops(ragged, "forward") == 4 * 128 * (100 + 900)


def test_the_grid_is_the_papers():
    grid = cases.grid()
    assert len(grid) == 36 and all(c.tokens == 16384 and c.num_heads * c.head_dim == 2048 for c in grid)


def test_skewed_lengths_fill_the_tokens():
    for seed in range(20):
        lengths = cases.skewed_lengths(seed=seed)
        assert sum(lengths) == 32768 and min(lengths) >= 8 and max(lengths) > 20 * sorted(lengths)[len(lengths) // 4]


def test_turns():
    counts = timing.shares({"fast": 0.001, "slow": 0.5, "middle": 0.019}, 0.6, most=30, least=3)
    assert counts == {"fast": 30, "slow": 3, "middle": 10}
    order = list(timing.in_turn(counts))
    assert {n: order.count(n) for n in counts} == counts
    assert all("fast" in order[i : i + 5] for i in range(len(order) - 4))  # nobody runs in a block of its own
    even = list(timing.in_turn({"a": 6, "b": 6, "c": 6}))
    assert sorted(even[:3]) == ["a", "b", "c"] and {even[0], even[3], even[6]} == {"a", "b", "c"}  # nor first in every round
    assert list(timing.in_turn({})) == []


def test_the_device_is_kept_busy_while_the_host_launches():
    assert timing.flushes(host=50e-6, device=1e-3, flush=200e-6) == 1
    for host, device in ((400e-6, 100e-6), (1e-3, 0.0), (220e-6, 60e-6), (900e-6, 700e-6)):
        n = timing.flushes(host, device, 200e-6)
        assert n * 200e-6 + device > host and (n == 1 or (n - 1) * 200e-6 + device <= 1.3 * host)


def small(section="grid", **changes):
    return cases.Case(**{"section": section, "head_dim": 64, "seqlen": 128, "batch": 1, "num_heads": 2, "num_heads_k": 2, "causal": True, **changes})


def test_contenders_on_the_cpu():
    """What the contenders compute is strobe's result, as far as they run here."""
    case = small()
    x = contenders.make_inputs(case, "cpu")
    call = contenders.CONTENDERS["strobe"].prepare(case, x)
    ours = (call(), *contenders.CONTENDERS["strobe"].gradients(call(), x))
    math = contenders.CONTENDERS["math"]
    out = math.prepare(case, x)()
    assert max(measure.differences(ours, (out, *math.gradients(out, x))).values()) < 2e-2
    rolled = measure.differences(ours, (out.roll(1, dims=1), *math.gradients(out, x)))
    assert rolled["out"] > 0.5 and max(rolled[what] for what in ("dq", "dk", "dv")) < 2e-2


def test_varlen_inputs():
    case = small(seqlen=90, batch=2, lengths=(38, 90))
    x = contenders.make_inputs(case, "cpu")
    assert x.q.shape == (128, 2, 64) and x.cu_seqlens.tolist() == [0, 38, 128] and x.max_seqlen == 90
    assert contenders.CONTENDERS["strobe"].prepare(case, x)().shape == x.q.shape
    for name in ("Triton", "efficient", "math"):
        with pytest.raises(contenders.Refused):
            contenders.CONTENDERS[name].prepare(case, x)


def test_math_is_refused_before_it_fills_the_memory():
    case = small(seqlen=16384, num_heads=16, num_heads_k=16)
    x = contenders.make_inputs(small(), "cpu")
    with pytest.raises(contenders.Refused, match="GiB matrices"):
        contenders.CONTENDERS["math"].prepare(case, x)


def made_up_cell(case, **speeds):
    results = {n: {d: {"seconds": 1e-3, "least": 1e-3, "runs": 3, "tflops": s} for d in report.DIRECTIONS} for n, s in speeds.items()}
    clocks = {d: {"sm_mhz": 1700 + case.head_dim} for d in ("forward", "backward")}
    return {"case": {**case.__dict__, "mask": case.mask}, "clocks": clocks, "results": results, "refused": {"Triton": "is not installed"}}


def made_up_record():
    """Numbers with a known pattern, for the tables and the plots."""
    machine = {"gpu": "no GPU", "driver": "1", "cuda": "13", "torch": "0", "cudnn": 0, "commit": "none", "date": "2026-01-01T00:00"}
    record = {"machine": {**machine, "command": ["python", "bench/peers", "--peers=strobe deterministic"]}, "cells": [], "memory": []}
    for case in [*cases.grid(), *cases.short(), *cases.gqa(), *cases.varlen(), *cases.window()]:
        record["cells"].append(made_up_cell(case, strobe=600.0, FA2=700.0, FA3=300.0, cuDNN=500.0 + case.seqlen / 1024))
    for case in cases.deterministic():
        speeds = {"strobe": 600.0, "strobe deterministic": 480.0, "FA3 deterministic": 400.0}
        record["cells"].append(made_up_cell(case, **speeds))
    for case in cases.others():
        record["cells"].append(made_up_cell(case, strobe=555.0, Triton=200.0, math=20.0))
    for seqlen in cases.MEMORY_SEQLENS:
        record["memory"].append({"seqlen": seqlen, "inputs": seqlen, "peak": {"strobe": seqlen << 14, "math": seqlen**2}, "refused": {}})
    return record


def test_report():
    record = made_up_record()
    cell = next(c for c in record["cells"] if c["case"]["seqlen"] == 16384)
    assert report.ratio(cell, "forward") == pytest.approx(600 / 516)  # of FA3 and cuDNN, whatever FA2 does
    text = report.lines(cell, ["strobe", "FA3", "cuDNN"])
    assert "600" in text and "516" in text and "1.16" in text and "Triton: is not installed" in text and len(text.splitlines()) == 4
    summary = report.summary(record)
    assert "FA3 2.00 (2.00)" in summary and "best 1.1" in summary and "FA2 0.86 (0.86)" in summary
    assert report.geometric_mean([1.0, 4.0]) == 2.0 and report.geometric_mean([]) is None


def test_bars():
    bars = {(b["what"], b["direction"], b["against"]): b for b in report.bars(made_up_record())}
    grid = bars["grid", "forward", "best"]
    assert grid["cells"] == 36 and grid["least"] == pytest.approx(600 / 516) and grid["least_cell"] == "d64 full 1x16384"
    assert grid["mean"] > grid["least"]
    assert bars["up to 1k", "both", "best"]["cells"] == 12 + 12 and bars["gqa", "backward", "FA2"]["cells"] == 10
    assert bars["deterministic", "backward", "strobe deterministic"]["mean"] == pytest.approx(0.8)
    assert bars["deterministic", "backward", "FA3 deterministic"]["mean"] == pytest.approx(1.2)
    assert ("others", "both", "best") in bars and bars["others", "both", "math"]["mean"] == pytest.approx(555 / 20)


class MadeUpRunner:
    """Takes ten seconds for a cell and none for memory."""

    def __init__(self):
        self.now, self.given = 0.0, []

    def contenders(self, section):
        return ["strobe"]

    def cell(self, case, seconds):
        self.now += 10
        self.given.append(seconds)
        return made_up_cell(case, strobe=600.0, FA3=500.0)

    def memory(self, seqlen):
        return {"seqlen": seqlen, "inputs": seqlen, "peak": {"strobe": seqlen}, "refused": {}}


def measured(seconds, path, sections="varlen,memory,gqa"):
    runner, record = MadeUpRunner(), {"machine": {}, "cells": [], "memory": [], "left_out": []}
    work = list(command.work_of(command.parse(["--sections", sections])))
    command.run(record, work, runner, seconds, path, clock=lambda: runner.now)
    return runner, record


def test_everything_is_measured_where_there_is_time(tmp_path):
    runner, record = measured(400, tmp_path / "new" / "record.json")
    assert len(record["cells"]) == 2 + 10 and len(record["memory"]) == len(cases.MEMORY_SEQLENS) and not record["left_out"]
    assert runner.given[0] == pytest.approx(400 / 20) and runner.given[1] == pytest.approx(390 / 19)
    written = json.loads((tmp_path / "new" / "record.json").read_text())
    assert written["cells"] == json.loads(json.dumps(record["cells"])) and written["bars"] == report.bars(record)


def test_time_that_runs_out_leaves_a_whole_record(tmp_path, capsys):
    _, record = measured(45, tmp_path / "record.json")
    assert [c["case"]["section"] for c in record["cells"]] == ["varlen"] * 2 + ["gqa"] * 3
    assert len(record["left_out"]) == 7 and record["left_out"][0] == "gqa d128 h64k8 full 2x8192"
    assert len(json.loads((tmp_path / "record.json").read_text())["cells"]) == 5
    assert "left out for want of time: 7" in report.summary(record)


def test_the_record_is_on_disk_after_every_cell(tmp_path):
    class Dies(MadeUpRunner):
        def cell(self, case, seconds):
            if len(self.given) == 4:
                raise KeyboardInterrupt
            return super().cell(case, seconds)

    record = {"machine": {}, "cells": [], "memory": [], "left_out": []}
    work = list(command.work_of(command.parse(["--sections", "gqa"])))
    with pytest.raises(KeyboardInterrupt):
        command.run(record, work, Dies(), 1000, tmp_path / "record.json", clock=lambda: 0.0)
    assert len(json.loads((tmp_path / "record.json").read_text())["cells"]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_tables(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(made_up_record()))
    blocks = {name: f"<!-- table: {name} record.json -->\nold\n<!-- end of table -->\n" for name in tables.TABLES}
    text = tables.renewed("# before\n" + "\n".join(blocks.values()) + "after\n", tmp_path)
    assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    assert tables.renewed(text, tmp_path) == text
    of = {name: text.split(f"<!-- table: {name} record.json -->")[1].split("<!-- end")[0] for name in blocks}
    assert "| 64 | full | 512 | 600 | 300 | 500 | 700 | 1.20 |" in of["grid-forward"] and of["grid-forward"].count("\n| ") == 2 + 36
    assert "| 128 | full | 8 to 7" in of["varlen"] and "600, 600" in of["varlen"]
    assert "| 64 | full | 4096 | 600 | 480 | 400 | 0.80 |" in of["deterministic"]
    assert "| the grid, 512 to 16k rows | 36 | 1.1" in of["summary"] and "128 to 1024 rows | 24 | 1.2" in of["summary"]
    assert "| grid | forward | 36 | 1.1" in of["bars"] and "deterministic" not in of["bars"]
    assert "| 512 | full" not in of["memory"] and "| 65536 | 0 | 1024 | 4096 |" in of["memory"]
    assert "SM clock under load 1764 to 1956 MHz" in of["machine"] and "'--peers=strobe deterministic'" in of["machine"]
    for wrong in ("grids record.json", "grid-both none.json"):
        with pytest.raises(SystemExit, match=wrong.split()[0 if "grids" in wrong else 1]):
            tables.renewed(f"<!-- table: {wrong} -->\n<!-- end of table -->", tmp_path)


def test_the_documents_tables_are_what_their_records_say():
    root = pathlib.Path(__file__).resolve().parents[2]
    for path in (root / "README.md", root / "docs" / "benchmarks.md"):
        assert tables.renewed(path.read_text(), root) == path.read_text(), f"run bench/peers/tables.py {path.name}"
    path = root / "docs" / "gpt.md"
    assert tables.renewed(path.read_text(), root, gpt_tables.TABLES) == path.read_text(), f"run bench/gpt_tables.py {path.name}"


def test_tables_of_the_trainer(tmp_path):
    def row(case, peer, **more):
        return {"case": case, "peer": peer, "tflops_per_second": 600.4, "mfu": 0.6071, "tflops_per_second_causal_halved": 560.0,
                "tokens_per_second": 65432.1, "peak_memory_bytes": 33 << 30} | more  # fmt: skip

    first = {"rows": [row("1.3B:2048x8", "strobe:norms"), {"case": "1.3B:2048x8", "peer": "fa2", "failed": "no time left"}]}
    second = {"rows": [{"case": "1.3B:2048x8", "peer": "math", "failed": "out of memory"}, row("1.3B:2048x8", "fa2", mfu=0.5),
                       row("1.3B:2048x8", "strobe:norms", mfu=0.1)]}  # fmt: skip
    for name, record in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps(record))
    text = tables.renewed("<!-- table: peers a,b -->\n<!-- end of table -->", tmp_path, gpt_tables.TABLES)
    assert text.splitlines()[4:7] == [
        "| 1.3B | 2048 x 8 | none (standard attention), eager | out of memory |  |  |  |  | 2 |",
        "| 1.3B | 2048 x 8 | FlashAttention-2, eager | 600 | 50.0 % | 560 | 65.4k | 33.0 GiB | 2 |",
        "| 1.3B | 2048 x 8 | strobe, `--recompute norms` | 600 | 60.7 % | 560 | 65.4k | 33.0 GiB | 1 |",
    ]
    assert "| record |" not in tables.renewed("<!-- table: peers b -->\n<!-- end of table -->", tmp_path, gpt_tables.TABLES)


def test_far_peers_join_the_plot():
    cells = plot.grid_cells(made_up_record())
    assert list(cells) == [(d, mask) for mask in ("full", "causal") for d in (64, 128, 256)]
    row = cells[128, "causal"]
    assert [c["case"]["seqlen"] for c in row] == list(cases.SEQLENS)
    assert row[0]["results"]["strobe"]["both"]["tflops"] == 600 and row[0]["results"]["math"]["both"]["tflops"] == 20


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot.draw(made_up_record(), tmp_path)
    assert sorted(p.name for p in paths) == ["backward.svg", "forward.svg", "forward_backward.svg", "memory.svg"]
    assert all(p.read_text().count("<path") > 50 for p in paths[:3])
    before = {p: p.read_bytes() for p in paths}
    assert {p: p.read_bytes() for p in plot.draw(made_up_record(), tmp_path)} == before  # the same record, the same file


TRITON = """
import torch
import triton_attention

for causal in (False, True):
    q, k, v = (torch.randn(1, 256, 2, 64, requires_grad=True) for _ in range(3))
    out = triton_attention.attention(q, k, v, causal)
    dout = torch.randn_like(out)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
try:
    triton_attention.attention(q[:, :100], k[:, :100], v[:, :100], False)
except ValueError as e:
    assert "q: shape" in str(e)
else:
    raise SystemExit("a length that the kernel does not take was accepted")
"""


def test_triton_kernel_in_its_interpreter():
    """In a process of its own: triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs NumPy below 2.4")
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{TRITON}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
