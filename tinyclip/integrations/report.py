"""What `accelerate` did, to be read and to be printed."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from tinyclip import ops
from tinyclip.integrations.swaps.base import Session, Swap


class Replaced(NamedTuple):
    """Modules of one class that were swapped alike."""

    name: str
    count: int
    detail: str
    backend: str
    limit: str | None


class Skipped(NamedTuple):
    """Modules of one class that were left alone for one reason; `first` is where one of them is."""

    name: str
    count: int
    reason: str
    first: str

    def __str__(self) -> str:
        return f"{self.count:>4} x {self.name} ({self.first}): {self.reason}"


class Check(NamedTuple):
    """One input both ways: the worst output's relative error, and our time over the host's."""

    error: float
    time_ratio: float


@dataclass
class Report:
    """What was swapped, what was not and why; ``print(report)`` shows all of it.

    Attributes:
        model: the model's class.
        replaced, skipped: rows of `Replaced` and `Skipped`.
        not_used: backends that cannot serve where the parameters are now, with the reason.
        already: modules that an earlier call had swapped.
        check: `Check`, where an input was given.
    """

    model: str
    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]
    not_used: tuple[str, ...] = ()
    already: int = 0
    check: Check | None = None
    sessions: tuple[Session, ...] = field(default=(), repr=False)

    @property
    def declined(self) -> Counter[tuple[str, str]]:
        """(class, reason) -> how many calls of swapped modules the host's forward computed so far.

        Calls inside a compiled graph are not counted.
        """
        return sum((session.declined for session in self.sessions), Counter())

    def __str__(self) -> str:
        count = sum(row.count for row in self.replaced)
        lines = [f"accelerate: {count} modules of {self.model} compute with tinyclip.ops"]
        if self.already:
            lines[0] += f", {self.already} more since an earlier call"
        for row in self.replaced:
            backend = f" -> {row.backend}" if row.backend else ""
            lines.append(f"  {row.count:>4} x {row.name}: {row.detail}{backend}")
            if row.limit:
                lines.append(f"         {row.limit}")
        lines += [f"       {reason}" for reason in self.not_used]
        if self.skipped:
            lines.append("left as they are:")
        lines += [f"  {row}" for row in self.skipped]
        if self.declined:
            lines.append("calls that the host computed:")
        lines += [
            f"  {calls:>4} x {name}: {reason}" for (name, reason), calls in self.declined.items()
        ]
        if self.check:
            error, ratio = self.check
            lines.append(f"check: worst relative error {error:.1e}, time {ratio:.2f} of before")
        return "\n".join(lines)


def replaced_rows(
    swapped: Iterable[tuple[type[Swap], nn.Module]],
) -> tuple[tuple[Replaced, ...], tuple[str, ...]]:
    """Rows of (swap, module) pairs in the order of the model, equal ones counted; and `not_used`.

    The backend is that of a typical call on the parameters' present device and dtype.
    """
    counted: Counter[tuple] = Counter()
    reasons: dict[str, None] = {}
    for swap, module in swapped:
        backend = ""
        if (example := swap.example(module)) is not None:
            op, arguments, options = example
            explained = ops.explain(op, *arguments, **options)
            backend = explained.backend or "none"
            for name, state, reason in explained.rows:
                if state == "cannot":
                    reasons[f"not {name}: {reason}"] = None
        row = type(module).__name__, swap.detail(module), backend, swap.limit(module)
        counted[row] += 1
    rows = (Replaced(name, count, *rest) for (name, *rest), count in counted.items())
    return tuple(rows), tuple(reasons)


def skipped_rows(left: Iterable[tuple[str, str, str]]) -> tuple[Skipped, ...]:
    """Rows of (path, class, reason), equal ones counted."""
    first: dict[tuple[str, str], str] = {}
    counted: Counter[tuple[str, str]] = Counter()
    for path, name, reason in left:
        counted[name, reason] += 1
        first.setdefault((name, reason), path or "the model itself")
    return tuple(
        Skipped(name, count, reason, first[name, reason])
        for (name, reason), count in counted.items()
    )
