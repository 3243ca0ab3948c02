"""The contrastive passes on a GPU, panel by panel, whichever kernels form the tiles.

Pass 1: a kernel reduces each tile of a panel to partial statistics, and a second one merges them in
the tiles' order, so that no result depends on timing. Pass 2: a kernel writes dS of a panel, a
square that stays in the second-level cache, and two GEMMs carry it to the gradients. Nothing waits
for the device, so both passes can be captured in a CUDA graph.

Letters: M rows, N columns, D width of the student's features, Dt of the teacher's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tinyclip.ops._ds_unit import ds_unit

STATS_PANEL = 8192  # its partials: 21 MB at most in tiles of 128
GRADS_PANEL_BYTES = 1 << 25  # of dS, in H100's 50 MB of cache; B and dB pass it once a panel
_NO_PULL = 1.7e38  # a maximum that no logit is near: e^(s - m) is 0


class Panel(NamedTuple):
    """A block of S: the features whose cosines it holds, and where its positives are."""

    a: Tensor  # (height, D)
    b: Tensor  # (width, D)
    scale: Tensor
    ta: Tensor | None
    tb: Tensor | None
    t_scale: Tensor | None
    diagonal: int  # the positive of row i is column diagonal + i; outside [0, width) if elsewhere


class Kernels(Protocol):
    """What a backend brings: the two passes over a panel, the (rows, columns) of their tiles, which
    divide 128, and features as they want them; `one_dtype` if the teacher's must be the student's.
    """

    one_dtype: bool

    def tile(self, kind: str, dtype: torch.dtype, teacher: bool) -> tuple[int, int]: ...

    def features(self, x: Tensor) -> Tensor: ...

    def stats(self, panel: Panel, rows, cols, positive, parts, first) -> None: ...

    def grads(self, panel: Panel, rows, cols, weights, alpha, ds, dscale) -> None: ...


def edges(size: int, most: int, tile: int) -> list[tuple[int, int]]:
    """[0, size), size at least 1, in parts of at most `most`, whole tiles each but for the last."""
    parts = -(-size // most)
    step = -(-size // (parts * tile)) * tile
    return [(start, min(start + step, size)) for start in range(0, size, step)]


class StatsMemory(NamedTuple):
    """Partial statistics of a panel's rows, (tiles across, 5 or 2, height), and columns."""

    rows: Tensor
    cols: Tensor

    @classmethod
    def make(cls, m, n, tile, teacher, device) -> "StatsMemory":
        height, width = (min(size, STATS_PANEL) for size in (m, n))
        numbers = 5 if teacher else 2

        def parts(length, across, block):
            shape = (-(-across // block), numbers, length)
            return torch.empty(shape, device=device, dtype=torch.float32)

        return cls(parts(height, width, tile[1]), parts(width, height, tile[0]))


class GradsMemory(NamedTuple):
    """dS of a panel, a number a tile for dscale, and what the GEMMs add to, in fp32."""

    ds: Tensor
    dscale: Tensor
    da: Tensor | None  # of one panel; None where the output itself is fp32
    db: Tensor | None

    @classmethod
    def make(cls, a, b, dtype, tile, needs) -> "GradsMemory":
        side = grads_panel(dtype)
        height, width = (-(-min(x.shape[0], side) // 128) * 128 for x in (a, b))
        tiles = (height // tile[0]) * (width // tile[1])

        def sums(x, rows, needed):
            size = (rows, x.shape[1])
            return torch.empty(size, device=x.device, dtype=torch.float32) if needed else None

        rows = min(a.shape[0], side)
        return cls(
            torch.empty(height, width, device=a.device, dtype=dtype),
            torch.empty(tiles, device=a.device, dtype=torch.float32),
            sums(a, rows, needs[0] and a.dtype != torch.float32),
            sums(b, b.shape[0], needs[1]),
        )


def grads_panel(dtype: torch.dtype) -> int:
    """The side of a panel of dS: 4,096 in 16 bit, 2,816 in fp32."""
    return math.isqrt(GRADS_PANEL_BYTES // dtype.itemsize) // 128 * 128


def workspace_bytes(m, n, d, dt, dtype, kernels: Kernels) -> int:
    """The most that a pass allocates beside inputs and gradients, in bytes; dt None: no teacher."""
    a, b = (torch.empty(size, d, dtype=dtype, device="meta") for size in (m, n))
    teacher = dt is not None
    stats = StatsMemory.make(m, n, kernels.tile("stats", dtype, teacher), teacher, "meta")
    grads = GradsMemory.make(a, b, dtype, kernels.tile("grads", dtype, teacher), (True, True))
    used = [x for x in grads if x is not None and not (x is grads.db and dtype == torch.float32)]
    vectors = 2 * 4 * (m + n)  # the weights of each row and column, and their largest
    return max(sum(x.nbytes for x in stats), sum(x.nbytes for x in used) + vectors)


class _Walk:
    """The panels of a pass, rows outside, with features of one dtype a pair."""

    def __init__(self, kernels, kind, a, b, scale, ta, tb, t_scale, offset):
        dtype = torch.promote_types(a.dtype, b.dtype)
        self.ta = self.tb = None
        if ta is not None:
            t_dtype = torch.promote_types(ta.dtype, tb.dtype)
            if kernels.one_dtype:
                dtype = t_dtype = torch.promote_types(dtype, t_dtype)
            self.ta, self.tb = (kernels.features(x.to(t_dtype)) for x in (ta, tb))
        self.a, self.b = (kernels.features(x.to(dtype)) for x in (a, b))
        self.scale, self.t_scale, self.offset = scale, t_scale, offset
        self.tile = kernels.tile(kind, dtype, ta is not None)

    def panels(self, most: int) -> Iterator[tuple[slice, slice, Panel]]:
        m, n = self.a.shape[0], self.b.shape[0]
        for top, bottom in edges(m, most, self.tile[0]):
            rows = slice(top, bottom)
            a, ta = self.a[rows], None if self.ta is None else self.ta[rows]
            for left, right in edges(n, most, self.tile[1]):
                cols = slice(left, right)
                b, tb = self.b[cols], None if self.tb is None else self.tb[cols]
                diagonal = min(max(self.offset + top - left, top - bottom), right - left)
                panel = Panel(a, b, self.scale, ta, tb, self.t_scale, diagonal)
                yield rows, cols, panel


def contrastive_stats(kernels: Kernels, a, b, scale, ta, tb, t_scale, offset):
    """a (M, D), b (N, D) -> rows (5, M), cols (5, N), positive (M,), in fp32."""
    m, n = a.shape[0], b.shape[0]
    rows, cols, positive = scale.new_zeros(5, m), scale.new_zeros(5, n), scale.new_empty(m)
    if m == 0 or n == 0:
        rows[0] = cols[0] = -math.inf
        return rows, cols, positive
    walk = _Walk(kernels, "stats", a, b, scale, ta, tb, t_scale, offset)
    parts = StatsMemory.make(m, n, walk.tile, ta is not None, a.device)
    for i, j, panel in walk.panels(STATS_PANEL):
        first = (j.start == 0, i.start == 0)
        kernels.stats(panel, rows[:, i], cols[:, j], positive[i], parts, first)
    return rows, cols, positive


@torch.no_grad()  # backward runs with gradients on under create_graph=True
def contrastive_grads(
    kernels: Kernels, a, b, scale, rows, cols, row_weight, col_weight, alpha, ta, tb, t_scale,
    offset, needs,
):  # fmt: skip
    """-> da, db, dscale, from panels that form their logits again."""
    need_a, need_b, need_scale = needs
    m, n = a.shape[0], b.shape[0]
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else a.new_empty(0)
    nothing = (row_weight is None and col_weight is None) or 0 in (m, n)
    if nothing or not any(needs):
        db = torch.zeros_like(b, memory_format=torch.contiguous_format)
        dscale = scale.new_zeros(()) if need_scale else scale.new_empty(0)
        return da.zero_(), db if need_b else b.new_empty(0), dscale
    walk = _Walk(kernels, "grads", a, b, scale, ta, tb, t_scale, offset)
    memory = GradsMemory.make(a, b, walk.a.dtype, walk.tile, needs)
    unit = ds_unit(walk.a.dtype, row_weight, col_weight)
    rows, row_weight = _pull(rows, row_weight, unit)
    cols, col_weight = _pull(cols, col_weight, unit)
    factor = scale * unit
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for i, j, panel in walk.panels(grads_panel(walk.a.dtype)):
        height, width = i.stop - i.start, j.stop - j.start
        tiles = -(-height // walk.tile[0]) * -(-width // walk.tile[1])
        ds, dscale = memory.ds[:height, :width], memory.dscale[:tiles]
        weights = (row_weight[i], col_weight[j])
        kernels.grads(panel, rows[:, i], cols[:, j], weights, alpha, ds, dscale)
        if need_scale:
            total += dscale.sum(dtype=torch.float64)
        if need_a:
            da_panel = da[i] if memory.da is None else memory.da[:height]
            _accumulate(da_panel, ds, panel.b, first=j.start == 0)
            if j.stop == n:
                torch.mul(da_panel, factor, out=da[i])
        if need_b:
            _accumulate(memory.db[j], ds.T, panel.a, first=i.start == 0)
    db = memory.db.mul_(factor).to(b.dtype) if need_b else b.new_empty(0)
    dscale = (total * unit).to(scale.dtype) if need_scale else scale.new_empty(0)
    return da, db, dscale


def _pull(stats: Tensor, weight: Tensor | None, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics and weights of a side, in units; of one that is off, such as pull nowhere."""
    size = stats.shape[1]
    if weight is None:
        none = stats.new_full((5, size), _NO_PULL)
        none[1::2] = 1.0
        return none, stats.new_zeros(size)
    return stats.contiguous(), (weight / unit).expand(size).contiguous()


def _accumulate(into: Tensor, ds: Tensor, features: Tensor, first: bool) -> None:
    """into (+)= ds features, summed in fp32; features may be padded."""
    features, beta = features[:, : into.shape[1]], 0.0 if first else 1.0
    if ds.dtype == into.dtype:
        torch.addmm(into, ds, features, beta=beta, out=into)
    elif into.is_cuda:
        torch.addmm(into, ds, features, out_dtype=into.dtype, beta=beta, out=into)
    else:  # the interpreter's tensors: a CPU has no such product
        torch.addmm(into, ds.to(into.dtype), features.to(into.dtype), beta=beta, out=into)
