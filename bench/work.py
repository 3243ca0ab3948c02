"""Exact matrix-product FLOPs and least bytes of every op, forward and backward.

FLOPs count the matrix products alone (2 per multiply-add): elementwise work runs beside them on
other units. Bytes are the traffic no implementation avoids: each input read once, each output
written once, plus the row statistics that a backward without the M x N matrix needs. Recomputation
that keeps memory linear (attention's scores, the contrastive logits) is counted as work, once.
Padding is counted as if it were attended: how much of it there is depends on the data.

Letters: B batch, L tokens, H heads, D head dim, C channels, F hidden, M rows.
"""

import math
from typing import NamedTuple

import torch

from bench.peers.model import macs, model_config, skeleton

_STATISTIC = 4  # row statistics are fp32 whatever the dtype


class Work(NamedTuple):
    """What has to be done: matrix-product FLOPs and bytes through device memory."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Passes(NamedTuple):
    """The work of one forward and of one backward."""

    forward: Work
    backward: Work

    def of(self, mode: str) -> Work:
        """The work of a mode of `bench.case`: the forward alone, or both passes."""
        return self.forward + self.backward if "backward" in mode else self.forward


def attention(s: dict, dtype: torch.dtype) -> Passes:
    """2 products forward, 5 backward (the scores again, dP, dV, dQ, dK)."""
    pairs = s["L"] * (s["L"] + 1) // 2 if s.get("causal") else s["L"] ** 2
    product = 2 * s["B"] * s["H"] * pairs * s["D"]
    unit = s["B"] * s["L"] * s["H"] * s["D"] * dtype.itemsize
    lse = s["B"] * s["H"] * s["L"] * _STATISTIC
    # forward: q, k, v in, out out; backward: q, k, v, out, dout in, dq, dk, dv out
    return Passes(Work(2 * product, 4 * unit + lse), Work(5 * product, 8 * unit + lse))


attention_qkv = sdpa = attention


def gelu_mlp(s: dict, dtype: torch.dtype) -> Passes:
    """2 products forward, 4 backward; the hidden activation itself need not touch memory."""
    product = 2 * s["M"] * s["C"] * s["F"]
    rows, weights = s["M"] * s["C"], 2 * s["C"] * s["F"] + s["F"] + s["C"]
    forward = Work(2 * product, (2 * rows + weights) * dtype.itemsize)
    # backward: x, dy, the weights in; dx, the weights' gradients out
    return Passes(forward, Work(4 * product, (3 * rows + 2 * weights) * dtype.itemsize))


def layer_norm(s: dict, dtype: torch.dtype) -> Passes:
    """No products: x (and residual) in, y (and the sum) out, then the same backwards."""
    unit, statistics = s["M"] * s["C"] * dtype.itemsize, 2 * s["M"] * _STATISTIC
    parameters = 2 * s["C"] * dtype.itemsize
    residual = 1 if s.get("residual") else 0
    forward = Work(0, (2 + 2 * residual) * unit + statistics + parameters)
    # backward: x (or the sum), dy (and the sum's own gradient) in, one dx out for both addends
    return Passes(forward, Work(0, (3 + residual) * unit + statistics + 2 * parameters))


def contrastive_loss(s: dict, dtype: torch.dtype) -> Passes:
    """1 product forward; 3 backward (the logits again, dA, dB); a teacher adds 1 to each."""
    student = 2 * s["B"] ** 2 * s["D"]
    teacher = 2 * s["B"] ** 2 * s["Dt"] if s.get("Dt") else 0
    features = 2 * s["B"] * s["D"] * dtype.itemsize
    targets = 2 * s["B"] * s.get("Dt", 0) * dtype.itemsize
    # m, l (and with a teacher its m, l and u) of every row and column
    statistics = (5 if s.get("Dt") else 2) * 2 * s["B"] * _STATISTIC
    forward = Work(student + teacher, features + targets + statistics)
    return Passes(forward, Work(3 * student + teacher, 2 * features + targets + statistics))


def block(s: dict, dtype: torch.dtype) -> Passes:
    """One pre-norm transformer block: the products of its parts, the traffic of its ends."""
    channels, rows = s["H"] * s["D"], s["B"] * s["L"]
    core = attention(s, dtype)
    mlp = gelu_mlp({"M": rows, "C": channels, "F": s["F"]}, dtype)
    projections = 2 * rows * 4 * channels**2
    parameters = 4 * channels**2 + 4 * channels + 4 * channels + 2 * channels * s["F"]
    parameters = (parameters + s["F"] + channels) * dtype.itemsize
    ends = rows * channels * dtype.itemsize
    return Passes(
        Work(core.forward.flops + mlp.forward.flops + projections, 2 * ends + parameters),
        Work(core.backward.flops + mlp.backward.flops + 2 * projections, 3 * ends + 2 * parameters),
    )


def gemm(s: dict, dtype: torch.dtype) -> Passes:
    """y (M, N) = x (M, K) weight (N, K) transposed."""
    m, n, k = s["M"], s["N"], s["K"]
    traffic = (m * k + n * k + m * n) * dtype.itemsize
    return Passes(Work(2 * m * n * k, traffic), Work(4 * m * n * k, 2 * traffic))


def copy(s: dict, dtype: torch.dtype) -> Passes:
    """N elements read and written."""
    return Passes(Work(0, 2 * s["N"] * dtype.itemsize), Work(0, 2 * s["N"] * dtype.itemsize))


def contrastive_stats(s: dict, dtype: torch.dtype) -> Passes:
    """Pass 1 alone: the loss's forward."""
    return Passes(contrastive_loss(s, dtype).forward, Work(0, 0))


def contrastive_grads(s: dict, dtype: torch.dtype) -> Passes:
    """Pass 2 alone: the loss's backward."""
    return Passes(contrastive_loss(s, dtype).backward, Work(0, 0))


def _towers(model: str, batch: int) -> Work:
    """Both towers' forwards over a batch: the products, and weights and images read once (fp32)."""
    pixels = 3 * math.prod(model_config(model).vision.height_width)
    numbers = sum(p.numel() for p in skeleton(model).parameters()) + batch * pixels
    return Work(2 * batch * sum(macs(model)), 4 * numbers)


def train_step(s: dict, dtype: torch.dtype) -> Passes:
    """Both towers and CLIP's loss; a backward is twice the forward's products."""
    towers = _towers(s["model"], s["B"])
    forward = towers + Work(2 * s["B"] ** 2 * model_config(s["model"]).embed_dim, 0)
    return Passes(forward, Work(2 * forward.flops, 2 * towers.bytes))


def distill_step(s: dict, dtype: torch.dtype) -> Passes:
    """The student's `train_step`, and beside it the teacher's forward and logits."""
    student, teacher = train_step(s, dtype), _towers(s["teacher"], s["B"])
    logits = Work(2 * s["B"] ** 2 * model_config(s["teacher"]).embed_dim, 0)
    return Passes(student.forward + teacher + logits, student.backward)


def encode_image(s: dict, dtype: torch.dtype) -> Passes:
    """The image tower alone, weights in the case's dtype."""
    pixels = 3 * math.prod(model_config(s["model"]).vision.height_width)
    numbers = sum(p.numel() for p in skeleton(s["model"]).visual.parameters()) + s["B"] * pixels
    flops = 2 * s["B"] * macs(s["model"]).image
    return Passes(Work(flops, numbers * dtype.itemsize), Work(0, 0))
