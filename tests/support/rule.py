"""The tolerance rule, one for every op, backend and tier.

Per tensor, outputs and every gradient, Frobenius norm, against fp64:

    error <= 2 max(error of the eager maths, error of PyTorch's fused op, in the same dtype)
             + 2 eps |reference| + 2 eps |cond|

cond is the expression with its cancelling terms added in absolute value: where the truth is zero
because two terms cancel, nobody owes less than the rounding of those terms. In a fuzzed run at most
1 % of the problems may be over the rule, none by more than 8 times.
"""

import math
from dataclasses import dataclass, field

import torch

Results = dict[str, torch.Tensor]


class Ratios(dict):
    """error / bound of each tensor; `notes` name the peers that the bound is without, and why."""

    def __init__(self, found: dict[str, float], notes: tuple[str, ...] = ()):
        super().__init__(found)
        self.notes = notes


def _notes(found: dict[str, float]) -> str:
    return "".join(f" [{note}]" for note in getattr(found, "notes", ()))


def _norm(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def _in_range(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the reference is finite and does not round to infinity in `dtype`."""
    return reference.to(dtype).isfinite()


def _distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    """|x - reference|; infinite where exactly one of the two is finite.

    Where the reference is beyond the range of x's dtype, the infinity that it rounds to is exact.
    """
    dtype, x, reference = x.dtype, x.detach().double(), reference.detach().double()
    if x.shape != reference.shape:
        raise AssertionError(f"shape {tuple(x.shape)}, expected {tuple(reference.shape)}")
    rounded = reference.to(dtype).double()
    finite = reference.isfinite() & ~(rounded.isinf() & (x == rounded))
    if not torch.equal(finite, x.isfinite()):
        return math.inf
    return _norm((x - reference)[finite])


def ratios(
    ours: Results,
    reference: Results,
    peers: list[Results],
    cond: Results,
    roundings: dict[str, float] | None = None,
) -> dict[str, float]:
    """error / bound of each tensor in `ours`; at most 1 obeys the rule.

    The terms of `cond` are rounded in the working dtype, that of the first result; a tuple (cond,
    eps) says otherwise, and `roundings` how often.
    """
    assert ours.keys() == reference.keys(), (ours.keys(), reference.keys())
    found = {}
    work_eps = torch.finfo(ours["out"].dtype).eps
    for name, tensor in ours.items():
        truth = reference[name]
        eps = torch.finfo(tensor.dtype).eps
        terms, cond_eps = cond[name] if isinstance(cond[name], tuple) else (cond[name], work_eps)
        error = _distance(tensor, truth)
        # A peer that overflows where the truth is finite allows nothing.
        distances = [_distance(peer[name], truth) for peer in peers]
        worst_peer = max((d for d in distances if math.isfinite(d)), default=0.0)
        times = (roundings or {}).get(name, 1.0)
        counted = _in_range(truth, tensor.dtype)
        terms = terms[counted] if terms.shape == truth.shape else terms
        bound = 2 * worst_peer + 2 * eps * _norm(truth[counted])
        bound += 2 * cond_eps * times * _norm(terms)
        # Results below the smallest normal number are rounded to its grid, whatever their size.
        bound += torch.finfo(tensor.dtype).smallest_normal * math.sqrt(tensor.numel())
        found[name] = 0.0 if error == 0.0 else error / bound
    return found


@dataclass
class Tally:
    """A fuzzed run: every problem's worst ratio, and the verdict."""

    worst: list[tuple[float, str]] = field(default_factory=list)

    def add(self, label: str, found: dict[str, float]) -> None:
        name, ratio = max(found.items(), key=lambda item: (math.isnan(item[1]), item[1]))
        label = f"{label}: {name}{_notes(found)}"
        self.worst.append((math.inf if math.isnan(ratio) else ratio, label))

    def verdict(self) -> None:
        """Raise AssertionError unless at most 1 % are over the rule and none by over 8 times."""
        over = sorted((item for item in self.worst if item[0] > 1), reverse=True)
        text = "\n".join(f"  {ratio:8.2f}  {label}" for ratio, label in over[:20])
        assert len(over) <= 0.01 * len(self.worst), f"{len(over)} of {len(self.worst)}:\n{text}"
        assert not over or over[0][0] <= 8, text


def assert_rule(found: dict[str, float], label: str = "") -> None:
    """Raise unless every tensor of a single problem obeys the rule."""
    over = {name: round(ratio, 3) for name, ratio in found.items() if not ratio <= 1}
    assert not over, f"{label} over the tolerance rule (error / bound): {over}{_notes(found)}"
