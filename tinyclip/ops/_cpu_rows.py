"""The `cpu` backend of LayerNorm and of the MLP: what is done with a row while it is in the cache.

The extension normalises, activates and takes the column sums of a row in one visit; the products of
the MLP are PyTorch's. fp32 and fp64; parameters of another dtype are cast, being small.

Beside a kernel of microseconds every Python call counts: what is plain below is so for that.

Letters: R rows, C channels, F hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip import _extension
from tinyclip.ops import _cpu
from tinyclip.ops._torch import _cast, _skip


def _machine() -> tuple[int, str]:
    return torch.get_num_threads(), _cpu.ISA


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, C) of unit stride, in `dtype`, and copied where rows overlap."""
    x = _cast(x, dtype)
    return x.contiguous() if x.shape[0] > 1 and x.stride(0) < x.shape[1] else x


def _at(rows: Tensor) -> tuple[int, int]:
    """Address and row stride."""
    return rows.data_ptr(), rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else _cast(v, dtype).contiguous()


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, out_dtype):
    """x (R, C) -> y, x + residual (empty without one), mean (R,), rstd (R,)."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    x = _rows(x, dtype)
    total = None
    if residual is not None:
        residual = _rows(residual, dtype)
        total = torch.empty(x.shape, dtype=dtype)
    weight, bias = _vector(weight, dtype), _vector(bias, dtype)
    channel_mask = _vector(channel_mask, torch.bool)
    y = torch.empty(x.shape, dtype=dtype)
    mean, rstd = torch.empty(x.shape[0], dtype=dtype), torch.empty(x.shape[0], dtype=dtype)
    _extension.load().layer_norm_forward(
        _cpu.NAMES[dtype],
        tuple(x.shape),
        _at(x),
        None if residual is None else _at(residual),
        _address(weight),
        _address(bias),
        _address(channel_mask),
        eps,
        y.data_ptr(),
        _address(total),
        mean.data_ptr(),
        rstd.data_ptr(),
        *_machine(),
    )
    return _cast(y, out_dtype), _skip(x) if total is None else total, mean, rstd


def layer_norm_bwd(dy, dtotal, total, mean, rstd, weight, bias, channel_mask, needs):
    """total (R, C) is what was normalised -> its gradient plus dtotal, dweight, dbias."""
    need_x, need_weight, need_bias = needs
    dtype = total.dtype
    dy, total = _rows(dy, dtype), _rows(total, dtype)
    if dtotal is not None:
        dtotal = _cast(dtotal, dtype).contiguous()
    scale, kept = _vector(weight, dtype), _vector(channel_mask, torch.bool)
    dx = torch.empty(total.shape, dtype=dtype) if need_x else None
    dweight = torch.empty(total.shape[1], dtype=dtype) if need_weight else None
    dbias = torch.empty(total.shape[1], dtype=dtype) if need_bias else None
    _extension.load().layer_norm_backward(
        _cpu.NAMES[dtype],
        tuple(total.shape),
        _at(dy),
        None if dtotal is None else _at(dtotal),
        _at(total),
        _address(scale),
        _address(kept),
        mean.data_ptr(),
        rstd.data_ptr(),
        _address(dx),
        _address(dweight),
        _address(dbias),
        *_machine(),
    )
    return (
        dx if need_x else _skip(total),
        _cast(dweight, weight.dtype) if need_weight else _skip(total),
        _cast(dbias, bias.dtype) if need_bias else _skip(total),
    )


def gelu_mlp_fwd(x, w1, b1, w2, b2, gate, activation):
    """x (R, C) -> y (R, C_out), pre (R, F): the pre-activation, saved for backward."""
    pre = F.linear(x, w1, b1)
    gate, hidden = _vector(gate, x.dtype), torch.empty_like(pre)
    _extension.load().activation_forward(
        _cpu.NAMES[x.dtype],
        activation,
        tuple(pre.shape),
        pre.data_ptr(),
        _address(gate),
        hidden.data_ptr(),
        *_machine(),
    )
    return F.linear(hidden, w2, b2), pre


@torch.no_grad()  # backward runs with gradients on under create_graph=True
def gelu_mlp_bwd(dy, x, pre, w1, w2, gate, activation, needs):
    """-> dx, dw1, db1, dw2, db2, dgate. The activation is computed again, beside its slope."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    factor = _vector(gate, x.dtype)
    hidden = torch.empty_like(pre) if need_w2 else None
    db1, dgate = (pre.new_empty(pre.shape[1]) if need else None for need in (need_b1, need_gate))
    problem = (_cpu.NAMES[x.dtype], activation, tuple(pre.shape), pre.data_ptr(), _address(factor))
    dpre = None
    if need_x or need_w1 or need_b1 or need_gate:
        dpre = dy @ w2
        outputs = (_address(t) for t in (dpre, hidden, db1, dgate))
        _extension.load().activation_backward(*problem, *outputs, *_machine())
    elif need_w2:
        _extension.load().activation_forward(*problem, hidden.data_ptr(), *_machine())
    return (
        dpre @ w1 if need_x else _skip(x),
        dpre.T @ x if need_w1 else _skip(x),
        db1 if need_b1 else _skip(x),
        dy.T @ hidden if need_w2 else _skip(x),
        dy.sum(dim=0) if need_b2 else _skip(x),
        _cast(dgate, gate.dtype) if need_gate else _skip(x),
    )
