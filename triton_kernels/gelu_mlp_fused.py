"""The GELU-MLP's two products that an activation follows or precedes, with it in the epilogue.

Forward, `pre = x w1T + b1` is rounded once, kept, and `hidden = act(pre) * gate` leaves with it.
Backward, `dhidden = dy w2` never reaches memory: beside the tile of it lie the tile of `pre`, and
`dpre`, the recomputed `hidden` and one fp32 row of column sums for the bias and the gate leave. The
sums of the row tiles are added up afterwards in one order: no atomics, the same bits every run.

A program walks over tiles, which are numbered such that neighbours share rows and columns in L2.
With as many programs as tiles each walks over one. With as many as fit the chip at once
(`programs_per_sm`), the loads of the next tile overlap the epilogue of the last.

Letters: M rows, N columns of the product (hidden channels), K what is summed over.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from .activations import activate, activate_with_slope
from .launch import Launch, dot_precision


@triton.jit
def _tile_at(number, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows, then to the next column."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = number // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = number % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _product(
    a_ptr, b_ptr, row, column, stride_a, stride_bk, stride_bn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of A B in fp32. A (M, K) has unit stride along K, B (K, N) any strides.

    Where a tile begins is 64 bit, where an element lies in it 32.
    """
    offs_m, offs_n, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_rows, in_columns = offs_m < M - row * BLOCK_M, offs_n < N - column * BLOCK_N
    a_base = a_ptr + tl.cast(row, tl.int64) * BLOCK_M * stride_a
    b_base = b_ptr + tl.cast(column, tl.int64) * BLOCK_N * stride_bn
    a_tile = offs_m[:, None] * stride_a + offs_k[None, :]
    b_tile = offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=NUM_STAGES):
        keep_a, keep_b = in_rows[:, None], in_columns[None, :]
        if not EVEN_K:
            in_k = offs_k < K - step * BLOCK_K
            keep_a, keep_b = keep_a & in_k[None, :], keep_b & in_k[:, None]
        a = tl.load(a_base + step * BLOCK_K + a_tile, mask=keep_a, other=0.0)
        b_step = b_base + tl.cast(step, tl.int64) * BLOCK_K * stride_bk
        b = tl.load(b_step + b_tile, mask=keep_b, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (rows, 2, columns)), (0, 2, 1)))


@triton.jit
def _place(first_row, first_column, M, N, like):
    """Where some columns of a tile lie in an (M, N) result: 64-bit start, 32-bit offsets, masks."""
    offs_m, offs_n = tl.arange(0, like.shape[0]), tl.arange(0, like.shape[1])
    start = tl.cast(first_row, tl.int64) * N + first_column
    in_columns = offs_n < N - first_column
    keep = (offs_m < M - first_row)[:, None] & in_columns[None, :]
    return start, offs_m[:, None] * N + offs_n[None, :], keep, first_column + offs_n, in_columns


@triton.jit
def _finish_fwd(
    acc, bias_ptr, gate_ptr, pre_ptr, hidden_ptr, first_row, first_column, M, N,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue of some columns of a tile, PARTS after one another: registers hold one."""
    if PARTS > 1:
        left, right = _halves(acc)
        _finish_fwd(
            left, bias_ptr, gate_ptr, pre_ptr, hidden_ptr, first_row, first_column, M, N,
            ACTIVATION, HAS_BIAS, HAS_GATE, PARTS // 2,
        )  # fmt: skip
        _finish_fwd(
            right, bias_ptr, gate_ptr, pre_ptr, hidden_ptr, first_row,
            first_column + acc.shape[1] // 2, M, N, ACTIVATION, HAS_BIAS, HAS_GATE, PARTS // 2,
        )  # fmt: skip
    else:
        start, offsets, keep, columns, in_columns = _place(first_row, first_column, M, N, acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        # The activation is of what is kept: backward computes it again from there.
        pre = acc.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + start + offsets, pre, mask=keep)
        hidden = activate(pre.to(tl.float32), ACTIVATION)
        if HAS_GATE:
            gate = tl.load(gate_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
            hidden = hidden * gate[None, :]
        tl.store(hidden_ptr + start + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _gelu_mlp_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, gate_ptr, pre_ptr, hidden_ptr,
    stride_x, stride_wk, stride_wn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """pre = x wT + bias and hidden = act(pre) * gate, both (M, N) and contiguous."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    last = tiles if PERSISTENT else tl.program_id(0) + 1
    for number in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=PERSISTENT):
        row, column = _tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = _product(
            x_ptr, w_ptr, row, column, stride_x, stride_wk, stride_wn, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, NUM_STAGES,
        )  # fmt: skip
        _finish_fwd(
            acc, bias_ptr, gate_ptr, pre_ptr, hidden_ptr, row * BLOCK_M, column * BLOCK_N, M, N,
            ACTIVATION, HAS_BIAS, HAS_GATE, PARTS,
        )  # fmt: skip


