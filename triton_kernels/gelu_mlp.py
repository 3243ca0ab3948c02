"""GELU-MLP: y = (act(x w1T + b1) * gate) w2T + b2, keeping x and the pre-activation only.

Of the six products of a training step, four are plain and cuBLAS's. The activation follows the
first and precedes the fourth (dhidden = dy w2), and there are two honest ways to have it there:

- ``fused``: our own product with the activation in its epilogue (gelu_mlp_fused.py). `hidden` is
  written without being read again, `dhidden` never reaches memory.
- ``pointwise``: cuBLAS's product, then one kernel over the result (gelu_mlp_pointwise.py). Two more
  passes forward, three more backward.

The first wins where our product runs at more than about 0.7 of cuBLAS's speed (bench/notes.md), so
tables/gelu_mlp.json decides, by architecture, dtype and shape; unmeasured, it says ``pointwise``,
which cannot lose to eager.

Letters: R rows, C channels in, F hidden, C_out channels out.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .gelu_mlp_fused import plan_gelu_mlp_bwd, plan_gelu_mlp_fwd
from .gelu_mlp_pointwise import ROWS_OF_A_SUM, plan_pointwise_bwd, plan_pointwise_fwd
from .launch import time_call
from .tuning import architecture, choose, shipped

IMPLEMENTATIONS = ("fused", "pointwise")


class Tile(NamedTuple):
    """An implementation, and its tile where it has one.

    Tile of rows, of hidden channels and of the sum, rows of tiles that are walked together, warps a
    program, stages of the pipeline, programs on a multiprocessor (0: one program a tile), parts
    that an epilogue is done in, and registers a thread may have (0: as many as it takes).
    """

    implementation: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group: int = 0
    num_warps: int = 0
    num_stages: int = 0
    programs_per_sm: int = 0
    parts: int = 1
    max_registers: int = 0


class Kind(NamedTuple):
    """What a tile is chosen by: "fwd" or "bwd", and the product's rows, sum and hidden channels."""

    kind: str
    arch: int
    bits: int
    rows: int
    k: int
    f: int
    only: str | None

    op = "gelu_mlp"
    choice = Tile

    def fits(self, row: dict) -> bool:
        """Whether a row of the table serves this kind."""
        least = row["at_least"]  # rows, summed channels, hidden channels
        sizes = (self.rows, self.k, self.f)
        implementation = row["tile"][0]
        if self.only is not None:
            return self.related(row) and implementation == self.only
        even = self.k % 8 == 0 and self.f % 8 == 0
        return (
            self.related(row)
            and (least is None or all(a >= b for a, b in zip(sizes, least, strict=True)))
            and (even or implementation == "pointwise")
        )

    def related(self, row: dict) -> bool:
        """Whether the row's tile is worth timing for this kind."""
        return (row["kind"], row["bits"]) == (self.kind, self.bits)

    def bucket(self) -> "Kind":
        """Rows count by their powers of two."""
        return self._replace(rows=1 << (self.rows - 1).bit_length())


_only: str | None = None


@contextmanager
def only(implementation: str):
    """Compute with one of IMPLEMENTATIONS whatever the table says: for tests and measurements."""
    global _only
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"only: implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}"
        )
    before, _only = _only, implementation
    try:
        yield
    finally:
        _only = before


def _chosen(kind: str, a: torch.Tensor, f: int, run) -> Tile:
    """The tile for a (R, K) times (K, F); `run(tile)` computes it, to be timed if tuning is on."""
    key = Kind(kind, architecture(a), a.dtype.itemsize * 8, *a.shape, f, _only)
    if _only is not None:
        return shipped(key)
    return choose(key, lambda tile: time_call(lambda: run(tile), a))


