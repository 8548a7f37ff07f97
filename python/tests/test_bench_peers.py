"""The peer benchmark as far as no GPU is needed: arguments, FLOPs, lengths, turns, results that differ, the table, the plots."""

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "peers"))

import importlib.util  # noqa: E402

import cases  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402

_spec = importlib.util.spec_from_file_location("bench_peers_main", pathlib.Path(cases.__file__).parent / "__main__.py")
command = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(command)


def test_arguments():
    whole = command.parse([])
    assert whole.sections == [*cases.SECTIONS, "memory"] and whole.seconds == 600 and len(command.cells_of(whole)) > 60
    quick = command.parse(["--quick"])
    assert quick.seconds == 60 and len(command.cells_of(quick)) < 25
    some = command.parse(["--sections", "gqa,memory", "--peers", "cuDNN", "--seconds", "5"])
    assert some.peers == ["strobe", "cuDNN"] and {c.section for c in command.cells_of(some)} == {"gqa"} and some.seconds == 5


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
    assert all("fast" in order[i : i + 3] for i in range(len(order) - 2))  # nobody runs in a block of its own
    assert list(timing.in_turn({})) == []


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
    assert measure.difference(ours, (out, *math.gradients(out, x))) < 2e-2
    assert measure.difference(ours, (out.roll(1, dims=1), *math.gradients(out, x))) > 0.5


def test_varlen_inputs():
    case = small(seqlen=90, batch=2, lengths=(38, 90))
    x = contenders.make_inputs(case, "cpu")
    assert x.q.shape == (128, 2, 64) and x.cu_seqlens.tolist() == [0, 38, 128] and x.max_seqlen == 90
    assert contenders.CONTENDERS["strobe"].prepare(case, x)().shape == x.q.shape
    for name in ("cuDNN", "Triton", "efficient", "math"):
        with pytest.raises(contenders.Refused):
            contenders.CONTENDERS[name].prepare(case, x)


def test_math_is_refused_before_it_fills_the_memory():
    case = small(seqlen=16384, num_heads=16, num_heads_k=16)
    x = contenders.make_inputs(small(), "cpu")
    with pytest.raises(contenders.Refused, match="GiB matrices"):
        contenders.CONTENDERS["math"].prepare(case, x)


def made_up_record():
    """Numbers with a known pattern, for the table and the plots."""
    record = {"machine": {"gpu": "no GPU", "torch": "0", "cudnn": 0, "commit": "none"}, "cells": [], "memory": []}
    for case in cases.grid():
        speeds = {"strobe": 600.0, "FA2": 300.0, "cuDNN": 500.0 + case.seqlen / 1024}
        results = {n: {d: {"seconds": 1e-3, "least": 1e-3, "runs": 3, "tflops": s} for d in report.DIRECTIONS} for n, s in speeds.items()}
        record["cells"].append({"case": {**case.__dict__, "mask": case.mask}, "results": results, "refused": {"FA3": "is not installed"}})
    for seqlen in cases.MEMORY_SEQLENS:
        record["memory"].append({"seqlen": seqlen, "inputs": seqlen, "peak": {"strobe": seqlen << 14, "math": seqlen**2}, "refused": {}})
    return record


def test_table():
    record = made_up_record()
    cell = next(c for c in record["cells"] if c["case"]["seqlen"] == 16384)
    assert report.ratio(cell, "forward") == pytest.approx(600 / 516)
    text = report.lines(cell, ["strobe", "FA3", "cuDNN"])
    assert "600" in text and "516" in text and "1.16" in text and "FA3: is not installed" in text and len(text.splitlines()) == 4
    summary = report.summary(record)
    assert "FA2 2.00 (2.00)" in summary and "best 1.1" in summary
    assert report.geometric_mean([1.0, 4.0]) == 2.0 and report.geometric_mean([]) is None


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot.draw(made_up_record(), tmp_path)
    assert sorted(p.name for p in paths) == ["backward.svg", "forward.svg", "forward_backward.svg", "memory.svg"]
    assert all(p.read_text().count("<path") > 50 for p in paths[:3])
    before = {p: p.read_bytes() for p in paths}
    assert {p: p.read_bytes() for p in plot.draw(made_up_record(), tmp_path)} == before  # the same record, the same file


def test_triton_kernel_in_its_interpreter(monkeypatch):
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 needs NumPy below 2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    sys.modules.pop("triton_attention", None)
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
    with pytest.raises(ValueError, match="q: shape"):
        triton_attention.attention(q[:, :100], k[:, :100], v[:, :100], False)
    sys.modules.pop("triton_attention", None)