@triton.jit
def _finish_bwd(
    dhidden, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr, row, first_row,
    first_column, M, N,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, NEED_PRE: tl.constexpr,
    NEED_HIDDEN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_GATE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The epilogue of some columns of a tile, PARTS after one another: registers hold one."""
    if PARTS > 1:
        left, right = _halves(dhidden)
        _finish_bwd(
            left, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr, row, first_row,
            first_column, M, N, ACTIVATION, HAS_GATE, NEED_PRE, NEED_HIDDEN, NEED_BIAS, NEED_GATE,
            PARTS // 2,
        )  # fmt: skip
        _finish_bwd(
            right, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr, row, first_row,
            first_column + dhidden.shape[1] // 2, M, N, ACTIVATION, HAS_GATE, NEED_PRE,
            NEED_HIDDEN, NEED_BIAS, NEED_GATE, PARTS // 2,
        )  # fmt: skip
    else:
        start, offsets, keep, columns, in_columns = _place(first_row, first_column, M, N, dhidden)
        pre = tl.load(pre_ptr + start + offsets, mask=keep, other=0.0).to(tl.float32)
        hidden, slope = activate_with_slope(pre, ACTIVATION)
        sums = tl.cast(row, tl.int64) * N + columns
        if NEED_GATE:
            # Beyond the rows dhidden is 0, and so is what the row adds to a sum.
            tl.store(dgate_ptr + sums, tl.sum(dhidden * hidden, axis=0), mask=in_columns)
        if HAS_GATE:
            gate = tl.load(gate_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
            hidden, slope = hidden * gate[None, :], slope * gate[None, :]
        dpre = dhidden * slope
        if NEED_BIAS:
            tl.store(dbias_ptr + sums, tl.sum(dpre, axis=0), mask=in_columns)
        if NEED_PRE:
            tl.store(dpre_ptr + start + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=keep)
        if NEED_HIDDEN:
            hidden = hidden.to(hidden_ptr.dtype.element_ty)
            tl.store(hidden_ptr + start + offsets, hidden, mask=keep)


@triton.jit
def _gelu_mlp_bwd_kernel(
    dy_ptr, w_ptr, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr,
    stride_dy, stride_wk, stride_wn, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, NEED_PRE: tl.constexpr,
    NEED_HIDDEN: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_GATE: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
    PERSISTENT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dhidden = dy w on chip; dpre and hidden (M, N), sums over each tile's rows (tiles, N)."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    last = tiles if PERSISTENT else tl.program_id(0) + 1
    for number in tl.range(tl.program_id(0), last, tl.num_programs(0), flatten=PERSISTENT):
        row, column = _tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP)
        dhidden = _product(
            dy_ptr, w_ptr, row, column, stride_dy, stride_wk, stride_wn, M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, NUM_STAGES,
        )  # fmt: skip
        _finish_bwd(
            dhidden, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr, row,
            row * BLOCK_M, column * BLOCK_N, M, N, ACTIVATION, HAS_GATE, NEED_PRE, NEED_HIDDEN,
            NEED_BIAS, NEED_GATE, PARTS,
        )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _near(x: torch.Tensor) -> torch.Tensor:
    """x (rows, columns) of unit stride whose tiles of 256 rows stay inside 32-bit offsets."""
    return x if x.stride(1) == 1 and x.stride(0) < 2**31 // 256 else x.contiguous()


def _product_arguments(a, b, tile) -> tuple[dict, int]:
    """What both kernels are called with for A (M, K) and B (K, N), and the programs to launch."""
    (m, k), n = a.shape, b.shape[1]
    programs = -(-m // tile.block_m) * -(-n // tile.block_n)
    if tile.programs_per_sm:
        at_once = tile.programs_per_sm * (_multiprocessors(a.device) if a.is_cuda else 1)
        programs = min(programs, at_once)
    arguments = {
        **{"M": m, "N": n, "K": k, "stride_wk": b.stride(0), "stride_wn": b.stride(1)},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        **{"GROUP": tile.group, "EVEN_K": k % tile.block_k == 0},
        **{"PRECISION": dot_precision(a.dtype), "NUM_STAGES": tile.num_stages},
        **{"PERSISTENT": tile.programs_per_sm > 0, "PARTS": tile.parts},
    }
    return arguments, programs


def plan_gelu_mlp_fwd(x, w1, b1, gate, activation, pre, hidden, tile) -> Launch:
    """The launch that fills pre and hidden (R, F) from x (R, C) and w1 (F, C)."""
    x, w1 = _near(x), _near(w1)
    arguments, programs = _product_arguments(x, w1.T, tile)
    arguments |= {
        **{"x_ptr": x, "stride_x": x.stride(0), "w_ptr": w1, "pre_ptr": pre, "hidden_ptr": hidden},
        **{"bias_ptr": pre if b1 is None else b1.contiguous(), "HAS_BIAS": b1 is not None},
        **{"gate_ptr": pre if gate is None else gate.contiguous(), "HAS_GATE": gate is not None},
        "ACTIVATION": activation,
    }
    return Launch(
        _gelu_mlp_fwd_kernel, programs, arguments, tile.num_warps, tile.max_registers or None
    )


def plan_gelu_mlp_bwd(dy, w2, pre, gate, activation, outputs, tile) -> Launch:
    """The launch that fills outputs, (dpre, hidden, dbias, dgate), None what is not wanted.

    dy (R, C_out), w2 (C_out, F), dpre and hidden (R, F); dbias, dgate fp32 (tiles of rows, F).
    """
    dy, w2 = _near(dy), _near(w2)
    arguments, programs = _product_arguments(dy, w2, tile)
    names = ("dpre", "hidden", "dbias", "dgate")
    needs = ("NEED_PRE", "NEED_HIDDEN", "NEED_BIAS", "NEED_GATE")
    arguments |= {
        **{"dy_ptr": dy, "stride_dy": dy.stride(0), "w_ptr": w2, "pre_ptr": pre},
        **{"gate_ptr": pre if gate is None else gate.contiguous(), "HAS_GATE": gate is not None},
        **{f"{n}_ptr": pre if out is None else out for n, out in zip(names, outputs, strict=True)},
        **{need: out is not None for need, out in zip(needs, outputs, strict=True)},
        "ACTIVATION": activation,
    }
    return Launch(
        _gelu_mlp_bwd_kernel, programs, arguments, tile.num_warps, tile.max_registers or None
    )
