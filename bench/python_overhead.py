"""Call overhead of strobe.attention from Python beside torch's SDPA: a call on tensors too small to compute anything.

    python bench/python_overhead.py [--device cuda] [--json FILE]

Times are of the calling thread, the least of many repetitions. On CUDA the kernels run behind the calls and are not waited for.
"""

import argparse
import json
import platform
import time

import torch
import torch.nn.functional as F

import strobe


def seconds_per_call(function, repetitions=40, calls=100):
    for _ in range(calls):
        function()
    best = float("inf")
    for _ in range(repetitions):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.thread_time()
        for _ in range(calls):
            function()
        best = min(best, (time.thread_time() - start) / calls)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.set_num_threads(1)

    q, k, v = (torch.randn(1, 8, 1, 64, device=device, dtype=dtype) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grad = torch.ones_like(q)
    results = {}

    def step(function, tensors, grad):
        torch.autograd.grad(function(*tensors), tensors, grad)

    def both(name, function, tensors, grad):
        with torch.no_grad():
            results[f"{name} forward"] = seconds_per_call(lambda: function(*tensors))
        leaves = [x.detach().requires_grad_() for x in tensors]
        results[f"{name} forward, recording"] = seconds_per_call(lambda: function(*leaves))
        results[f"{name} forward and backward"] = seconds_per_call(lambda: step(function, leaves, grad), 50, 50)

    both("strobe.attention", strobe.attention, [q, k, v], grad)
    both("torch SDPA", F.scaled_dot_product_attention, heads_first, grad.transpose(1, 2))

    for name, seconds in results.items():
        print(f"{name:40s} {seconds * 1e6:8.2f} us")
    if arguments.json:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        record = {"machine": machine, "device": str(device), "torch": torch.__version__, "strobe": strobe.__version__}
        with open(arguments.json, "w") as file:
            json.dump({**record, "microseconds": {n: s * 1e6 for n, s in results.items()}}, file, indent=1)


if __name__ == "__main__":
    main()
