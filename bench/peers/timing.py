"""Seconds on the device: CUDA events, caches flushed before every run, contenders in turn."""

import math
import statistics
import time

import torch

# More than the L2 of any device; writing it also lets the host run ahead, so that launches are not part of what is timed.
_FLUSH_BYTES = 512 << 20


class Clock:
    """Times calls on the current stream."""

    def __init__(self):
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._flush.zero_()
        self.flush_seconds = self._timed(self._flush.zero_)()

    def start(self, call, flushes: int = 1):
        """Queues one cold run of `call`; its seconds can be asked for once the device has got there."""
        for _ in range(flushes):
            self._flush.zero_()
        return self._timed(call)

    def _timed(self, call):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3

        return seconds


def shares(first: dict[str, float], seconds: float, most: int = 30, least: int = 3) -> dict[str, int]:
    """How often each contender runs: an equal part of `seconds` for each, by the time that its first run took."""
    part = seconds / max(1, len(first))
    return {name: max(least, min(most, int(part / max(t, 1e-9)))) for name, t in first.items()}


def in_turn(counts: dict[str, int]):
    """The contenders' names, in rounds. Those with fewer runs take part in evenly spread rounds, and every round begins with
    another contender, so that nobody always follows the same one."""
    names = list(counts)
    rounds = max(counts.values(), default=0)
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            if (r + 1) * counts[name] // rounds > r * counts[name] // rounds:
                yield name


def flushes(host: float, device: float, flush: float) -> int:
    """How often the caches are written before a run, so that flushes and run last longer than the host takes to launch them."""
    return max(1, math.ceil((1.3 * host - device) / flush))


def measure(clock: Clock, calls: dict[str, object], seconds: float, sample=lambda: None) -> tuple[dict[str, dict], object]:
    """Per call the median, the least, the number of runs and the host's seconds to launch it, all warmed up before the first is
    timed; in what `waits`, the device waited for the host after all. And what `sample()` says while the device is at work."""
    host, first = {}, {}
    for name, call in calls.items():
        host[name] = statistics.median(_launch_seconds(call) for _ in range(3))
        first[name] = clock.start(call, flushes(host[name], 0.0, clock.flush_seconds))()
    ahead = max((flushes(host[n], first[n], clock.flush_seconds) for n in calls), default=1)  # the same for everyone
    turns = list(in_turn(shares(first, seconds)))
    pending = {name: [] for name in calls}
    sampled = None
    for turn, name in enumerate(turns):
        pending[name].append(clock.start(calls[name], ahead))
        if turn == len(turns) // 2:
            sampled = sample()
    times = {name: [seconds_of() for seconds_of in runs] for name, runs in pending.items()}
    results = {}
    for name, runs in times.items():
        seconds = statistics.median(runs)
        results[name] = {"seconds": seconds, "least": min(runs), "runs": len(runs), "host": host[name]}
        if host[name] > ahead * clock.flush_seconds + seconds:
            results[name]["waits"] = True
    return results, sampled


def _launch_seconds(call) -> float:
    """The host's time for a call while the device has nothing else to do."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
