"""LayerNorm of x, or of x + residual, and of the kept channels only; one pass over memory each way.

A program takes a block of rows at a time, each row whole in registers: the sum with the residual,
mean and variance in fp32, the result. Backward, a program walks over a run of rows and keeps its
share of the weight's and the bias' gradient in registers; the shares of the programs, one fp32 row
each, are added up afterwards in one order: no atomics, the same bits every run.

The channel mask is read as it is, channel by channel, and how many are kept is counted where it is
needed: nobody waits for the device to learn a shape. Rows are loaded whole, in 16 bytes a thread,
and masked channels set to 0 in registers: a load under the channel mask is of single elements.

Letters: R rows, C channels.
"""

import torch
import triton
import triton.language as tl

from .launch import Launch

# Elements of a row that a warp holds. Backward keeps twice as many tensors; of the widest rows 512
# spill.
_FWD_WARP, _BWD_WARP, _BWD_WARP_WIDEST = 1024, 512, 256
_FWD_STEPS = 4  # row blocks a program, so that weight, bias and mask are read once for them
_BWD_PROGRAMS = 1024  # as many runs of rows as an H200 holds at once, about


@triton.jit
def _channels(pointer, columns, kept, C, HAS_MASK: tl.constexpr):
    """A parameter's value in each channel, in fp32; 0 where masked, whatever lies there."""
    values = tl.load(pointer + columns, mask=columns < C, other=0.0).to(tl.float32)
    return tl.where(kept, values, 0.0) if HAS_MASK else values


