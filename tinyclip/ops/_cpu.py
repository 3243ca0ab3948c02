"""The `cpu` backend: PyTorch's GEMMs around our C++, tile by tile.

A GEMM leaves a tile of cosines in memory, the extension reads it while it is in the cache: pass 1
reduces it, pass 2 turns it into dS, and two more GEMMs carry that to the gradients. Both passes
form a tile by the same call, so they see the same bits.

Letters: M rows, N columns, D width of the student's features, Dt of the teacher's.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinyclip import _extension

ISA = "best"  # the instruction set; the tests try each

# A tile fills two cores' second-level cache. The GEMMs mind little: measured with 2 MiB, tiles from
# 256 KiB to 16 MiB cost within 5 % of each other.
_TILE_ROWS = 512


def _tile_bytes() -> int:
    extension = _extension.load()
    cache = 0 if extension is None else extension.second_level_cache()
    return 2 * min(max(cache, 1 << 20), 1 << 22)


_TILE_BYTES = _tile_bytes()
NAMES = {torch.float32: "float32", torch.float64: "float64"}


class _Tile(NamedTuple):
    """Where it lies, its cosines (dS, after pass 2), and the features that they are of."""

    extent: tuple[int, int, int, int]  # row, column, height, width
    cosines: Tensor
    teacher: Tensor | None
    a: Tensor  # (height, D), at the working precision
    b: Tensor  # (width, D)


def _edges(size: int, most: int) -> list[tuple[int, int]]:
    """[0, size) in as few parts of at most `most` as there can be, of nearly equal length."""
    parts = -(-size // most)
    return [(size * k // parts, size * (k + 1) // parts) for k in range(parts)]


class _Pass:
    """The tiles of one pass, and what the extension is told about each."""

    def __init__(self, a, b, scale, ta, tb, t_scale, offset):
        self.a, self.b, self.ta, self.tb = a, b, ta, tb
        self.scale = scale.item()
        self.t_scale = None if ta is None else t_scale.item()
        self.shape = (a.shape[0], b.shape[0], offset)
        self.work = scale.dtype
        self.dtype = NAMES[self.work]
        self.row_edges = _edges(a.shape[0], _TILE_ROWS)
        height = max(bottom - top for top, bottom in self.row_edges)
        most_columns = max(1, _TILE_BYTES // (height * scale.itemsize))
        self.column_edges = _edges(b.shape[0], most_columns)
        width = max(right - left for left, right in self.column_edges)
        self.room = height * width
        self.extension = _extension.load()
        self.workspace = _workspace(self.extension, self.dtype, height, width)

    def tiles(self) -> Iterator[_Tile]:
        """A row of tiles after another; each is gone when the next one is asked for."""
        memory = torch.empty(self.room, dtype=self.work)
        teacher_memory = None if self.ta is None else torch.empty_like(memory)
        for top, bottom in self.row_edges:
            a = self.a[top:bottom].to(self.work)
            ta = None if self.ta is None else self.ta[top:bottom].to(self.work)
            for left, right in self.column_edges:
                shape = (bottom - top, right - left)
                b, teacher = self.b[left:right].to(self.work), None
                cosines = memory[: shape[0] * shape[1]].view(shape)
                torch.mm(a, b.T, out=cosines)
                if ta is not None:
                    teacher = teacher_memory[: shape[0] * shape[1]].view(shape)
                    torch.mm(ta, self.tb[left:right].to(self.work).T, out=teacher)
                yield _Tile((top, left, *shape), cosines, teacher, a, b)

    def logits(self, tile: _Tile) -> tuple:
        """Extent, logits, scale and teacher, as the extension takes them."""
        teacher = None
        if tile.teacher is not None:
            teacher = (tile.teacher.data_ptr(), tile.extent[3], self.t_scale)
        return tile.extent, (tile.cosines.data_ptr(), tile.extent[3]), self.scale, teacher

    def machine(self) -> tuple:
        """Workspace, threads and instruction set."""
        return _scratch(self.workspace), torch.get_num_threads(), ISA


def contrastive_stats(a, b, scale, teacher_a, teacher_b, teacher_scale, offset):
    """a (M, D), b (N, D) -> rows (5, M), cols (5, N), positive (M,)."""
    m, n = a.shape[0], b.shape[0]
    rows, cols, positive = scale.new_zeros(5, m), scale.new_zeros(5, n), scale.new_empty(m)
    if m == 0 or n == 0:
        rows[0] = cols[0] = -math.inf
        return rows, cols, positive
    run = _Pass(a, b, scale, teacher_a, teacher_b, teacher_scale, offset)
    kept = (rows.data_ptr(), cols.data_ptr(), positive.data_ptr())
    for tile in run.tiles():
        run.extension.contrastive_stats(
            run.dtype, run.shape, *run.logits(tile), *kept, *run.machine()
        )
    return rows, cols, positive


@torch.no_grad()  # backward runs with gradients on under create_graph=True
def contrastive_grads(
    a, b, scale, rows, cols, row_weight, col_weight, alpha, ta, tb, teacher_scale, offset, needs
):
    """-> da, db, dscale, from the same tiles: each forms its logits again."""
    need_a, need_b, need_scale = needs
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else a.new_empty(0)
    db = torch.zeros(b.shape, dtype=scale.dtype) if need_b else b.new_empty(0)
    dscale = torch.zeros((), dtype=torch.float64)
    nothing = (row_weight is None and col_weight is None) or 0 in (a.shape[0], b.shape[0])
    if nothing or not any(needs):
        da.zero_()
    else:
        run = _Pass(a, b, scale, ta, tb, teacher_scale, offset)
        rows, cols = rows.contiguous(), cols.contiguous()
        row_weight, col_weight = _dense(row_weight), _dense(col_weight)
        kept = (rows.data_ptr(), cols.data_ptr(), _weight(row_weight), _weight(col_weight))
        for tile in run.tiles():
            run.extension.contrastive_grads(
                *(run.dtype, run.shape, *run.logits(tile), alpha, *kept),
                *(dscale.data_ptr(), *run.machine()),
            )
            row, column, height, width = tile.extent
            if need_a:
                if column == 0:
                    da_panel = da[row : row + height]
                    da_panel = da_panel if a.dtype == run.work else torch.empty_like(tile.a)
                _accumulate(da_panel, tile.cosines, tile.b, run.scale, first=column == 0)
                if a.dtype != run.work and column + width == b.shape[0]:
                    da[row : row + height] = da_panel
            if need_b:
                db_panel = db[column : column + width]
                _accumulate(db_panel, tile.cosines.T, tile.a, run.scale, first=row == 0)
    dscale = dscale.to(scale.dtype) if need_scale else scale.new_empty(0)
    return da, db.to(b.dtype), dscale


def contrastive_whole(a, b, scale, teacher_a, teacher_b, teacher_scale, alpha):
    """a and b of as many rows, all in one tile -> the mean loss, its dS (M, M), and its dscale."""
    work, m = scale.dtype, a.shape[0]
    extension, dtype = _extension.load(), NAMES[work]
    ds = torch.mm(a.to(work), b.to(work).T)
    teacher = None
    if teacher_a is not None:
        cosines = torch.mm(teacher_a.to(work), teacher_b.to(work).T)
        teacher = (cosines.data_ptr(), m, teacher_scale.item())
    loss, dscale = torch.empty_like(scale), torch.empty_like(scale)
    workspace = _workspace(extension, dtype, m, m)
    extension.contrastive_whole(
        *(dtype, (0, 0, m, m), (ds.data_ptr(), m), scale.item(), teacher, alpha),
        *(loss.data_ptr(), dscale.data_ptr(), _scratch(workspace), torch.get_num_threads(), ISA),
    )
    return loss, ds, dscale


def _workspace(extension, dtype: str, height: int, width: int) -> Tensor:
    size = extension.contrastive_workspace(dtype, height, width)
    return torch.empty(size, dtype=torch.uint8)


def _scratch(workspace: Tensor) -> tuple[int, int]:
    return workspace.data_ptr(), workspace.numel()


def _accumulate(panel: Tensor, ds: Tensor, features: Tensor, scale: float, first: bool) -> None:
    torch.addmm(panel, ds, features, beta=0.0 if first else 1.0, alpha=scale, out=panel)


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _weight(weight: Tensor | None) -> tuple[int, int] | None:
    """Address, and the stride: 0 for one weight that counts for all."""
    return None if weight is None else (weight.data_ptr(), weight.dim())
