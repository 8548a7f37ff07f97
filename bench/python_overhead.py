"""Call overhead of strobe.attention from Python beside torch's SDPA: a call on tensors too small to compute anything.

    python bench/python_overhead.py [--device cuda] [--stages] [--rounds 160] [--json FILE]

In each round every contender makes CALLS calls in a row, in an order shuffled anew. The round belongs to one processor, on which the
calling thread is held; the next round to the next one. For a processor may run at half its speed for as long as others keep the other
half of its core busy, which the system cannot see where it is a guest itself; a thread left alone stays on such a one for seconds. A
Python loop of fixed work right before and behind the timed calls tells how fast the processor was meanwhile.

Before its calls are timed a contender makes some untimed ones and waits for the device: neither another's kernels nor its code in the
caches count, and the timed kernels never fill the device's queue. Python's garbage collector is off.

Reported are the least and the median of the rounds, and the median of those at full speed (the fixed loop took at most SLOWER times its
least), by the calling thread's own time; and the median by the clock on the wall, which differs where the thread waited or was kept off
its processor. Forward and backward together are timed by the clock on the wall alone on CUDA, since autograd runs backwards in a thread of
its own.
--stages takes the parts of a forward call into the same rounds, each on its own: the operator below the Python function, the C function
below the operator, both with nothing to launch, and what torch takes to allocate a tensor and to launch one kernel.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "peers"))

import machine  # noqa: E402
import measuring  # noqa: E402
import strobe  # noqa: E402
import strobe.numpy as abi  # noqa: E402
from strobe import _native, _ops  # noqa: E402

WARM_UP, CALLS = 10, 50
SLOWER = 1.15


def fixed_work():
    """Seconds of a loop that always does the same."""
    start = time.thread_time()
    for _ in range(1000):
        pass
    return time.thread_time() - start


class Contender:
    """A function, and the contexts to call it in. `wall`: its time is not the calling thread's alone."""

    def __init__(self, function, *contexts, wall=False):
        self.function, self.contexts, self.wall = function, contexts, wall
        self.forget()

    def forget(self):
        self.own, self.by_wall = [], []  # seconds per call, one entry a round
        self.processors, self.work = [], []  # where, and the fixed work's seconds there

    def times(self):
        return self.by_wall if self.wall else self.own

    def measure(self, processor, wait):
        function = self.function
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            for _ in range(WARM_UP):
                function()
            wait()
            fixed = fixed_work()
            wall, own = time.perf_counter(), time.thread_time()
            for _ in range(CALLS):
                function()
            own, wall = time.thread_time() - own, time.perf_counter() - wall
            fixed = max(fixed, fixed_work())
            wait()
        self.own.append(own / CALLS)
        self.by_wall.append(wall / CALLS)
        self.processors.append(processor)
        self.work.append(fixed)


def in_turn(contenders: dict, rounds: int, device) -> None:
    """Fills the contenders' times."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    everywhere = sorted(os.sched_getaffinity(0))
    order, generator = list(contenders.values()), random.Random(0)
    for contender in order:  # threads of torch's are made now, before this one is held anywhere, since they inherit it
        contender.measure(None, wait)
        contender.forget()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            processor = everywhere[i % len(everywhere)]
            os.sched_setaffinity(0, {processor})  # of the calling thread
            generator.shuffle(order)
            for contender in order:
                contender.measure(processor, wait)
    finally:
        gc.enable()
        os.sched_setaffinity(0, everywhere)


def inputs(device, rows=8):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [torch.randn(1, rows, 1, 64, device=device, dtype=dtype) for _ in range(3)]


def whole_calls(device) -> dict:
    """{what: Contender} for strobe and SDPA."""
    tensors = inputs(device)
    heads_first = [x.transpose(1, 2) for x in tensors]
    grad = torch.ones_like(tensors[0])
    contenders = {}

    def step(function, tensors, grad):
        torch.autograd.grad(function(*tensors), tensors, grad)

    def add(name, function, tensors, grad, *contexts):
        leaves = [x.detach().requires_grad_() for x in tensors]
        contenders[f"{name} forward"] = Contender(lambda: function(*tensors), torch.no_grad, *contexts)
        contenders[f"{name} forward, recording"] = Contender(lambda: function(*leaves), *contexts)
        contenders[f"{name} forward and backward"] = Contender(
            lambda: step(function, leaves, grad), *contexts, wall=device.type == "cuda"
        )

    add("strobe.attention", strobe.attention, tensors, grad)
    add("torch SDPA", F.scaled_dot_product_attention, heads_first, grad.transpose(1, 2))
    add("SDPA on strobe", F.scaled_dot_product_attention, heads_first, grad.transpose(1, 2), strobe.hooks.sdpa)
    return contenders


# ---- parts of a call --------------------------------------------------------------------------------------------------------


def view(x: torch.Tensor) -> abi._Tensor:
    dtypes = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    t = abi._Tensor(data=x.data_ptr(), dtype=abi._DTYPES[dtypes[x.dtype]], ndim=x.dim())
    t.device_type, t.device_index = int(x.is_cuda), x.device.index or 0
    t.shape[: x.dim()], t.strides[: x.dim()] = x.shape, x.stride()
    return t


def c_calls(tensors) -> tuple:
    """(forward, plan): the two C functions on these tensors, with everything that they are given made in advance."""
    library = _native.c_abi()
    q = tensors[0]
    a = abi._sized(abi._Attention(window_left=-1, window_right=-1, num_threads=1))
    a.q, a.k, a.v = map(view, tensors)
    kept = [torch.empty_like(q), torch.empty(1 << 20, dtype=torch.uint8, device=q.device)]
    f = abi._sized(abi._Forward(out=view(kept[0]), workspace=kept[1].data_ptr(), workspace_bytes=1 << 20))
    plan = abi._sized(abi._Plan())
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if q.is_cuda else None)
    pointers = [ctypes.byref(x) for x in (a, f, plan)]

    def forward(kept=kept):
        return library.strobe_attention_forward(pointers[0], pointers[1], stream)

    def plan_only():
        return library.strobe_attention_forward_plan(*pointers)

    abi._check(forward())
    abi._check(plan_only())
    return forward, plan_only


def parts(device) -> dict:
    """{what: Contender} of a forward call's parts."""
    tensors = inputs(device)
    nothing = [inputs(device, rows=0)[0], *tensors[1:]]
    forward, plan = c_calls(tensors)
    idle, _ = c_calls(nothing)
    plain, plain_lse, library = _ops.attention_plain._handle, _ops.attention_plain_lse._handle, _native.c_abi()
    one = torch.zeros(1, device=device)
    calls = {
        "strobe.attention": lambda: strobe.attention(*tensors),
        "strobe.attention, with log-sum-exp": lambda: strobe.attention(*tensors, return_lse=True),
        "operator": lambda: _ops.call(plain, *tensors, None, False),
        "operator, with log-sum-exp": lambda: _ops.call(plain_lse, *tensors, None, False),
        "operator, no queries": lambda: _ops.call(plain, *nothing, None, False),
        "C function": forward,
        "C function, no queries": idle,
        "C plan": plan,
        "ctypes alone": library.strobe_num_threads,
        "torch.empty": lambda: torch.empty((1, 8, 1, 64), device=device),
        "one torch kernel in place": one.neg_,
    }
    return {name: Contender(function, torch.no_grad) for name, function in calls.items()}