@triton.jit
def _parameters(
    weight_ptr, bias_ptr, mask_ptr, C, BLOCK_C: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The channels' numbers, whether each is kept, 1 / how many are, and weight and bias."""
    columns = tl.arange(0, BLOCK_C)
    kept = columns < C
    if HAS_MASK:
        kept = kept & (tl.load(mask_ptr + columns, mask=kept, other=0) != 0)
    inverse = 1.0 / tl.maximum(tl.sum(kept.to(tl.float32), axis=0), 1.0)
    weight, bias = 1.0, 0.0
    if HAS_WEIGHT:
        weight = _channels(weight_ptr, columns, kept, C, HAS_MASK)[None, :]
    if HAS_BIAS:
        bias = _channels(bias_ptr, columns, kept, C, HAS_MASK)[None, :]
    return columns, kept, inverse, weight, bias


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    stride_x, stride_residual, R, C, eps,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """y, total (R, C) contiguous, mean, rstd (R,); STEPS blocks of ROWS rows a program."""
    columns, kept, inverse, weight, bias = _parameters(
        weight_ptr, bias_ptr, mask_ptr, C, BLOCK_C, HAS_WEIGHT, HAS_BIAS, HAS_MASK
    )
    for step in tl.range(0, STEPS):
        block = tl.cast(tl.program_id(0), tl.int64) * STEPS + step
        rows = block * ROWS + tl.arange(0, ROWS)
        here = (rows < R)[:, None] & (columns < C)[None, :]
        inside = (rows < R)[:, None] & kept[None, :]
        offsets = rows[:, None] * C + columns[None, :]
        if HAS_RESIDUAL:
            x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=here, other=0.0)
            residual_at = residual_ptr + rows[:, None] * stride_residual + columns[None, :]
            residual = tl.load(residual_at, mask=here, other=0.0)
            # What is normalised is the sum as it is returned, rounded.
            total = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + offsets, total, mask=here)
            s = total.to(tl.float32)
            if HAS_MASK:
                s = tl.where(inside, s, 0.0)
        else:
            x_at = x_ptr + rows[:, None] * stride_x + columns[None, :]
            s = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
            if HAS_MASK:
                s = tl.where(inside, s, 0.0)
        mean = tl.sum(s, axis=1) * inverse
        centred = tl.where(inside, s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * inverse + eps)
        y = centred * rstd[:, None] * weight + bias
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=here)
        tl.store(mean_ptr + rows, mean, mask=rows < R)
        tl.store(rstd_ptr + rows, rstd, mask=rows < R)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, total_ptr, mean_ptr, rstd_ptr, weight_ptr, mask_ptr,
    dx_ptr, dweight_ptr, dbias_ptr,
    stride_dy, stride_dtotal, stride_total, R, C, run,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, HAS_DTOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MASK: tl.constexpr, NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
):  # fmt: skip
    """dx (R, C) contiguous; dweight, dbias (programs, C), sums over `run` rows, whole blocks."""
    # In the widest rows there is no room to keep the weight from one row to the next.
    RELOAD: tl.constexpr = HAS_WEIGHT and BLOCK_C > 4096
    KEEP: tl.constexpr = HAS_WEIGHT and BLOCK_C <= 4096
    columns, kept, inverse, weight, _ = _parameters(
        weight_ptr, weight_ptr, mask_ptr, C, BLOCK_C, KEEP, False, HAS_MASK
    )
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    first = tl.cast(tl.program_id(0), tl.int64) * run
    for start in tl.range(0, run, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        in_rows = rows < R
        here = in_rows[:, None] & (columns < C)[None, :]
        inside = in_rows[:, None] & kept[None, :]
        dy_at = dy_ptr + rows[:, None] * stride_dy + columns[None, :]
        dy = tl.load(dy_at, mask=here, other=0.0).to(tl.float32)
        if HAS_MASK:
            dy = tl.where(inside, dy, 0.0)
        if NEED_X or NEED_WEIGHT:
            total_at = total_ptr + rows[:, None] * stride_total + columns[None, :]
            # `normed` drops masked channels anyway. Without a select here 768 channels spill on
            # sm_100, with one the widest rows do: they are loaded under the mask.
            s = tl.load(total_at, mask=inside if RELOAD else here, other=0.0).to(tl.float32)
            if HAS_MASK and not RELOAD:
                s = tl.where(inside, s, 0.0)
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
            normed = tl.where(inside, (s - mean[:, None]) * rstd[:, None], 0.0)
            if NEED_WEIGHT:
                dweight += dy * normed
        if NEED_BIAS:
            dbias += dy
        if NEED_X:
            if RELOAD:
                again = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
                d = dy * again[None, :]
                if HAS_MASK:  # a select of the product takes fewer registers than of the weight
                    d = tl.where(inside, d, 0.0)
            else:
                d = dy * weight
            mean_d = tl.sum(d, axis=1) * inverse
            mean_dn = tl.sum(d * normed, axis=1) * inverse
            dx = (d - mean_d[:, None] - normed * mean_dn[:, None]) * rstd[:, None]
            dx = tl.where(inside, dx, 0.0)
            if HAS_DTOTAL:
                dtotal_at = dtotal_ptr + rows[:, None] * stride_dtotal + columns[None, :]
                dx += tl.load(dtotal_at, mask=here, other=0.0).to(tl.float32)
            offsets = rows[:, None] * C + columns[None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=here)
    sums = tl.cast(tl.program_id(0), tl.int64) * C + columns
    if NEED_WEIGHT:
        tl.store(dweight_ptr + sums, tl.sum(dweight, axis=0), mask=columns < C)
    if NEED_BIAS:
        tl.store(dbias_ptr + sums, tl.sum(dbias, axis=0), mask=columns < C)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """x (R, C) with adjacent channels; its rows may lie anywhere, also all in one place."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _block(c: int, backward: bool) -> tuple[int, int, int]:
    """ROWS, BLOCK_C and warps for C channels."""
    block_c = max(16, triton.next_power_of_2(c))
    per_warp = (_BWD_WARP if block_c <= 4096 else _BWD_WARP_WIDEST) if backward else _FWD_WARP
    return max(1, per_warp // block_c), block_c, max(1, block_c // per_warp)


def _channel_arguments(like, **vectors) -> dict:
    """Pointers of (C,) tensors, any pointer for those that are None, and which there are."""
    arguments = {}
    for name, vector in vectors.items():
        if vector is not None:
            vector = vector.view(torch.uint8) if vector.dtype == torch.bool else vector
            vector = vector.contiguous()
        arguments[f"{name}_ptr"] = like if vector is None else vector
        arguments[f"HAS_{name.upper()}"] = vector is not None
    return arguments


def plan_layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, outputs) -> Launch:
    """The launch that fills outputs: y (R, C), total (R, C) if there is a residual, mean, rstd."""
    r, c = x.shape
    rows, block_c, warps = _block(c, backward=False)
    y, total, mean, rstd = outputs
    arguments = {
        **{"x_ptr": x, "stride_x": x.stride(0), "R": r, "C": c, "eps": float(eps)},
        **{"residual_ptr": x if residual is None else residual},
        **{"stride_residual": 0 if residual is None else residual.stride(0)},
        **{"HAS_RESIDUAL": residual is not None, "total_ptr": y if residual is None else total},
        **_channel_arguments(x, weight=weight, bias=bias, mask=channel_mask),
        **{"y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd},
        **{"ROWS": rows, "STEPS": _FWD_STEPS, "BLOCK_C": block_c},
    }
    return Launch(_layer_norm_fwd_kernel, -(-r // (rows * _FWD_STEPS)), arguments, warps)


def layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, out_dtype):
    """x (R, C) -> y, x + residual (empty without one), mean (R,), rstd (R,)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    x, residual = _rows_of(x), None if residual is None else _rows_of(residual)
    y = x.new_empty(x.shape, dtype=out_dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    outputs = (y, total, mean, rstd)
    plan_layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, outputs).run(x)
    return outputs


def plan_layer_norm_bwd(
    dy, dtotal, total, mean, rstd, weight, channel_mask, outputs, run
) -> Launch:
    """The launch that fills outputs, (dx, dweight, dbias), None what is not wanted.

    dx (R, C); dweight, dbias fp32 (programs, C), sums over runs of `run` rows.
    """
    r, c = total.shape
    rows, block_c, warps = _block(c, backward=True)
    names = ("dx", "dweight", "dbias")
    needs = ("NEED_X", "NEED_WEIGHT", "NEED_BIAS")
    channels = _channel_arguments(total, weight=weight, mask=channel_mask)
    arguments = {
        **{"dy_ptr": dy, "stride_dy": dy.stride(0), "R": r, "C": c, "run": run},
        **{"dtotal_ptr": dy if dtotal is None else dtotal, "HAS_DTOTAL": dtotal is not None},
        **{"stride_dtotal": 0 if dtotal is None else dtotal.stride(0)},
        **{"total_ptr": total, "stride_total": total.stride(0)},
        **{"mean_ptr": mean, "rstd_ptr": rstd, **channels},
        **{f"{n}_ptr": dy if out is None else out for n, out in zip(names, outputs, strict=True)},
        **{need: out is not None for need, out in zip(needs, outputs, strict=True)},
        **{"ROWS": rows, "BLOCK_C": block_c},
    }
    return Launch(_layer_norm_bwd_kernel, -(-r // run), arguments, warps)


def run_of_rows(r: int, c: int) -> int:
    """How many rows a program of backward walks over: whole blocks, for about _BWD_PROGRAMS."""
    rows = _block(c, backward=True)[0]
    return -(-r // (_BWD_PROGRAMS * rows)) * rows


def layer_norm_bwd(dy, dtotal, total, mean, rstd, weight, bias, channel_mask, needs):
    """total (R, C) is what was normalised -> its gradient plus dtotal, dweight, dbias."""
    r, c = total.shape
    run = run_of_rows(r, c)
    dy, total = _rows_of(dy), _rows_of(total)
    dtotal = None if dtotal is None else _rows_of(dtotal)
    dx = total.new_empty(r, c) if needs[0] else None
    dweight, dbias = (
        total.new_empty(-(-r // run), c, dtype=torch.float32) if need else None
        for need in needs[1:]
    )
    if any(needs):
        fixed = (dy, dtotal, total, mean, rstd, weight, channel_mask)
        plan_layer_norm_bwd(*fixed, (dx, dweight, dbias), run).run(total)
    return (
        total.new_empty(0) if dx is None else dx,
        total.new_empty(0) if dweight is None else dweight.sum(dim=0).to(weight.dtype),
        total.new_empty(0) if dbias is None else dbias.sum(dim=0).to(bias.dtype),
    )
