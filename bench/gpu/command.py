"""The command line of ``python -m bench gpu``.

``--part NAME`` runs one of check, time, steps, tune and profile within 280 seconds; without it,
check and time run within 540. GPU_BUDGET_S overrides the budget, which includes import time. Each
part runs its most valuable measurements first. The results file is valid JSON at every moment and
lists everything planned from the start, as "not run"; the parts of one commit share a file. Without
a GPU the command prints one sentence, writes a file of "not run" rows and exits with status 0.
``--rehearse`` runs the same plan on a CPU at toy sizes.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from bench import BEGUN, report
from bench.gpu import check, kernels, phases, profile, steps, tune
from bench.gpu.part import Part, Run
from bench.measure import NOT_RUN, Settings
from bench.report import ROOT, Report
from bench.run import Runner

PARTS: dict[str, Part] = {
    "check": check.PART,
    "time": kernels.PART,
    "steps": steps.PART,
    "tune": tune.PART,
    "profile": profile.PART,
}
_DEFAULT = ("check", "time")
_PART_BUDGET, _BUDGET = 280.0, 540.0
_SECONDS_PER_ROW = 0.15
NO_GPU = "no CUDA device is available"
_RESERVE = 10.0  # for the table, and for a worker to be stopped


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    found = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="All that a GPU is needed for, in parts of at most 280 seconds.",
    )
    add = found.add_argument
    add("--part", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--tune", action="store_const", const=["tune"], dest="part", help="as --part tune")
    add("--only", nargs="+", default=[], metavar="CASE", help="part of op/name")
    add("--out", type=Path, metavar="DIR", help="default: BENCH_OUT, bench/results")
    add("--backend", default="auto", help="which of tinyclip's backends is ours")
    add("--rehearse", action="store_true", help="the same plan on a CPU, at toy sizes")
    return found


def main(argv: list[str], begun: float = BEGUN) -> int:
    """Run the parts asked for.

    Returns:
        The exit status: 0, or 1 if a gate was red, a test or command failed, a checker found an
        error, or tinyclip cannot be imported.
    """
    options = parser().parse_args(argv)
    names = options.part or list(_DEFAULT)
    budget = float(os.environ.get("GPU_BUDGET_S") or (_PART_BUDGET if options.part else _BUDGET))
    deadline = begun + budget - min(_RESERVE, budget / 10)
    written = _report(names, options)
    if not (options.rehearse or torch.cuda.is_available()):
        return _no_gpu(written)
    _exit_on_sigterm()
    device = "cpu" if options.rehearse else "cuda"
    settings = Settings(device, _SECONDS_PER_ROW, options.backend, options.rehearse)
    print(f"{written.data['env']['gpu']}, {budget:.0f} s, results in {written.path}", flush=True)
    try:
        wrong = False
        for done, name in enumerate(names):  # split the time left evenly over the parts left
            now = time.monotonic()
            end = now + max(0.0, deadline - now) / (len(names) - done)
            wrong |= _run(name, written, settings, options.only, end)
    finally:
        phases.unlink()
    written.note("complete", True)
    if written.of_this_run:
        print(report.table(written.of_this_run))
    print(f"results: {written.path}")
    return 1 if wrong else 0


def _report(names: list[str], options: argparse.Namespace) -> Report:
    """Open the results file, with every planned row and note, merged with earlier parts."""
    cases = "rehearsal" if options.rehearse else "cuda"
    base = options.out or Path(os.environ.get("BENCH_OUT") or ROOT / "bench" / "results")
    env = report.environment(cases)
    reason = {} if options.rehearse or torch.cuda.is_available() else {"reason": NO_GPU}
    rows, notes = [], {"parts": {}, "versions": phases.versions()}
    for name in names:
        rows += [entry.blank() | reason for entry in PARTS[name].entries(cases, options.only)]
        notes |= PARTS[name].notes()
    written = Report(report.results_file(base, env), env, rows, notes, merge=True)
    known = written.data["parts"]
    written.note("parts", {**{name: {"status": NOT_RUN} for name in names}, **known})
    return written


def _run(name: str, written: Report, settings: Settings, patterns: list[str], end: float) -> bool:
    """Run one part until `end`; True if it found something wrong."""
    start = time.monotonic()
    with Runner(written, settings, _progress) as runner:
        found = PARTS[name].run(Run(written, runner, settings.cases, patterns, end))
    seconds = round(time.monotonic() - start, 1)
    status = "ended" if time.monotonic() < end else "cut by its budget"
    written.note("parts", {**written.data["parts"], name: {"status": status, "seconds": seconds}})
    print(f"part {name}: {status} after {seconds} s", flush=True)
    return found


def _no_gpu(written: Report) -> int:
    written.note("complete", True)
    print(f"No CUDA device is available, so nothing was run; {written.path} lists what would be.")
    return 0


def _progress(row: report.Row) -> None:
    ratio = "" if row["ratio"] is None else f" ratio {row['ratio']:.2f}"
    reason = f" ({row['reason']})" if row["reason"] else ""
    name = f"{row['op']}/{row['case']} {row['mode']} {row['peer']}"
    print(f"{name}: {row['status']}{ratio}{reason}", flush=True)


def _exit_on_sigterm() -> None:
    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
