"""Paired timing in one process: ours, the peer, ours again, round after round.

A ratio of two times taken minutes apart measures the machine's mood as much as the code. Here a
round is A-B-A and yields one ratio, peer / mean(ours before, ours after), so a drift that is
slower than a round cancels; the result is the median of the rounds' ratios with its p20 and p80.

A sample is the median of a few calls: on a GPU between CUDA events, with the L2 cache flushed
before each; on a CPU by `perf_counter`.
"""

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 31
_SEGMENT_MS = {"cpu": 10.0, "cuda": 2.0}  # long enough that a timer's grain and one hiccup vanish
_WARM_UP_MS = {"cpu": 0.0, "cuda": 30.0}  # an idle GPU needs a while to raise its clocks
_FLUSH_BYTES = 2**28  # several times any L2

Clock = Callable[[Callable[[], object], int], float]


class Timed(NamedTuple):
    """A call, and what has to hold while it runs (entered outside the clock)."""

    call: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Paired(NamedTuple):
    """Milliseconds of one call in every round, and the ratio peer / ours: above 1, ours wins."""

    ours_ms: list[float]
    peer_ms: list[float]
    ratio: float
    p20: float
    p80: float


def _cpu_clock(call: Callable[[], object], calls: int) -> float:
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def _cuda_clock() -> Clock:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(call: Callable[[], object], calls: int) -> float:
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(calls)
        ]
        for start, end in marks:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks)

    return clock


def clock(device: str) -> Clock:
    """``clock(call, calls)`` -> milliseconds of one call."""
    return _cuda_clock() if device == "cuda" else _cpu_clock


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the ordered values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def pair(before: list[float], peer: list[float], after: list[float]) -> Paired:
    """The rounds' samples, round by round, as one result."""
    ours = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    p20, middle, p80 = (quantile(ratios, q) for q in (0.2, 0.5, 0.8))
    return Paired(ours, peer, middle, p20, p80)


def warm(timed: Timed, measure: Clock, device: str) -> float:
    """Run until steady; the milliseconds one call then takes."""
    with timed.context():
        measure(timed.call, 1)
        ms = measure(timed.call, 1)
        repeats = min(300, int(_WARM_UP_MS[device] / max(ms, 0.01)))
        return measure(timed.call, repeats) if repeats > 1 else ms


def plan(round_ms: float, call_ms: float, device: str, seconds: float) -> tuple[int, int]:
    """(calls in a segment, rounds) that fill about `seconds`, never fewer than five rounds."""
    calls = max(1, min(50, round(_SEGMENT_MS[device] / max(call_ms, 1e-3))))
    rounds = int(1e3 * seconds / max(calls * round_ms, 1e-3))
    return calls, max(MIN_ROUNDS, min(MAX_ROUNDS, rounds))


def paired(ours: Timed, peer: Timed, device: str, seconds: float) -> Paired:
    """Interleaved A-B-A rounds of `ours` and `peer`."""
    measure = clock(device)
    ours_ms, peer_ms = warm(ours, measure, device), warm(peer, measure, device)
    calls, rounds = plan(2 * ours_ms + peer_ms, min(ours_ms, peer_ms), device, seconds)
    samples: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for side, timed in zip(samples, (ours, peer, ours), strict=True):
            with timed.context():
                side.append(measure(timed.call, calls))
    return pair(*samples)


def alone(timed: Timed, device: str, seconds: float) -> list[float]:
    """Milliseconds of one call, one figure a round, with nobody to compare."""
    measure = clock(device)
    ms = warm(timed, measure, device)
    calls, rounds = plan(ms, ms, device, seconds)
    with timed.context():
        return [measure(timed.call, calls) for _ in range(rounds)]


def graphed(timed: Timed, device: str) -> Timed:
    """The same work as one CUDA graph replay: the launches' cost on the host is gone.

    A CPU has no graphs: there it is the work itself, for a rehearsal.
    """
    if device == "cpu":
        return timed
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with timed.context(), torch.cuda.stream(stream):
        for _ in range(3):
            timed.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with timed.context(), torch.cuda.graph(graph):
        timed.call()
    return Timed(graph.replay)


def host_ms(timed: Timed, device: str, calls: int = 5) -> float:
    """Milliseconds that a call keeps the host, the device's work left running: the median."""
    taken = []
    with timed.context():
        for _ in range(calls):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            timed.call()
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def peak_mb(timed: Timed, device: str) -> float | None:
    """Memory one call takes at its worst, over what is resident before it.

    Exact on a GPU. On a CPU it is the growth of the resident high-water mark, which the kernel lets
    a process reset on Linux only, and from which memory the allocator already held is missing.
    """
    with timed.context():
        timed.call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            timed.call()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_kb("VmRSS")
            timed.call()
            return (_status_kb("VmHWM") - before) / 1e3
        except (OSError, AttributeError):
            return None


def _status_kb(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1))
