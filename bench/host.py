"""Where the host's time goes while it feeds a device: cProfile, per call and per function."""

import cProfile
import pstats
import re
import time
from typing import Any

import torch

from bench.report import ROOT
from bench.timing import Timed

_SHOWN = 60


def host_profile(timed: Timed, device: str, calls: int) -> dict[str, Any]:
    """cProfile of `calls` calls after three.

    Returns:
        ``host_ms``, a call's time without the profiler; ``profiled_ms``, with it; ``functions``:
        {function, calls, own_us, cumulative_us} of one call, most of its own time first.
    """
    with timed.context():
        for _ in range(3):
            timed.call()
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            timed.call()
        plain = time.perf_counter() - start
        _synchronize(device)
        profiler = cProfile.Profile()
        start = time.perf_counter()
        profiler.enable()
        for _ in range(calls):
            timed.call()
        profiler.disable()
        profiled = time.perf_counter() - start
        _synchronize(device)
    rows = [
        {
            "function": _name(*place),
            "calls": round(count / calls, 2),
            "own_us": round(1e6 * own / calls, 2),
            "cumulative_us": round(1e6 * cumulative / calls, 2),
        }
        for place, (_, count, own, cumulative, _) in pstats.Stats(profiler).stats.items()
    ]
    rows.sort(key=lambda row: -row["own_us"])
    milliseconds = {"host_ms": 1e3 * plain / calls, "profiled_ms": 1e3 * profiled / calls}
    return {**milliseconds, "functions": rows[:_SHOWN]}


def _name(file: str, line: int, function: str) -> str:
    """As a reader of any machine knows it: without the folders before a package."""
    file = file.removeprefix(f"{ROOT}/")
    file = re.sub(r".*/(?:site-packages|dist-packages|lib/python[\d.]+)/", "", file)
    return function if file == "~" else f"{file}:{line}({function})"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
