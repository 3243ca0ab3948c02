"""What lies between the GELU-MLP's cuBLAS products, in one kernel each way.

Forward reads `pre` and writes `hidden = act(pre) * gate`. Backward reads `dhidden` and `pre`, and
writes `dpre` (over `dhidden`, where that has its dtype), the recomputed `hidden`, and fp32 sums
over each program's rows for the bias and the gate. Those of the programs are added up afterwards,
in one order: no atomics.

Letters: M rows, N columns (hidden channels).
"""

import triton
import triton.language as tl

from .activations import activate, activate_with_slope
from .launch import Launch

# 256 columns are what a warp reads at once in 16 bit. Backward keeps two sums beside each element,
# so its tiles are half as high. One fp32 sum for 128 rows is 1.5 % of what is read.
FWD_ROWS, BWD_ROWS, BLOCK_N, ROWS_OF_A_SUM, NUM_WARPS = 16, 8, 256, 128, 4


@triton.jit
def _pointwise_fwd_kernel(
    pre_ptr, gate_ptr, hidden_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """hidden = act(pre) * gate, a tile a program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.cast(rows, tl.int64)[:, None] * N + columns[None, :]
    keep = (rows < M)[:, None] & (columns < N)[None, :]
    pre = tl.load(pre_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
    hidden = activate(pre, ACTIVATION)
    if HAS_GATE:
        gate = tl.load(gate_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        hidden = hidden * gate[None, :]
    tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _pointwise_bwd_kernel(
    dhidden_ptr, pre_ptr, gate_ptr, dpre_ptr, hidden_ptr, dbias_ptr, dgate_ptr, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr, NEED_PRE: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_BIAS: tl.constexpr, NEED_GATE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of BLOCK_N columns a program, and the sums over them."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // tiles_n
    columns = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < N
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dgate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    for start in tl.range(0, ROWS, BLOCK_M):
        rows = part * ROWS + start + tl.arange(0, BLOCK_M)
        offsets = tl.cast(rows, tl.int64)[:, None] * N + columns[None, :]
        keep = (rows < M)[:, None] & in_columns[None, :]
        pre = tl.load(pre_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
        hidden, slope = activate_with_slope(pre, ACTIVATION)
        if NEED_GATE:
            dgate += dhidden * hidden
        if HAS_GATE:
            hidden, slope = hidden * gate, slope * gate
        dpre = dhidden * slope
        if NEED_BIAS:
            dbias += dpre
        if NEED_PRE:
            tl.store(dpre_ptr + offsets, dpre.to(dpre_ptr.dtype.element_ty), mask=keep)
        if NEED_HIDDEN:
            tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=keep)
    sums = tl.cast(part, tl.int64) * N + columns
    if NEED_BIAS:
        tl.store(dbias_ptr + sums, tl.sum(dbias, axis=0), mask=in_columns)
    if NEED_GATE:
        tl.store(dgate_ptr + sums, tl.sum(dgate, axis=0), mask=in_columns)


def _shared(pre, gate, activation, rows) -> dict:
    m, n = pre.shape
    return {
        **{"pre_ptr": pre, "M": m, "N": n, "BLOCK_M": rows, "BLOCK_N": BLOCK_N},
        **{"gate_ptr": pre if gate is None else gate.contiguous(), "HAS_GATE": gate is not None},
        "ACTIVATION": activation,
    }


def plan_pointwise_fwd(pre, gate, activation, hidden) -> Launch:
    """The launch that fills hidden (R, F) from pre (R, F), both contiguous."""
    arguments = {**_shared(pre, gate, activation, FWD_ROWS), "hidden_ptr": hidden}
    m, n = pre.shape
    programs = -(-m // FWD_ROWS) * -(-n // BLOCK_N)
    return Launch(_pointwise_fwd_kernel, programs, arguments, NUM_WARPS)


def plan_pointwise_bwd(dhidden, pre, gate, activation, outputs) -> Launch:
    """The launch that fills outputs, (dpre, hidden, dbias, dgate), None what is not wanted.

    dhidden, pre, dpre, hidden (R, F) contiguous, dpre may be dhidden, dhidden may be fp32; dbias,
    dgate fp32 (parts, F), a part ROWS_OF_A_SUM rows.
    """
    names = ("dpre", "hidden", "dbias", "dgate")
    needs = ("NEED_PRE", "NEED_HIDDEN", "NEED_BIAS", "NEED_GATE")
    arguments = {
        **_shared(pre, gate, activation, BWD_ROWS),
        **{"dhidden_ptr": dhidden, "ROWS": ROWS_OF_A_SUM},
        **{f"{n}_ptr": pre if out is None else out for n, out in zip(names, outputs, strict=True)},
        **{need: out is not None for need, out in zip(needs, outputs, strict=True)},
    }
    m, n = pre.shape
    programs = -(-m // ROWS_OF_A_SUM) * -(-n // BLOCK_N)
    return Launch(_pointwise_bwd_kernel, programs, arguments, NUM_WARPS)
