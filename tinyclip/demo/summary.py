"""What the runs say, over seeds: means, and gains of pairs that share a seed."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Gain(NamedTuple):
    """How much better `better` is than `than`, in points of zero-shot accuracy, seed by seed."""

    better: str
    than: str
    points: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.points)


# What each half of the method brings, alone and on top of the other, and both together.
PAIRS = (
    ("affinity", "scratch"),
    ("both", "inherited"),
    ("inherited", "scratch"),
    ("both", "scratch"),
)


def select(rows: Iterable[Row], name: str, noise: float = 0.0) -> list[Row]:
    """The runs of a name by seed; the teacher has no noise."""
    found = [row for row in rows if row["name"] == name and row["noise"] == noise]
    return sorted(found, key=lambda row: row["seed"])


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def mean_curve(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """The mean of curves that have the same steps."""
    columns = zip(*(row["curve"] for row in rows), strict=True)
    return [(column[0][0], statistics.fmean(value for _, value in column)) for column in columns]


def gains(rows: Sequence[Row], noise: float = 0.0) -> list[Gain]:
    """`PAIRS`, seed by seed."""
    found = []
    for better, than in PAIRS:
        pairs = zip(select(rows, better, noise), select(rows, than, noise), strict=True)
        points = tuple(100 * (a["zero_shot_exact"] - b["zero_shot_exact"]) for a, b in pairs)
        found.append(Gain(better, than, points))
    return found


def steps_to_reach(curve: Sequence[tuple[int, float]], score: float) -> int | None:
    """The first step of a curve at or above a score."""
    return next((step for step, value in curve if value >= score), None)


def verdicts(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """The claim, line by line, and whether these runs bear it out."""
    teacher, scratch, both = (select(rows, name) for name in ("teacher", "scratch", "both"))
    taught, alone, distilled = (mean(r, "zero_shot_exact") for r in (teacher, scratch, both))
    size = both[0]["parameters"] / teacher[0]["parameters"]
    gain = 100 * (distilled - alone)
    steps, last = both[0]["steps"], mean_curve(scratch)[-1][1]
    reached = steps_to_reach(mean_curve(both), last)
    found = "not reached" if reached is None else f"reached after {reached} of {steps} steps"
    return [
        (
            taught >= 0.9,
            f"The teacher reads {taught:.1%} of the unseen scenes exactly, choosing"
            " among 1,600 captions.",
        ),
        (
            gain >= 10 and size <= 0.2,
            f"With {size:.1%} of its parameters, a distilled student reads {distilled:.1%}"
            f" after {steps} steps; the same student from scratch {alone:.1%}:"
            f" {gain:+.1f} points.",
        ),
        (
            reached is not None and 2 * reached <= steps,
            f"What the student from scratch reads in the end (validation, {last:.1%}) is {found}.",
        ),
    ]
