"""Host-side profile of a call: cProfile, per function."""

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
    """Profile `calls` calls with cProfile, after three warm-up calls.

    Returns:
        ``host_ms`` and ``profiled_ms``, milliseconds of a call without and with the profiler, and
        ``functions``, [{function, calls, own_us, cumulative_us}] per call, by decreasing own time.
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
    """Function name with its file relative to the checkout or to site-packages."""
    file = file.removeprefix(f"{ROOT}/")
    file = re.sub(r".*/(?:site-packages|dist-packages|lib/python[\d.]+)/", "", file)
    return function if file == "~" else f"{file}:{line}({function})"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
