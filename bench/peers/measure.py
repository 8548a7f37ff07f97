"""Runs cells: prepares contenders, checks their results against strobe's, times them, and measures peak memory."""

import dataclasses
import time

import torch

import cases
import contenders as peers
import machine
import timing

# Relative difference (norm) between two right answers in bfloat16; dQ of a long sequence is the least certain.
AGREE = 2e-2


def differences(ours, theirs) -> dict[str, float]:
    """||ours - theirs|| / ||ours|| of out, dq, dk and dv."""

    def one(a, b):
        a, b = a.float(), b.float()
        return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item()

    return {name: one(a, b) for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs)}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class Runner:
    def __init__(self, names: list[str]):
        self._names = names
        self._clock = timing.Clock()
        self._missing: dict[str, str] = {}

    def contenders(self, section: str) -> list[str]:
        """The chosen contenders that take part in a section."""
        return [n for n, c in peers.CONTENDERS.items() if n in self._names and section in c.sections]

    def _prepare(self, case: cases.Case, x: peers.Inputs):
        """({name: call}, {name: out with its graph}, {name: reason}); a contender that disagrees with strobe is refused."""
        calls, outs, refused = {}, {}, {}
        expected = None
        for name in self.contenders(case.section):
            contender = peers.CONTENDERS[name]
            if name in self._missing:
                refused[name] = self._missing[name]
                continue
            try:
                call = contender.prepare(case, x)
                out = call()
                results = (out.detach(), *contender.gradients(out, x))
                torch.cuda.synchronize()
            except ImportError as e:
                refused[name] = self._missing[name] = str(e)
                continue
            except Exception as e:  # whatever a peer stumbles over, the others are still measured
                refused[name] = _first_line(e)
                continue
            if expected is None:
                expected = results
            elif name not in peers.OTHER_RESULTS:
                apart = differences(expected, results)
                if not all(x < AGREE for x in apart.values()):
                    refused[name] = "it differs from strobe: " + ", ".join(f"{what} by {x:.2g}" for what, x in apart.items())
                    continue
            calls[name], outs[name] = call, out
            del results
        return calls, outs, refused

    def cell(self, case: cases.Case, seconds: float) -> dict:
        """The record of one cell: per contender seconds and TFLOP/s of forward, backward and both, or why it has none. Takes about
        `seconds` in all, of which the runs get what inputs, first calls and comparisons leave, but a quarter at least."""
        begin = time.perf_counter()
        x = peers.make_inputs(case)
        calls, outs, refused = self._prepare(case, x)
        set_up = time.perf_counter() - begin
        timed = max(seconds - set_up, 0.25 * seconds)

        def without_graph(call):
            def forward():
                with torch.no_grad():
                    call()

            return forward

        def backward(name):
            return lambda: peers.CONTENDERS[name].gradients(outs[name], x)

        forward, forward_clocks = timing.measure(
            self._clock, {n: without_graph(c) for n, c in calls.items()}, timed * 0.3, machine.clocks
        )
        gradients, backward_clocks = timing.measure(self._clock, {n: backward(n) for n in calls}, timed * 0.7, machine.clocks)
        results = {}
        for name in calls:
            both = {key: forward[name][key] + gradients[name][key] for key in ("seconds", "least", "host")}
            both["runs"] = min(forward[name]["runs"], gradients[name]["runs"])
            results[name] = {"forward": forward[name], "backward": gradients[name], "both": both}
            for direction, numbers in results[name].items():
                numbers["tflops"] = cases.flops(case, direction) / numbers["seconds"] * 1e-12
        return {
            "seconds": {"set_up": set_up, "all": time.perf_counter() - begin},
            "case": dataclasses.asdict(case) | {"mask": case.mask},
            "clocks": {"forward": forward_clocks, "backward": backward_clocks},
            "results": results,
            "refused": refused,
        }

    def memory(self, seqlen: int) -> dict:
        """Peak bytes beyond q, k, v and dout of one forward and backward, by contender."""
        case = cases.memory_case(seqlen)
        x = peers.make_inputs(case)
        row = {"seqlen": seqlen, "inputs": sum(t.nbytes for t in (*x.leaves, x.dout)), "peak": {}, "seconds": {}, "refused": {}}
        for name in self.contenders("memory"):
            try:
                call = peers.CONTENDERS[name].prepare(case, x)
                row["peak"][name] = _peak(call, x)
                row["seconds"][name] = self._clock.start(lambda call=call: _both(call, x))()
            except Exception as e:
                row["refused"][name] = _first_line(e)
        return row


def _both(call, x):
    return torch.autograd.grad(call(), x.leaves, x.dout)


def _peak(call, x) -> int:
    """Bytes that one forward and backward hold at their peak beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _both(call, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
