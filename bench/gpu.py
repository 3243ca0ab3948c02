"""``python -m bench gpu``: everything a GPU is needed for, in one command, offline, under a budget.

In this order, so that a run cut short has what depends on it most: PyTorch's own baselines (copy,
cuBLAS, pinned SDPA), the build, the tests marked gpu, the kernels under checkers of memory and of
races, every op beside its peers. The whole ends within ``GPU_BUDGET_S`` seconds (540), what it
imports included. Without a GPU: one line and a file of "not run" rows; 0.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bench import BEGUN, phases, registry, report
from bench.measure import NOT_RUN, Settings
from bench.report import Report
from bench.run import Entry, Runner, plan

_BUDGET = 540.0
_SECONDS_PER_ROW = 0.15
_RESERVE = 10.0  # for the table, and for a worker to be stopped
# Shares of what is left when a phase begins.
_BASELINE_SHARE, _BUILD_SHARE, _TEST_SHARE, _CHECK_SHARE = 0.25, 0.4, 0.55, 0.12


def main(patterns: list[str], base: Path, backend: str = "auto", begun: float = BEGUN) -> int:
    """Run it; 0 unless a gate was red, a GPU test failed, or our ops cannot be imported."""
    budget = float(os.environ.get("GPU_BUDGET_S") or _BUDGET)
    deadline = begun + budget - min(_RESERVE, budget / 10)
    baselines = plan(registry.select(registry.baselines(), patterns))
    ops = plan(registry.select(registry.cases("cuda"), patterns))
    env = report.environment("cuda")
    written = Report(report.results_file(base, env), env, [e.blank() for e in baselines + ops])
    if not torch.cuda.is_available():
        return _no_gpu(written, baselines + ops)
    _raise_on_sigterm()
    print(f"{env['gpu']}, budget {budget:.0f} s, results in {written.path}", flush=True)
    written.note("versions", phases.versions())
    print(f"versions: {written.data['versions']}", flush=True)
    try:
        with Runner(written, Settings("cuda", _SECONDS_PER_ROW, backend), _progress) as runner:
            return _phases(written, runner, baselines, ops, deadline)
    finally:
        phases.unlink()


def _phases(
    written: Report, runner: Runner, baselines: list[Entry], ops: list[Entry], deadline: float
) -> int:
    runner.measure_machine(_share(deadline, _BASELINE_SHARE))
    runner.run(baselines, _share(deadline, _BASELINE_SHARE))
    runner.release()  # the build gets every core, the tests the whole device
    build = phases.build(written.path, _share(deadline, _BUILD_SHARE))
    written.note("build", build)
    if not build["importable"]:
        return _no_ops(written, ops)
    written.note("tests", phases.tests(written.path, _share(deadline, _TEST_SHARE)))
    for check in phases.CHECKS:
        found = phases.check(check, written.path, _share(deadline, _CHECK_SHARE))
        written.note(check, found)
    runner.run(ops, deadline)
    written.note("complete", True)
    print(report.table(written.rows))
    tests = {k: v for k, v in written.data["tests"].items() if k not in ("failures", "printed")}
    print(f"build: {build['status']}; tests: {tests}")
    print(f"results: {written.path}")
    red = any(row["gate"] == "red" for row in written.rows)
    return 1 if red or written.data["tests"]["failed"] else 0


def _not_run(written: Report) -> None:
    for name, value in (
        ("build", {"status": NOT_RUN, "seconds": 0.0}),
        ("tests", phases.no_tests(NOT_RUN)),
        *((check, {"status": NOT_RUN, "launches": 0, "seconds": 0.0}) for check in phases.CHECKS),
    ):
        written.data.setdefault(name, value)
    written.note("complete", True)


def _no_gpu(written: Report, entries: list[Entry]) -> int:
    reason = "no CUDA device is available"
    for i, entry in enumerate(entries):
        written.rows[i] = {**entry.blank(), "reason": reason}
    _not_run(written)
    print(f"No CUDA device is available, so nothing was run; {written.path} lists what would be.")
    return 0


def _no_ops(written: Report, ops: list[Entry]) -> int:
    """PyTorch's own rows are all that there will be."""
    log = written.path.with_name(written.data["build"]["log"])
    for entry in ops:
        written.update(entry.blank(), {"status": NOT_RUN, "reason": "tinyclip is not importable"})
    _not_run(written)
    print(report.table(written.rows))
    print(f"tinyclip cannot be imported here, so only PyTorch was measured: {log} says why.")
    return 1


def _share(deadline: float, share: float) -> float:
    now = time.monotonic()
    return now + share * max(0.0, deadline - now)


def _progress(row: report.Row) -> None:
    ratio = "" if row["ratio"] is None else f" ratio {row['ratio']:.2f}"
    reason = f" ({row['reason']})" if row["reason"] else ""
    name = f"{row['op']}/{row['case']} {row['mode']} {row['peer']}"
    print(f"{name}: {row['status']}{ratio}{reason}", flush=True)


def _raise_on_sigterm() -> None:
    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
