"""Where a run is: what a checkpoint holds besides tensors."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class State:
    """Steps and samples done, what was skipped, seconds spent, and each term's first and last."""

    step: int = 0
    samples: int = 0
    skipped_samples: int = 0
    seconds: float = 0.0
    losses: dict[str, list[float]] = field(default_factory=dict)

    def note(self, losses: dict[str, float]) -> None:
        """Remember the values of the terms at this step."""
        for name, value in losses.items():
            self.losses.setdefault(name, [value, value])[1] = value

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Seconds since the last look: training, of which waiting for data; pauses left out."""

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A time in which there was no batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A time that does not count."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def look(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting), and begin anew."""
        now = time.perf_counter()
        seconds, waited = max(now - self._began, 1e-9), self._waited
        self._began, self._waited = now, 0.0
        return seconds, min(waited / seconds, 1.0)
