"""A pytest plugin of ``make gpu``: what became of each test, on disk as soon as it is known.

One JSON object a line, to the file that GPU_TESTS_OUTCOMES names: {test, outcome, seconds, why,
printed}. A suite that is killed, or a worker that dies with the device, has been counted so far.
"""

import json
import os
from pathlib import Path

_in_worker = False


def pytest_configure(config):
    # Its reports reach the process that started it, which writes them. The environment does not
    # tell: a worker's own child inherits what is there.
    global _in_worker
    _in_worker = hasattr(config, "workerinput")


def _write(**line: object) -> None:
    if not _in_worker:
        with Path(os.environ["GPU_TESTS_OUTCOMES"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _why(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    told = crash.message if crash else report.longrepr
    if isinstance(told, tuple):  # a skip: file, line, reason
        told = told[-1]
    return str(told or "").strip()[:600]


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        seconds, printed = round(report.duration, 2), report.capstdout.strip()[-600:]
        why = "" if report.passed else _why(report)
        _write(
            test=report.nodeid, outcome=report.outcome, seconds=seconds, why=why, printed=printed
        )


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, outcome="failed", seconds=0.0, why=_why(report), printed="")
