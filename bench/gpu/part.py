"""A part of a GPU run: its plan, and the context it runs in."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.measure import NOT_RUN
from bench.report import Report
from bench.run import Entry, Runner

LEAST = 2.0  # seconds: with less left nothing more is started
UNREACHED = {"status": NOT_RUN, "reason": "the time budget was used up"}


@dataclass(frozen=True)
class Run:
    """Context of a running part.

    ``cases`` is "cuda" or "rehearsal", as in `bench.registry`; ``deadline`` is on the clock of
    time.monotonic.
    """

    written: Report
    runner: Runner
    cases: str
    patterns: list[str]
    deadline: float

    @property
    def device(self) -> str:
        return "cuda" if self.cases == "cuda" else "cpu"

    @property
    def rehearsal(self) -> bool:
        return self.cases == "rehearsal"

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def share(self, part: float) -> float:
        """Deadline of a step that may use the fraction `part` of the time left."""
        return time.monotonic() + part * max(0.0, self.left)

    def step(self, name: str, part: float, run: Callable[[float], dict[str, Any]]) -> dict:
        """Record the result of ``run(deadline)`` under `name`, or skip it if no time is left."""
        if self.left < LEAST:
            return dict(UNREACHED)
        found = run(self.share(part))
        self.written.note(name, found)
        return found

    def measure(self, entries: list[Entry], deadline: float) -> bool:
        """Time rows; True if the gate of one of them was red."""
        self.runner.run(entries, deadline)
        keys = {(e.case.op, e.case.name, e.mode, e.peer) for e in entries}
        return any(
            row["gate"] == "red"
            for row in self.written.of_this_run
            if (row["op"], row["case"], row["mode"], row["peer"]) in keys
        )

    def give_up(self, entries: list[Entry]) -> None:
        """Mark rows as not run because tinyclip cannot be imported."""
        for entry in entries:
            reason = {"status": NOT_RUN, "reason": "tinyclip is not importable"}
            self.written.update(entry.blank(), reason)


class Part(NamedTuple):
    """A named part of the command.

    ``entries(cases, patterns)`` lists its rows, ``notes()`` gives its other results as "not run",
    and ``run(Run)`` runs it and returns True if it found something wrong.
    """

    entries: Callable[[str, list[str]], list[Entry]]
    notes: Callable[[], dict[str, Any]]
    run: Callable[[Run], bool]
