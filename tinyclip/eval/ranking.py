"""Recall at k when scores tie: no answer of a model may gain or lose by the order of the data.

What scores the same shares its places: a query's hit is the probability that a right candidate is
among the first k when the tied ones are put in random order. A model that answers alike to
everything gets what guessing gets, a duplicate costs what it should, and the number is the same on
every run, device and block size.

Letters: Q queries, N candidates, D width, K numbers k.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Scores of a block; with their masks about 24 bytes each.
_BLOCK = 1 << 22


def hits(
    queries: Tensor,
    candidates: Tensor,
    query_owner: Tensor,
    candidate_owner: Tensor,
    ks: Sequence[int],
) -> Tensor:
    """Whether each query finds a right candidate among its first k, shared where scores tie.

    Scores are products of rows in fp64, rounded to fp32, so that equal rows score equally wherever
    they stand. They are formed in blocks: memory is O((Q + N) D), never Q x N.

    Args:
        queries: (Q, D), candidates: (N, D), float, on one device.
        query_owner: (Q,), candidate_owner: (N,) int64: a candidate is right where they are equal.
        ks: positive integers.

    Returns:
        (Q, K) fp64 on the CPU, in [0, 1]; 0 for a query without a right candidate.

    Raises:
        ValueError: a feature is not finite, or a k is not positive.
    """
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"recall: k must be a positive integer, got {k!r}")
    for what, features in (("queries", queries), ("candidates", candidates)):
        if not torch.isfinite(features).all():
            rows = (~torch.isfinite(features)).any(1).sum().item()
            raise ValueError(f"recall: {what} must be finite, and {rows} rows are not")
    candidates = candidates.double().T
    rows = max(1, _BLOCK // max(1, candidates.shape[1]))
    found = [torch.zeros(0, len(ks), dtype=torch.float64)]
    for block, owner in _blocks(rows, queries, query_owner):
        scores = (block.double() @ candidates).float()
        found.append(_shared_hits(scores, owner[:, None] == candidate_owner, ks).cpu())
    return torch.cat(found)


def _blocks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, len(tensors[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in tensors)


def _shared_hits(scores: Tensor, right: Tensor, ks: Sequence[int]) -> Tensor:
    """(B, K) from scores and marks (B, N).

    Of the t candidates that score like the best right one, c are right, and g are before all of
    them: k - g places are drawn from t without replacement.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = (scores > best).sum(1)
    tied = scores == best
    wrong = (tied & ~right).sum(1).double()
    tied = tied.sum(1).double()
    columns = []
    for k in ks:
        missed = torch.ones_like(tied)
        for place in range(min(k, scores.shape[1])):
            odds = (wrong - place).clamp_min(0) / (tied - place).clamp_min(1)
            missed = torch.where(place < k - before, missed * odds, missed)
        columns.append(1 - missed)
    return torch.where(right.any(1, keepdim=True), torch.stack(columns, 1), 0.0)
