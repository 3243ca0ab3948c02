"""LayerNorm, with the residual addition before it and with masked channels.

Letters: C channels.
"""

import math

import torch
from torch import Tensor

from tinyclip.ops import _checks
from tinyclip.ops._autocast import autocast_dtype
from tinyclip.ops._autograd import applied, first_order, once
from tinyclip.ops._contracts import implementation
from tinyclip.ops._dispatch import (
    Candidate,
    Cannot,
    Op,
    Slower,
    always,
    make_spec,
    register,
    select,
)
from tinyclip.ops._layout import as_rows
from tinyclip.ops._native import rows_why_not
from tinyclip.ops._triton import triton_why_not

# A row lies whole in the registers of a Triton program.
MOST_CHANNELS = 8192


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the channels of ``s = x + residual`` to zero mean and unit variance.

    ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` (Ba et al. 2016), statistics in fp32
    (fp64 for fp64). With a mask the statistics run over the kept channels only, the others give 0:
    TinyCLIP's hidden mask (Wu et al. 2023), with no host synchronisation.

    Args:
        x: (..., C), fp32, bf16, fp16 or fp64, any strides.
        weight: (C,) or None, bias: (C,) or None, any float dtype.
        eps: finite and not negative.
        residual: x's shape, or None.
        channel_mask: bool (C,), True = kept, or None.

    Returns:
        y, or ``(y, x + residual)`` with a residual, both of x's shape. Their dtype is x's (what x
        and residual promote to, if they differ); under autocast y is fp32, as nn.LayerNorm gives.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare(x, weight, bias, eps=eps, residual=residual, channel_mask=channel_mask)
    y, total = select(spec).run(*problem)
    return y if residual is None else (y, total)


def _prepare(x, weight, bias, *, eps=1e-5, residual=None, channel_mask=None):
    op = "layer_norm"
    _checks.tensor(op, "x", x, "(..., C)")
    channels = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias), ("channel_mask", channel_mask)):
        if vector is not None:
            dtypes = (torch.bool,) if name == "channel_mask" else _checks.FLOATS
            _checks.vector(op, name, vector, "(C,)", channels, "x", x, dtypes)
    if residual is not None:
        _checks.tensor(op, "residual", residual, "(..., C)")
        if residual.shape != x.shape:
            raise ValueError(
                f"{op}: residual must have the shape of x {tuple(x.shape)},"
                f" got {tuple(residual.shape)}"
            )
        _checks.same_device(op, "residual", residual, "x", x)
    eps = _checks.number(op, "eps", eps, low=0.0)

    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    lift = autocast_dtype(x.device) is not None and dtype != torch.float64
    out_dtype = torch.float32 if lift else dtype
    flags = () if residual is None else ("residual",)
    flags += () if channel_mask is None else ("channel_mask",)
    spec = make_spec(
        op,
        x,
        (x, weight, bias, residual),
        {"rows": math.prod(x.shape[:-1]), "C": channels},
        flags,
    )
    return spec, (x, residual, weight, bias, channel_mask, eps, out_dtype)


class _LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, channel_mask, eps, out_dtype, backend):
        forward = implementation("layer_norm_fwd", backend)
        y, total, mean, rstd = forward(x, residual, weight, bias, channel_mask, eps, out_dtype)
        normalised = x if residual is None else total
        ctx.save_for_backward(normalised, mean, rstd, weight, bias, channel_mask)
        ctx.backend = backend
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y, (None if residual is None else total)

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, mean, rstd, weight, bias, channel_mask = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
        needs = [need_x or need_residual, need_weight, need_bias]
        if dy is None:
            gradient, dweight, dbias = dtotal, None, None
        else:
            backward = implementation("layer_norm_bwd", ctx.backend)
            gradient, dweight, dbias = backward(
                dy.contiguous(), dtotal, total, mean, rstd, weight, bias, channel_mask, needs
            )
        x_dtype, residual_dtype = ctx.dtypes
        gradients = (
            gradient.to(x_dtype) if need_x and gradient is not None else None,
            gradient.to(residual_dtype) if need_residual and gradient is not None else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
        )
        return first_order((*gradients, *[None] * 4), dy, dtotal, total, weight)


def _triton_why_not(spec):
    if 0 in spec.sizes.values():
        return Cannot("a size is zero")
    if spec.sizes["C"] > MOST_CHANNELS:
        return Cannot(f"channels go to {MOST_CHANNELS}, there are {spec.sizes['C']}")
    return triton_why_not(spec)


# Numbers from which the extension's kernels, about 1.2 times as fast as F.layer_norm and 2 times as
# fast with the addition, make up for the 0.1 ms that Python takes around them, cold.
_WORTH_IT, _WORTH_IT_ADDED = 1 << 21, 1 << 19


def _cpu_why_not(spec):
    verdict = rows_why_not(spec)
    if verdict is None and "channel_mask" not in spec.flags:
        least = _WORTH_IT_ADDED if "residual" in spec.flags else _WORTH_IT
        if spec.sizes["rows"] * spec.sizes["C"] < least:
            return Slower(f"under {least:,} numbers up to 1.7 times as slow as F.layer_norm itself")
    return verdict


def _through(backend):
    def run(x, residual, *rest):
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        y, total = applied(_LayerNormFunction, rows, added, *rest, backend)
        return y.reshape(x.shape), None if residual is None else total.reshape(x.shape)

    return run


_through_torch = _through("torch")
_WIDE = (torch.float32, torch.float64)


def _run_torch(x, residual, weight, bias, channel_mask, eps, out_dtype):
    """F.layer_norm itself where that is the op: on a CPU our own Function costs what a row does."""
    builtin = channel_mask is None and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if builtin and out_dtype in _WIDE and x.numel() > 0:
        for t in (x, residual, weight, bias):
            builtin = builtin and (t is None or t.dtype == out_dtype)
    else:
        builtin = False
    if not builtin:
        return _through_torch(x, residual, weight, bias, channel_mask, eps, out_dtype)
    total = None if residual is None else once(x + residual)
    normalised = x if residual is None else total
    y = once(torch.layer_norm(normalised, x.shape[-1:], weight, bias, eps))
    return y, total


def _example(device):
    def tensor(*shape):
        return torch.empty(*shape, device=device, requires_grad=True)

    return (tensor(100, 768), tensor(768), tensor(768)), {"residual": tensor(100, 768)}


register(
    Op(
        "layer_norm",
        layer_norm,
        _prepare,
        (
            Candidate("triton", _triton_why_not, _through("triton")),
            Candidate("cpu", _cpu_why_not, _through("cpu")),
            Candidate("torch", always, _run_torch),
            Candidate("reference", always, _through("reference")),
        ),
        _example,
    )
)
