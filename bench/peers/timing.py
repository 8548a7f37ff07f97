"""Seconds on the device: CUDA events, caches flushed before every run, contenders in turn."""

import statistics

import torch

# More than the L2 of any device; writing it also lets the host run ahead, so that launches are not part of what is timed.
_FLUSH_BYTES = 512 << 20


class Clock:
    """Times calls on the current stream."""

    def __init__(self):
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def start(self, call):
        """Queues one cold run of `call`; its seconds can be asked for once the device has got there."""
        self._flush.zero_()
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
    """The contenders' names, in rounds; those with fewer runs take part in evenly spread rounds."""
    rounds = max(counts.values(), default=0)
    for r in range(rounds):
        for name, count in counts.items():
            if (r + 1) * count // rounds > r * count // rounds:
                yield name


def measure(clock: Clock, calls: dict[str, object], seconds: float) -> dict[str, dict]:
    """Median, least and number of runs of each call, all warmed up before the first is timed."""
    first = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        first[name] = clock.start(call)()
    pending = {name: [] for name in calls}
    for name in in_turn(shares(first, seconds)):
        pending[name].append(clock.start(calls[name]))
    times = {name: [seconds_of() for seconds_of in runs] for name, runs in pending.items()}
    return {
        name: {"seconds": statistics.median(runs), "least": min(runs), "runs": len(runs)} for name, runs in times.items()
    }