# ---- the record -------------------------------------------------------------------------------------------------------------


def microseconds(seconds):
    return None if math.isnan(seconds) else round(seconds * 1e6, 3)


def at_full_speed(contender: Contender, least_work: float) -> list:
    """Its times of those rounds."""
    return [t for t, work in zip(contender.times(), contender.work) if work <= SLOWER * least_work]


STATISTICS = {
    "": lambda c, _: min(c.times()),
    "median_": lambda c, _: statistics.median(c.times()),
    "full_speed_median_": lambda c, least_work: statistics.median(at_full_speed(c, least_work) or [math.nan]),
    "wall_median_": lambda c, _: statistics.median(c.by_wall),
}


def by_processor(values, processors) -> dict:
    """{processor: median microseconds}."""
    groups = {p: [t for t, q in zip(values, processors) if q == p] for p in sorted(set(processors))}
    return {str(p): microseconds(statistics.median(group)) for p, group in groups.items()}


def summary(groups: dict, least_work: float) -> dict:
    """Fields of the record: for each group of contenders its least times under the group's name, medians beside them."""
    fields = {}
    for group, contenders in groups.items():
        for prefix, value in STATISTICS.items():
            fields[prefix + group] = {name: microseconds(value(c, least_work)) for name, c in contenders.items()}
    return fields


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", action="store_true", help="time the parts of a forward call too")
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)

    groups = {"microseconds": whole_calls(device)}
    if arguments.stages:
        groups["stages_microseconds"] = parts(device)
    everything = {name: c for contenders in groups.values() for name, c in contenders.items()}
    start, busy = time.perf_counter(), measuring.busy_seconds()
    in_turn(everything, arguments.rounds, device)
    elapsed = time.perf_counter() - start
    busy = measuring.busy_seconds() - busy

    ours, theirs = (everything[f"{name} forward"] for name in ("strobe.attention", "torch SDPA"))
    least_work = min(work for c in everything.values() for work in c.work)
    full_speed = len(at_full_speed(ours, least_work))
    record = {
        "machine": {**measuring.header()["machine"], **machine.describe()},
        "device": str(device),
        "method": {"rounds": arguments.rounds, "calls": CALLS, "untimed_calls": WARM_UP, "order": "shuffled in each round",
                   "held_on": "one processor a round, each in its turn", "rounds_at_full_speed": full_speed,
                   "seconds": round(elapsed, 1), "processors_busy": round(busy / elapsed, 2)},
        **summary(groups, least_work),
        "forward_of_sdpa": round(statistics.median(a / b for a, b in zip(ours.own, theirs.own)), 3),
        "median_microseconds_by_processor": {
            "strobe.attention forward": by_processor(ours.own, ours.processors),
            "torch SDPA forward": by_processor(theirs.own, theirs.processors),
            "fixed Python loop": by_processor(ours.work, ours.processors),
        },
    }  # fmt: skip
    print(f"{'microseconds':40s} {'least':>8s} {'median':>8s} {'at speed':>8s} {'wall':>8s}")
    for name, c in everything.items():
        print(f"{name:40s} " + " ".join(f"{value(c, least_work) * 1e6:8.2f}" for value in STATISTICS.values()))
    print(f"forward of SDPA's: {record['forward_of_sdpa']}; rounds at full speed: {full_speed} of {arguments.rounds}; "
          f"processors busy, with this one: {busy / elapsed:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
