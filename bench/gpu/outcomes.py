"""A pytest plugin of ``make gpu``: what became of each test, on disk as soon as it is known.

One JSON object a line, to the file that GPU_TESTS_OUTCOMES names: first {planned: [test]}, then
{test, outcome, seconds, why, printed}. A suite that is killed, or a worker that dies with the
device, has been counted so far, and what it did not reach is known by name.
"""

import json
import os
from pathlib import Path

_worker: str | None = None


def pytest_configure(config):
    # A worker's reports reach the process that started it, which writes them. The environment does
    # not tell: a worker's own child inherits what is there.
    global _worker
    _worker = getattr(config, "workerinput", {}).get("workerid")


def _write(**line: object) -> None:
    with Path(os.environ["GPU_TESTS_OUTCOMES"]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session):
    # Workers collect, all of them the same; the process that started them has no items.
    if session.items and _worker in (None, "gw0"):
        _write(planned=[item.nodeid for item in session.items])


def _why(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    told = crash.message if crash else report.longrepr
    if isinstance(told, tuple):  # a skip: file, line, reason
        told = told[-1]
    return str(told or "").strip()[:600]


def pytest_runtest_logreport(report):
    if _worker is None and (report.when == "call" or report.outcome != "passed"):
        seconds, printed = round(report.duration, 2), report.capstdout.strip()[-600:]
        why = "" if report.passed else _why(report)
        _write(
            test=report.nodeid, outcome=report.outcome, seconds=seconds, why=why, printed=printed
        )


def pytest_collectreport(report):
    if _worker is None and report.failed:
        _write(test=report.nodeid, outcome="failed", seconds=0.0, why=_why(report), printed="")