def _up(x, w1, b1, gate, activation, tile):
    """-> pre, hidden (R, F)."""
    if tile.implementation == "pointwise":
        pre = F.linear(x, w1, b1)  # cuBLAS adds the bias in its own epilogue
        hidden = torch.empty_like(pre)
        plan_pointwise_fwd(pre, gate, activation, hidden).run(x)
        return pre, hidden
    pre, hidden = (x.new_empty(x.shape[0], w1.shape[0]) for _ in range(2))
    plan_gelu_mlp_fwd(x, w1, b1, gate, activation, pre, hidden, tile).run(x)
    return pre, hidden


def gelu_mlp_fwd(x, w1, b1, w2, b2, gate, activation):
    """x (R, C) -> y (R, C_out), pre (R, F), in x's dtype."""
    tile = _chosen("fwd", x, w1.shape[0], lambda tile: _up(x, w1, b1, gate, activation, tile))
    pre, hidden = _up(x, w1, b1, gate, activation, tile)
    return F.linear(hidden, w2, b2), pre


def _dhidden(dy, w2, gate):
    """dy w2 (R, F) by cuBLAS; under a gate in fp32 where dy is fp16.

    As the fused kernel has it on chip: it may pass 65504 where its products with the gate and with
    the activation, of which the gradients are made, do not.
    """
    if gate is None or dy.dtype != torch.float16:
        return dy @ w2
    if dy.is_cuda:  # the interpreter's tensors are a CPU's, which has no such product
        return torch.mm(dy, w2, out_dtype=torch.float32)
    return dy.float() @ w2.float()


def _down(dy, pre, w2, gate, activation, needs, tile):
    """-> dpre, hidden (R, F), dbias, dgate (parts, F) fp32; None where not needed."""
    need_pre, need_hidden, need_bias, need_gate = needs
    rows, hidden_channels = pre.shape
    pointwise = tile.implementation == "pointwise"
    part = ROWS_OF_A_SUM if pointwise else tile.block_m
    dhidden = _dhidden(dy, w2, gate) if pointwise else None
    in_place = pointwise and dhidden.dtype == pre.dtype
    dpre = (dhidden if in_place else torch.empty_like(pre)) if need_pre else None
    hidden = torch.empty_like(pre) if need_hidden else None
    sums = (
        pre.new_empty(-(-rows // part), hidden_channels, dtype=torch.float32) if need else None
        for need in (need_bias, need_gate)
    )
    outputs = (dpre, hidden, *sums)
    if pointwise:
        plan_pointwise_bwd(dhidden, pre, gate, activation, outputs).run(pre)
    else:
        plan_gelu_mlp_bwd(dy, w2, pre, gate, activation, outputs, tile).run(pre)
    return outputs


def gelu_mlp_bwd(dy, x, pre, w1, w2, gate, activation, needs):
    """-> dx, dw1, db1, dw2, db2, dgate; empty where `needs` is False."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    dx, dw1, db1, dw2, db2, dgate = (x.new_empty(0) for _ in range(6))
    hidden = None
    if need_x or need_w1 or need_b1 or need_gate:
        wanted = (need_x or need_w1, need_w2, need_b1, need_gate)
        fixed = (dy, pre, w2, gate, activation, wanted)
        tile = _chosen("bwd", dy, pre.shape[1], lambda tile: _down(*fixed, tile))
        dpre, hidden, sums_b1, sums_gate = _down(*fixed, tile)
        if need_x:
            dx = dpre @ w1
        if need_w1:
            dw1 = dpre.T @ x
        if need_b1:
            db1 = sums_b1.sum(dim=0).to(x.dtype)
        if need_gate:
            dgate = sums_gate.sum(dim=0).to(gate.dtype)
    elif need_w2:  # the product is for nothing: the activation alone
        hidden = torch.empty_like(pre)
        plan_pointwise_fwd(pre, gate, activation, hidden).run(pre)
    if need_w2:
        dw2 = dy.T @ hidden
    if need_b2:
        db2 = dy.sum(dim=0)
    return dx, dw1, db1, dw2, db2, dgate
