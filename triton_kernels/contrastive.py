"""The contrastive operator's two passes over a panel of ``S = scale a bT``, one program a tile.

A program multiplies its tile, and the teacher's, in fp32 and keeps nothing of either: pass 1 leaves
five numbers a row and a column of the tile, which a second kernel merges in the tiles' order; pass
2 leaves dS, whose GEMMs are cuBLAS's. Both form a tile by the same code and the same steps along D,
so S is the same bits.

The five numbers of a row or column (csrc/contrastive/epilogue.h has the same algebra): m = max s,
l = sum e^(s - m), m_t and l_t the same of the teacher's t, and u = sum e^(t - m_t) (s - m).

Letters: M rows, N columns, D width of the student's features, Dt of the teacher's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Launch

# The maximum of no logits: finite, and so that its distance to any logit is finite too.
_LOWEST = tl.constexpr(-1.7e38)
_MERGED = 256  # rows or columns that a program merges


class Tile(NamedTuple):
    """Rows and columns of a tile, the step along D, warps a program, stages of the pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By pass, bits of the features, and whether a teacher takes as many registers again.
TILES = {
    ("stats", 16, False): Tile(128, 128, 64, 8, 3),
    ("stats", 16, True): Tile(128, 64, 64, 8, 3),
    ("stats", 32, False): Tile(64, 64, 32, 4, 3),
    ("stats", 32, True): Tile(64, 32, 32, 4, 3),
    ("grads", 16, False): Tile(128, 64, 64, 8, 3),
    ("grads", 16, True): Tile(64, 64, 64, 8, 3),
    ("grads", 32, False): Tile(64, 64, 32, 4, 3),
    ("grads", 32, True): Tile(64, 32, 32, 8, 3),
}


@triton.jit
def _cosines(
    a_ptr, b_ptr, offs_m, offs_n, height, width, stride_a, stride_b, D,
    BLOCK_K: tl.constexpr, RAGGED_K: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """[M, N] a bT. Rows past the end repeat the last one: what they give is not used."""
    rows_a = a_ptr + tl.minimum(offs_m, height - 1).to(tl.int64)[:, None] * stride_a
    rows_b = b_ptr + tl.minimum(offs_n, width - 1).to(tl.int64)[:, None] * stride_b
    acc = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=NUM_STAGES):
        offs_k = start + tl.arange(0, BLOCK_K)
        if RAGGED_K:
            a = tl.load(rows_a + offs_k[None, :], mask=offs_k[None, :] < D, other=0.0)
            b = tl.load(rows_b + offs_k[None, :], mask=offs_k[None, :] < D, other=0.0)
        else:
            a = tl.load(rows_a + offs_k[None, :])
            b = tl.load(rows_b + offs_k[None, :])
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _reduce(s, t, ptr, stride, at, keep, AXIS: tl.constexpr, TEACHER: tl.constexpr):
    """The statistics of a tile along an axis, to a table of arrays `stride` apart."""
    m = tl.max(s, axis=AXIS)
    centred = s - tl.expand_dims(m, AXIS)
    tl.store(ptr + at, m, mask=keep)
    tl.store(ptr + stride + at, tl.sum(tl.exp(centred), axis=AXIS), mask=keep)
    if TEACHER:
        m_t = tl.max(t, axis=AXIS)
        weight = tl.exp(t - tl.expand_dims(m_t, AXIS))
        tl.store(ptr + 2 * stride + at, m_t, mask=keep)
        tl.store(ptr + 3 * stride + at, tl.sum(weight, axis=AXIS), mask=keep)
        tl.store(ptr + 4 * stride + at, tl.sum(weight * centred, axis=AXIS), mask=keep)


