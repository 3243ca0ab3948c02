"""Runs a plan of rows within a budget, one worker at a time, and reports each as it ends."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from bench.case import BOTH, Case
from bench.measure import FAILED, NOT_RUN, Settings
from bench.report import Report, Row, blank
from bench.roofline import Machine
from bench.worker import Worker, WorkerLate, WorkerLost

_ROW_LIMIT = {False: 60.0, True: 180.0}  # seconds; the second for a peer that compiles
_LEAST = 1.0  # no row is started with less than this left


class Entry(NamedTuple):
    """One row to measure."""

    case: Case
    mode: str
    peer: str

    @property
    def slow_start(self) -> bool:
        return self.case.peers[self.peer].slow_start

    def blank(self) -> Row:
        return blank(self.case, self.mode, self.peer)


def plan(cases: list[Case], peers: list[str] | None = None) -> list[Entry]:
    """Every mode and peer of `cases`, in their order; `peers` limits to those named."""
    return [
        Entry(case, mode, peer)
        for case in cases
        for mode in case.modes
        for peer in case.peers
        if not peers or peer in peers
    ]


def order(entries: list[Entry]) -> list[Entry]:
    """What to measure first if time is short: every op's first case before any op's second.

    Peers that compile come last, and of those the training step first.
    """
    ranks: dict[str, dict[str, int]] = {}
    for entry in entries:
        of_op = ranks.setdefault(entry.case.op, {})
        of_op.setdefault(entry.case.id, len(of_op))

    def key(entry: Entry) -> tuple[bool, bool, int]:
        rank = ranks[entry.case.op][entry.case.id]
        return entry.slow_start, entry.slow_start and entry.mode != BOTH, rank

    return sorted(entries, key=key)


class Runner:
    """Measures entries until a deadline; rows it does not reach say so.

    Args:
        report: where rows go.
        settings: how to measure.
        say: called with each finished row, for progress.
    """

    def __init__(self, report: Report, settings: Settings, say: Callable[[Row], None]):
        self.report, self.settings, self._say = report, settings, say
        self._worker: Worker | None = None
        self.machine: Machine | None = None

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """End the worker, and with it everything it holds on the device."""
        if self._worker is not None and self._worker.alive:
            self._worker.stop()
        self._worker = None

    def ask(self, timeout: float, **request) -> dict:
        """A request to the measuring process (`bench.worker`), which is started where there is
        none."""
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self.settings)
        return self._worker.ask(timeout, **request)

    def measure_machine(self, deadline: float) -> None:
        """The ceilings; without them rows have no percent of roof."""
        try:
            found = self.ask(max(_LEAST, deadline - time.monotonic()), do="machine")
        except WorkerLost as lost:
            print(f"the machine's ceilings were not measured: {lost}", file=sys.stderr)
            return
        self.machine = Machine(**found)
        self.report.machine(self.machine)

    def run(self, entries: list[Entry], deadline: float) -> None:
        """Measure `entries` in this order until `deadline` (of time.monotonic)."""
        for entry in entries:
            left = deadline - time.monotonic()
            if left < _LEAST:
                found = {"status": NOT_RUN, "reason": "the time budget was used up"}
            else:
                found = self._row(entry, left)
            self._say(self.report.update(entry.blank(), found))

    def _row(self, entry: Entry, left: float) -> Row:
        limit = _ROW_LIMIT[entry.slow_start]
        machine = self.machine._asdict() if self.machine else None
        request = {"case": entry.case.id, "mode": entry.mode, "peer": entry.peer}
        try:
            return self.ask(min(limit, left), do="row", machine=machine, **request)
        except WorkerLate as late:
            if left < limit:
                reason = "the time budget was used up while it ran"
                return {"status": NOT_RUN, "reason": reason}
            return {"status": FAILED, "reason": str(late)}
        except WorkerLost as lost:
            return {"status": FAILED, "reason": str(lost)}
