"""``python -m bench gpu``: everything a GPU is needed for, in one command, offline, under a budget.

In this order, so that a run cut short has what depends on it most: build the extension, PyTorch's
own baselines (copy, cuBLAS, pinned SDPA), the tests marked gpu, the kernels under checkers of
memory and of races, every op beside its peers. The budget is ``GPU_BUDGET_S`` seconds (600).
Without a GPU: one line and a file of "not run" rows; 0.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import IO, Any

import torch

from bench import registry, report
from bench.measure import FAILED, NOT_RUN, Settings
from bench.report import ROOT, Report
from bench.run import Entry, Runner, plan

_SECONDS_PER_ROW = 0.15
_RESERVE = 10.0  # for the table, and for a worker to be stopped
_BUILD = ("-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", ".")
_GPU_TESTS = ("-m", "gpu", "tests")
# Shares of what is left when a phase begins.
_BUILD_SHARE, _BASELINE_SHARE, _TEST_SHARE, _CHECK_SHARE = 0.4, 0.25, 0.5, 0.15
_CHECKS = ("memcheck", "racecheck")  # compute-sanitizer's tools


def main(patterns: list[str], base: Path, backend: str = "auto") -> int:
    """Run it; 0 unless a gate was red or a GPU test failed."""
    budget = float(os.environ.get("GPU_BUDGET_S") or 600)
    deadline = time.monotonic() + budget - min(_RESERVE, budget / 10)
    baselines = plan(registry.select(registry.baselines(), patterns))
    ops = plan(registry.select(registry.cases("cuda"), patterns))
    env = report.environment("cuda")
    written = Report(report.results_file(base, env), env, [e.blank() for e in baselines + ops])
    if not torch.cuda.is_available():
        return _no_gpu(written, baselines + ops)
    _raise_on_sigterm()
    print(f"{env['gpu']}, budget {budget:.0f} s, results in {written.path}", flush=True)
    settings = Settings("cuda", _SECONDS_PER_ROW, backend)
    written.note("build", _build(written.path, _share(deadline, _BUILD_SHARE)))
    with Runner(written, settings, _progress) as runner:
        runner.measure_machine(_share(deadline, _BASELINE_SHARE))
        runner.run(baselines, _share(deadline, _BASELINE_SHARE))
        runner.release()  # the tests get the whole device
        written.note("tests", _tests(written.path, _share(deadline, _TEST_SHARE)))
        for check in _CHECKS:
            found = _sanitized(check, written.path, _share(deadline, _CHECK_SHARE))
            written.note(check, found)
        runner.run(ops, deadline)
    written.note("complete", True)
    print(report.table(written.rows))
    print(f"build: {written.data['build']['status']}; tests: {written.data['tests']}")
    print(f"results: {written.path}")
    red = any(row["gate"] == "red" for row in written.rows)
    return 1 if red or written.data["tests"]["failed"] else 0


def _no_gpu(written: Report, entries: list[Entry]) -> int:
    reason = "no CUDA device is available"
    for i, entry in enumerate(entries):
        written.rows[i] = {**entry.blank(), "reason": reason}
    written.data["build"] = {"status": NOT_RUN, "seconds": 0.0}
    written.data["tests"] = _no_tests(NOT_RUN, 0.0)
    for check in _CHECKS:
        written.data[check] = {"status": NOT_RUN, "launches": 0, "seconds": 0.0}
    written.note("complete", True)
    print(f"No CUDA device is available, so nothing was run; {written.path} lists what would be.")
    return 0


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


def _start(command: list[str], output: IO[str], **variables: str) -> subprocess.Popen:
    """Start a command from the checkout's root, in a process group that can be interrupted: where
    this process runs in the background it ignores SIGINT, and what it starts would, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(process: subprocess.Popen, deadline: float) -> bool:
    """Whether it ended by itself; if not it is interrupted, then killed, with its children."""
    try:
        for send, patience in ((None, deadline - time.monotonic()), (signal.SIGINT, 10)):
            if send is not None:
                os.killpg(process.pid, send)
            try:
                process.wait(max(0.0, patience))
                return send is None
            except subprocess.TimeoutExpired:
                continue
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _build(results: Path, deadline: float) -> dict[str, Any]:
    """Install in place with the machine's own tools; a failure leaves the pure-Python backends."""
    log, start = results.with_suffix(".build.log"), time.monotonic()
    with log.open("w") as output:
        process = _start([sys.executable, *_BUILD], output)
        in_time = _finish(process, deadline)
    status = "built" if process.returncode == 0 else f"failed with status {process.returncode}"
    seconds = round(time.monotonic() - start, 1)
    found = {"status": status if in_time else "stopped by the budget", "seconds": seconds}
    print(f"build: {found['status']} in {seconds} s, log {log}", flush=True)
    return found | {"log": log.name}


def _no_tests(status: str, seconds: float) -> dict[str, Any]:
    return {"status": status, "passed": 0, "failed": 0, "skipped": 0, "seconds": seconds}


def _tests(results: Path, deadline: float) -> dict[str, Any]:
    """``pytest -m gpu tests``, counted; a suite stopped by the budget keeps what it had counted."""
    log, start = results.with_suffix(".tests.log"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
        counts = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *_GPU_TESTS, "-q", f"--junitxml={counts}"]
        process = _start(command, output)
        in_time = _finish(process, deadline)
        found = _counted(counts)
    outcomes = {0: "passed", 1: FAILED, 5: "no test is marked gpu"}
    status = outcomes.get(process.returncode, f"pytest ended with status {process.returncode}")
    found["status"] = status if in_time else "stopped by the budget"
    found["seconds"] = round(time.monotonic() - start, 1)
    print(f"tests: {found}", flush=True)
    return found | {"log": log.name}


def _sanitized(check: str, results: Path, deadline: float) -> dict[str, Any]:
    """Our kernels under compute-sanitizer, every allocation one of its own; or its absence."""
    log, start = results.with_suffix(f".{check}.log"), time.monotonic()
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"status": "tool unavailable", "launches": 0, "seconds": 0.0}
    command = [tool, "--tool", check, "--error-exitcode", "9"]
    with log.open("w") as output:
        command += [sys.executable, "-m", "bench.sanitized"]
        process = _start(command, output, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        in_time = _finish(process, deadline)
    outcomes = {0: "clean", 9: "errors found"}
    status = outcomes.get(process.returncode, f"ended with status {process.returncode}")
    launches = re.search(r"^(\d+) launches$", log.read_text(errors="replace"), re.MULTILINE)
    found = {
        "status": status if in_time else "stopped by the budget",
        "launches": int(launches[1]) if launches else 0,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(f"{check}: {found}", flush=True)
    return found | {"log": log.name}


def _counted(junit: Path) -> dict[str, Any]:
    found = _no_tests(NOT_RUN, 0.0)
    try:
        suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return found
    for suite in suites:
        count = {name: int(suite.get(name, 0)) for name in ("tests", "errors", "failures")}
        found["failed"] += count["errors"] + count["failures"]
        found["skipped"] += int(suite.get("skipped", 0))
        found["passed"] += count["tests"]
    found["passed"] -= found["failed"] + found["skipped"]
    return found