@triton.jit
def _stats_kernel(
    a_ptr, b_ptr, ta_ptr, tb_ptr, scale_ptr, t_scale_ptr, rows_ptr, cols_ptr, positive_ptr,
    stride_a, stride_b, stride_ta, stride_tb, length_rows, length_cols,
    height, width, diagonal, D, Dt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TEACHER: tl.constexpr,
    RAGGED_D: tl.constexpr, RAGGED_DT: tl.constexpr, PRECISION: tl.constexpr,
    T_PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Partial statistics of a tile: tile column j writes rows_ptr[j], tile row i cols_ptr[i]."""
    across = tl.cdiv(width, BLOCK_N)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    offs_m, offs_n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = offs_m < height, offs_n < width
    acc = _cosines(
        a_ptr, b_ptr, offs_m, offs_n, height, width, stride_a, stride_b, D,
        BLOCK_K, RAGGED_D, PRECISION, NUM_STAGES,
    )  # fmt: skip
    s = acc * tl.load(scale_ptr)
    first = i * BLOCK_M + diagonal
    if (first < j * BLOCK_N + BLOCK_N) & (first + BLOCK_M > j * BLOCK_N):
        wanted = offs_m + diagonal
        hit = offs_n[None, :] == wanted[:, None]
        here = in_rows & (wanted >= j * BLOCK_N) & (wanted < tl.minimum(width, (j + 1) * BLOCK_N))
        tl.store(positive_ptr + offs_m, tl.sum(tl.where(hit, s, 0.0), axis=1), mask=here)
    real = in_rows[:, None] & in_cols[None, :]
    s = tl.where(real, s, _LOWEST)
    t = s
    if TEACHER:
        acc_t = _cosines(
            ta_ptr, tb_ptr, offs_m, offs_n, height, width, stride_ta, stride_tb, Dt,
            BLOCK_K, RAGGED_DT, T_PRECISION, NUM_STAGES,
        )  # fmt: skip
        t = tl.where(real, acc_t * tl.load(t_scale_ptr), _LOWEST)
    numbers = 5 if TEACHER else 2
    row_part = rows_ptr + j.to(tl.int64) * numbers * length_rows
    col_part = cols_ptr + i.to(tl.int64) * numbers * length_cols
    _reduce(s, t, row_part, length_rows, offs_m, in_rows, 1, TEACHER)
    _reduce(s, t, col_part, length_cols, offs_n, in_cols, 0, TEACHER)


@triton.jit
def _merge_kernel(
    parts_ptr, into_ptr, length, stride_into, size, parts,
    FIRST: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold parts 0, 1, ... into the running statistics, of which there are none yet if FIRST."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    m = tl.full([BLOCK], _LOWEST, tl.float32)
    m_t = tl.full([BLOCK], _LOWEST, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)  # noqa: E741
    l_t, u = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    stride = tl.cast(stride_into, tl.int64)
    if not FIRST:
        m = tl.load(into_ptr + at, mask=keep, other=0.0)
        l = tl.load(into_ptr + stride + at, mask=keep, other=0.0)  # noqa: E741
        if TEACHER:
            m_t = tl.load(into_ptr + 2 * stride + at, mask=keep, other=0.0)
            l_t = tl.load(into_ptr + 3 * stride + at, mask=keep, other=0.0)
            u = tl.load(into_ptr + 4 * stride + at, mask=keep, other=0.0)
    numbers = 5 if TEACHER else 2
    for part in range(0, parts):
        ptr = parts_ptr + tl.cast(part * numbers, tl.int64) * length + at
        m2 = tl.load(ptr, mask=keep, other=0.0)
        l2 = tl.load(ptr + length, mask=keep, other=0.0)
        larger = tl.maximum(m, m2)
        if TEACHER:
            m2_t = tl.load(ptr + 2 * length, mask=keep, other=0.0)
            l2_t = tl.load(ptr + 3 * length, mask=keep, other=0.0)
            u2 = tl.load(ptr + 4 * length, mask=keep, other=0.0)
            larger_t = tl.maximum(m_t, m2_t)
            ours, theirs = tl.exp(m_t - larger_t), tl.exp(m2_t - larger_t)
            u = ours * (u + l_t * (m - larger)) + theirs * (u2 + l2_t * (m2 - larger))
            l_t, m_t = ours * l_t + theirs * l2_t, larger_t
        l = tl.exp(m - larger) * l + tl.exp(m2 - larger) * l2  # noqa: E741
        m = larger
    tl.store(into_ptr + at, m, mask=keep)
    tl.store(into_ptr + stride + at, l, mask=keep)
    if TEACHER:
        tl.store(into_ptr + 2 * stride + at, m_t, mask=keep)
        tl.store(into_ptr + 3 * stride + at, l_t, mask=keep)
        tl.store(into_ptr + 4 * stride + at, u, mask=keep)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, to about an ulp: Taylor's series where the difference would cancel."""
    y = tl.maximum(x, -0.5)
    near = 1.0 / 362880
    near = near * y + 1.0 / 40320
    near = near * y + 1.0 / 5040
    near = near * y + 1.0 / 720
    near = near * y + 1.0 / 120
    near = near * y + 1.0 / 24
    near = near * y + 1.0 / 6
    near = near * y + 0.5
    near = near * y + 1.0
    return tl.where(x > -0.5, near * y, tl.exp(x) - 1.0)


@triton.jit
def _pull(s, t, stats_ptr, stride, weight_ptr, at, keep, alpha, AXIS: tl.constexpr,
          TEACHER: tl.constexpr):  # fmt: skip
    """[M, N] w (P - alpha P_t): how a side pulls on its logits away from the positive."""
    stride = tl.cast(stride, tl.int64)
    w = tl.load(weight_ptr + at, mask=keep, other=0.0)
    m = tl.load(stats_ptr + at, mask=keep, other=1e38)
    per_exp = w / tl.load(stats_ptr + stride + at, mask=keep, other=1.0)
    ds = tl.expand_dims(per_exp, AXIS) * tl.exp(s - tl.expand_dims(m, AXIS))
    if TEACHER:
        m_t = tl.load(stats_ptr + 2 * stride + at, mask=keep, other=1e38)
        per_exp_t = alpha * (w / tl.load(stats_ptr + 3 * stride + at, mask=keep, other=1.0))
        ds -= tl.expand_dims(per_exp_t, AXIS) * tl.exp(t - tl.expand_dims(m_t, AXIS))
    return ds


@triton.jit
def _pull_at_positive(s, t, stats_ptr, stride, weight_ptr, at, keep, alpha, TEACHER: tl.constexpr):
    """[M] w ((P - 1) - alpha (P_t - 1)), where expm1 keeps what is left of 1 - P."""
    stride = tl.cast(stride, tl.int64)
    w = tl.load(weight_ptr + at, mask=keep, other=0.0)
    m = tl.load(stats_ptr + at, mask=keep, other=1e38)
    l = tl.load(stats_ptr + stride + at, mask=keep, other=1.0)  # noqa: E741
    ds = (w / l) * (_expm1(s - m) + (1.0 - l))
    if TEACHER:
        m_t = tl.load(stats_ptr + 2 * stride + at, mask=keep, other=0.0)
        l_t = tl.load(stats_ptr + 3 * stride + at, mask=keep, other=1.0)
        ds -= alpha * (w / l_t) * (_expm1(t - m_t) + (1.0 - l_t))
    return ds


@triton.jit
def _grads_kernel(
    a_ptr, b_ptr, ta_ptr, tb_ptr, scale_ptr, t_scale_ptr, rows_ptr, cols_ptr, rw_ptr, cw_ptr,
    ds_ptr, dscale_ptr, stride_a, stride_b, stride_ta, stride_tb, stride_rows, stride_cols,
    stride_ds, height, width, diagonal, D, Dt, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TEACHER: tl.constexpr,
    RAGGED_D: tl.constexpr, RAGGED_DT: tl.constexpr, PRECISION: tl.constexpr,
    T_PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dS of a tile, and its sum of dS * cosine."""
    across = tl.cdiv(width, BLOCK_N)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    offs_m, offs_n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = offs_m < height, offs_n < width
    acc = _cosines(
        a_ptr, b_ptr, offs_m, offs_n, height, width, stride_a, stride_b, D,
        BLOCK_K, RAGGED_D, PRECISION, NUM_STAGES,
    )  # fmt: skip
    s = acc * tl.load(scale_ptr)
    t = s
    if TEACHER:
        acc_t = _cosines(
            ta_ptr, tb_ptr, offs_m, offs_n, height, width, stride_ta, stride_tb, Dt,
            BLOCK_K, RAGGED_DT, T_PRECISION, NUM_STAGES,
        )  # fmt: skip
        t = acc_t * tl.load(t_scale_ptr)
    ds = _pull(s, t, rows_ptr, stride_rows, rw_ptr, offs_m, in_rows, alpha, 1, TEACHER)
    ds += _pull(s, t, cols_ptr, stride_cols, cw_ptr, offs_n, in_cols, alpha, 0, TEACHER)
    first = i * BLOCK_M + diagonal
    if (first < j * BLOCK_N + BLOCK_N) & (first + BLOCK_M > j * BLOCK_N):
        wanted = offs_m + diagonal
        hit = offs_n[None, :] == wanted[:, None]
        here = in_rows & (wanted >= j * BLOCK_N) & (wanted < tl.minimum(width, (j + 1) * BLOCK_N))
        s_hit = tl.sum(tl.where(hit, s, 0.0), axis=1)
        t_hit = tl.sum(tl.where(hit, t, 0.0), axis=1)
        at_hit = _pull_at_positive(
            s_hit, t_hit, rows_ptr, stride_rows, rw_ptr, offs_m, here, alpha, TEACHER
        )
        at_hit += _pull_at_positive(
            s_hit, t_hit, cols_ptr, stride_cols, cw_ptr, wanted, here, alpha, TEACHER
        )
        ds = tl.where(hit, at_hit[:, None], ds)
    real = in_rows[:, None] & in_cols[None, :]
    pointers = ds_ptr + offs_m.to(tl.int64)[:, None] * stride_ds + offs_n[None, :]
    tl.store(pointers, ds.to(ds_ptr.dtype.element_ty), mask=real)
    dscale = tl.sum(tl.sum(tl.where(real, ds * acc, 0.0), axis=1), axis=0)
    tl.store(dscale_ptr + tl.program_id(0), dscale)


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 products whole, in three of TF32's, unless told otherwise."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile_of(kind: str, dtype: torch.dtype, teacher: bool) -> Tile:
    """The tile of a pass, "stats" or "grads"."""
    return TILES[kind, dtype.itemsize * 8, teacher]


def _shared(panel, tile: Tile) -> dict:
    """What both passes are told about a panel."""
    a, b, scale, ta, tb, t_scale, diagonal = panel
    teacher = ta is not None
    if not teacher:
        ta, tb, t_scale = a, b, scale
    return {
        **{"a_ptr": a, "b_ptr": b, "ta_ptr": ta, "tb_ptr": tb},
        **{"scale_ptr": scale, "t_scale_ptr": t_scale},
        **{"stride_a": a.stride(0), "stride_b": b.stride(0)},
        **{"stride_ta": ta.stride(0), "stride_tb": tb.stride(0)},
        **{"height": a.shape[0], "width": b.shape[0], "diagonal": diagonal},
        **{"D": a.shape[1], "Dt": ta.shape[1], "TEACHER": teacher},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        **{"RAGGED_D": a.shape[1] % tile.block_k != 0, "PRECISION": precision(a.dtype)},
        **{"RAGGED_DT": ta.shape[1] % tile.block_k != 0, "T_PRECISION": precision(ta.dtype)},
        "NUM_STAGES": tile.num_stages,
    }


def _tiles(panel, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(len(panel.a), tile.block_m), triton.cdiv(len(panel.b), tile.block_n)


def plan_stats(panel, rows, cols, positive, parts, first, tile: Tile) -> list[Launch]:
    """The launches that reduce a panel and fold it into rows (5, height) and cols (5, width).

    `parts.rows` (tiles across, 5 or 2, length) and `parts.cols` are scratch; `first` tells of rows
    and of columns whether the panel is the first that they meet.
    """
    down, across = _tiles(panel, tile)
    teacher = panel.ta is not None
    arguments = {
        **_shared(panel, tile),
        **{"rows_ptr": parts.rows, "cols_ptr": parts.cols, "positive_ptr": positive},
        **{"length_rows": parts.rows.shape[2], "length_cols": parts.cols.shape[2]},
    }
    launches = [Launch(_stats_kernel, down * across, arguments, tile.num_warps, fma=False)]
    sides = ((parts.rows, rows, across, first[0]), (parts.cols, cols, down, first[1]))
    for scratch, into, count, fresh in sides:
        arguments = {
            **{"parts_ptr": scratch, "into_ptr": into, "length": scratch.shape[2]},
            **{"stride_into": into.stride(0), "size": into.shape[1], "parts": count},
            **{"FIRST": fresh, "TEACHER": teacher, "BLOCK": _MERGED},
        }
        launches.append(Launch(_merge_kernel, triton.cdiv(into.shape[1], _MERGED), arguments, 4))
    return launches


def plan_grads(panel, rows, cols, weights, alpha, ds, dscale, tile: Tile) -> Launch:
    """The launch that writes ds (height, width) of a panel, and dscale, a number a tile."""
    down, across = _tiles(panel, tile)
    arguments = {
        **_shared(panel, tile),
        **{"rows_ptr": rows, "cols_ptr": cols, "rw_ptr": weights[0], "cw_ptr": weights[1]},
        **{"ds_ptr": ds, "dscale_ptr": dscale, "stride_ds": ds.stride(0), "alpha": float(alpha)},
        **{"stride_rows": rows.stride(0), "stride_cols": cols.stride(0)},
    }
    return Launch(_grads_kernel, down * across, arguments, tile.num_warps, fma=False)


def stats(panel, rows, cols, positive, parts, first) -> None:
    """Run `plan_stats`."""
    tile = tile_of("stats", panel.a.dtype, panel.ta is not None)
    for launch in plan_stats(panel, rows, cols, positive, parts, first, tile):
        launch.run(panel.a)


def grads(panel, rows, cols, weights, alpha, ds, dscale) -> None:
    """Run `plan_grads`."""
    tile = tile_of("grads", panel.a.dtype, panel.ta is not None)
    plan_grads(panel, rows, cols, weights, alpha, ds, dscale, tile).run(panel.a)
