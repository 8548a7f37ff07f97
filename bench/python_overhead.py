"""Call overhead of strobe.attention from Python beside torch's SDPA: a call on tensors too small to compute anything.

    python bench/python_overhead.py [--device cuda] [--stages] [--json FILE]

Times are of the calling thread, the least of many repetitions, which the contenders take in turn: processors speed up and slow
down. On CUDA the kernels run behind the calls and are not waited for; forward and backward together are timed by the clock on the
wall there, since autograd runs backwards in a thread of its own.
--stages times the parts of a forward call too, each on its own: the operator below the Python function, the C function below the
operator, both with nothing to launch, and what torch takes to allocate a tensor and to launch one kernel.
"""

import argparse
import contextlib
import ctypes
import json
import pathlib
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


def seconds_per_call(function, clock, calls=50):
    """Of one repetition."""
    for _ in range(5):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def least(calls: dict, rounds=100) -> dict:
    """{name: seconds} of {name: (function, clock, contexts to call it in)}."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, (function, clock, contexts) in calls.items():
            with contextlib.ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                best[name] = min(best[name], seconds_per_call(function, clock))
    return best


def inputs(device, rows=8):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [torch.randn(1, rows, 1, 64, device=device, dtype=dtype) for _ in range(3)]


def whole_calls(device) -> dict:
    """{what: seconds} for strobe and SDPA."""
    tensors = inputs(device)
    heads_first = [x.transpose(1, 2) for x in tensors]
    grad = torch.ones_like(tensors[0])
    both_clock = time.perf_counter if device.type == "cuda" else time.thread_time
    calls = {}

    def step(function, tensors, grad):
        torch.autograd.grad(function(*tensors), tensors, grad)

    def add(name, function, tensors, grad, *contexts):
        leaves = [x.detach().requires_grad_() for x in tensors]
        calls[f"{name} forward"] = (lambda: function(*tensors)), time.thread_time, (torch.no_grad, *contexts)
        calls[f"{name} forward, recording"] = (lambda: function(*leaves)), time.thread_time, contexts
        calls[f"{name} forward and backward"] = (lambda: step(function, leaves, grad)), both_clock, contexts

    add("strobe.attention", strobe.attention, tensors, grad)
    add("torch SDPA", F.scaled_dot_product_attention, heads_first, grad.transpose(1, 2))
    add("SDPA on strobe", F.scaled_dot_product_attention, heads_first, grad.transpose(1, 2), strobe.hooks.sdpa)
    return least(calls)


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
    """{what: seconds} of a forward call's parts."""
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
    return least({name: (function, time.thread_time, (torch.no_grad,)) for name, function in calls.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", action="store_true", help="time the parts of a forward call too")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)

    record = {"machine": {**measuring.header()["machine"], **machine.describe()}, "device": str(device)}
    groups = {"microseconds": whole_calls}
    if arguments.stages:
        groups["stages_microseconds"] = parts
    for group, measure in groups.items():
        record[group] = {name: round(seconds * 1e6, 3) for name, seconds in measure(device).items()}
        for name, microseconds in record[group].items():
            print(f"{name:40s} {microseconds:8.2f} us")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
