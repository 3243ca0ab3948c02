"""The `torch` backend: PyTorch's own fastest built-ins, in calls that torch.compile understands.

Attention is scaled_dot_product_attention with PyTorch's own autograd. The other ops are pairs of
functions under the same names and signatures as in `reference`: forward saves little, backward
recomputes what is cheap. The contrastive operator walks row chunks, so that no M x N matrix lives.

Letters: B batch, L tokens, H heads, D head dim, C channels, F hidden, M/N rows/columns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.ops._autograd import applied
from tinyclip.ops._ds_unit import ds_unit

# Logits in a chunk: on a CPU, 4 MiB of fp32 stays in the last-level cache; a GPU wants GEMMs that
# fill it, and 128 MiB a buffer is small there.
_CHUNK_LOGITS = {"cpu": 1 << 20}
_CHUNK_LOGITS_DEFAULT = 1 << 25


def _skip(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in `dtype`, itself where it is: torch 2.11 loses gradients behind a `to` of no effect."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _on_cuda(x: Tensor) -> bool:
    """Whether PyTorch's CUDA kernels will read x."""
    return x.is_cuda


_ALIGNMENT = 16  # bytes that SDPA's CUDA kernels load at a time


def aligned(x: Tensor, gradient: bool) -> Tensor:
    """Copy x (..., D) where SDPA's CUDA kernels would misread it, else return x itself.

    They load 16 bytes at a time and do not check that rows start at multiples of 16 bytes: slices
    gave infinities, or "misaligned address", after which the process cannot use the device. Rows of
    a D that is no multiple of 16 bytes cannot all start there, and SDPA provides for such tensors
    if they are contiguous. A `gradient` is also copied where it is expanded (a stride of 0).

    The address is counted from the start of the storage, which allocators align to 256 bytes: the
    fake tensors that torch.compile traces with have no `data_ptr()`.
    """
    step = _ALIGNMENT // x.element_size()
    readable = x.storage_offset() % step == 0
    if x.shape[-1] % step != 0:
        readable = readable and x.is_contiguous()
    else:
        readable = readable and x.stride(-1) == 1
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size > 1 and (stride % step != 0 or (gradient and stride == 0)):
                readable = False
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _readable(x: Tensor, gradient: bool = False) -> Tensor:
    """Return x, or on CUDA an aligned copy where SDPA would misread it (see `aligned`)."""
    if not _on_cuda(x):
        return x
    # Dynamo has no storage_offset(). As an op, `aligned` runs on the fake tensors of AOTAutograd,
    # which have. An input that was aligned when it was traced and is not later is copied by
    # Inductor, which looks at the addresses of its inputs at each call.
    if torch.compiler.is_compiling():
        return torch.ops.tinyclip.aligned(x, gradient)
    return aligned(x, gradient)


class _AlignedGradient(torch.autograd.Function):
    """Identity of (B, H, L, D), whose gradient SDPA's backward can read."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        # (B, L, H, D) in memory, as SDPA's kernels return their outputs.
        return _readable(gradient.transpose(1, 2), gradient=True).transpose(1, 2)


def attention(q, k, v, key_mask, head_gate, causal, scale):
    """q (B, Lq, H, D), k, v (B, Lk, H, D) -> out (B, Lq, H, D), differentiable.

    SDPA reads the transposed views by stride; on CUDA those that it would misread are copied first,
    the upstream gradient too. A mask is built only for a `key_mask`: (B, 1, 1, Lk), or (B, 1, L, L)
    when it meets `causal`, which SDPA does not combine.
    """
    # SDPA's flash kernel takes its maximum before it scales, and 0 * -inf is NaN.
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    mask = sees_nothing = None
    if key_mask is not None:
        hidden = ~key_mask[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        mask = key_mask[:, None, None, :]
        if causal:
            length = q.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        # A row of nothing but -inf is undefined in some of SDPA's kernels: let such a query look
        # everywhere, and drop what it saw, which also cuts its gradients.
        sees_nothing = ~mask.any(dim=-1, keepdim=True)
        mask = mask | sees_nothing
        q = q.masked_fill(sees_nothing.transpose(1, 2), 0)  # 0 * NaN again, in dk
    q, k, v = _readable(q), _readable(k), _readable(v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
    )
    if _on_cuda(out) and out.requires_grad:
        out = applied(_AlignedGradient, out)
    if sees_nothing is not None:
        out = out.masked_fill(sees_nothing, 0)
    out = out.transpose(1, 2)
    if head_gate is not None:
        out = (out * head_gate.reshape(-1, 1, head_gate.shape[-1], 1)).to(q.dtype)
    return out


_GELU_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _quick() -> float:
    """quick_gelu(x) is silu(1.702 x) / 1.702.

    No global: under dynamic=True Dynamo makes a symbol of one, and fails at the second MLP's.
    """
    return 1.702


def _times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """``factor * (x weightT)``, and a bias: the factor costs a product nothing."""
    if factor == 1.0:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.addmm(x.new_empty(()), x, weight.T, beta=0, alpha=factor)
    return torch.addmm(bias, x, weight.T, alpha=factor)


def _pre_activation(kind: str, x: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """What is kept for backward: of QuickGELU, 1.702 of it, unless that could overflow."""
    if kind != "quick_gelu" or x.dtype == torch.float16:
        return F.linear(x, w1, b1)
    if b1 is None:
        return _times(x, w1, None, _quick())
    return torch.addmm(b1, x, w1.T, beta=_quick(), alpha=_quick())


def _activation(kind: str, pre: Tensor) -> tuple[Tensor, float]:
    """The activation, and a factor that is still to come.

    The factors of QuickGELU go where they are cheap: into products, a gate, a gradient of weights.
    """
    if kind in _GELU_APPROXIMATE:
        return F.gelu(pre, approximate=_GELU_APPROXIMATE[kind]), 1.0
    if kind == "quick_gelu":
        if pre.dtype == torch.float16:
            return _cast(_quick_fp16(pre)[0], pre.dtype), 1.0
        return F.silu(pre), 1 / _quick()
    return F.relu(pre), 1.0


def _quick_fp16(x: Tensor) -> tuple[Tensor, Tensor]:
    """QuickGELU and its slope in fp32, of an fp16 x: 1.702 of that could overflow."""
    x = x.float()
    s = torch.sigmoid(_quick() * x)
    return x * s, s + _quick() * x * s * (1 - s)


def _activation_bwd(kind: str, dout: Tensor, x: Tensor) -> Tensor:
    """The gradient but for the factor, in dout's place: fresh pages cost a CPU."""
    if kind == "quick_gelu" and x.dtype == torch.float16:
        return _cast(dout.float() * _quick_fp16(x)[1], x.dtype)
    aten = torch.ops.aten
    if kind in _GELU_APPROXIMATE:
        plain, in_place = aten.gelu_backward, aten.gelu_backward.grad_input
        arguments, options = (dout, x), {"approximate": _GELU_APPROXIMATE[kind]}
    elif kind == "quick_gelu":
        plain, in_place = aten.silu_backward, aten.silu_backward.grad_input
        arguments, options = (dout, x), {}
    else:
        plain, in_place = aten.threshold_backward, aten.threshold_backward.grad_input
        arguments, options = (dout, x, 0), {}
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return plain(*arguments, **options)
    return in_place(*arguments, **options, grad_input=dout)


def _gate(gate: Tensor, factor: float, x: Tensor) -> Tensor:
    """The gate with the factor in it, which is no reason to round it below fp32, or below x."""
    if factor == 1.0:
        return gate
    wide = torch.promote_types(x.dtype, torch.float32)
    return _cast(gate, torch.promote_types(gate.dtype, wide)) * factor


def gelu_mlp_fwd(x, w1, b1, w2, b2, gate, activation):
    """x (R, C) -> y (R, C_out), pre (R, F)."""
    pre = _pre_activation(activation, x, w1, b1)
    hidden, factor = _activation(activation, pre)
    if gate is not None:
        hidden, factor = _cast(hidden * _gate(gate, factor, x), x.dtype), 1.0
    return _times(hidden, w2, b2, factor), pre


def _dhidden(dy: Tensor, w2: Tensor, gate: Tensor | None) -> Tensor:
    """dy w2 (R, F); under a gate in fp32 where dy is fp16.

    It may pass 65504 where its products with the gate and with the activation, of which the
    gradients are made, do not.
    """
    if gate is None or dy.dtype != torch.float16:
        return dy @ w2
    if dy.is_cuda:  # a CPU has no such product
        return torch.mm(dy, w2, out_dtype=torch.float32)
    return dy.float() @ w2.float()


def gelu_mlp_bwd(dy, x, pre, w1, w2, gate, activation, needs):
    """-> dx, dw1, db1, dw2, db2, dgate. The activation is computed again from `pre`."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    dx, dw1, db1, dw2, db2, dgate = (_skip(x) for _ in range(6))
    hidden, factor = _activation(activation, pre)
    if need_b2:
        db2 = dy.sum(dim=0)
    if need_w2 and gate is None:
        dw2 = _times(dy.T, hidden.T, None, factor)
    elif need_w2:
        dw2 = dy.T @ _cast(hidden * _gate(gate, factor, x), x.dtype)
    if need_x or need_w1 or need_b1 or need_gate:
        dhidden = _dhidden(dy, w2, gate)
        if need_gate:
            acc = torch.promote_types(x.dtype, torch.float32)
            dgate = _cast((_cast(dhidden, acc) * hidden).sum(dim=0) * factor, gate.dtype)
        if gate is not None:
            dhidden = _cast(dhidden * gate, x.dtype)
        dpre = _activation_bwd(activation, dhidden, pre)
        if need_x:
            dx = dpre @ w1
        if need_w1:
            dw1 = dpre.T @ x
        if need_b1:
            db1 = dpre.sum(dim=0)
    return dx, dw1, db1, dw2, db2, dgate


def layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, out_dtype):
    """x (R, C) -> y, x + residual (empty without one), mean (R,), rstd (R,)."""
    total = x if residual is None else x + residual
    acc = torch.promote_types(total.dtype, torch.float32)
    if channel_mask is not None:
        y, mean, rstd = _norm_of_kept(_cast(total, acc), weight, bias, channel_mask, eps)
    else:
        work, weight, bias = _norm_arguments(total, weight, bias, lift=total.dtype != out_dtype)
        y, mean, rstd = torch.native_layer_norm(
            _cast(total, work), total.shape[-1:], weight, bias, eps
        )
    mean, rstd = _cast(mean.reshape(-1), acc), _cast(rstd.reshape(-1), acc)
    return _cast(y, out_dtype), _skip(x) if residual is None else total, mean, rstd


def _norm_arguments(total, weight, bias, lift: bool):
    """The dtype to norm in, and parameters such that the built-in keeps its statistics in fp32.

    On a CPU that takes fp32 parameters beside a 16-bit x. Elsewhere all must have one dtype, so
    fp32 parameters lift a 16-bit x.
    """
    acc = torch.promote_types(total.dtype, torch.float32)
    if total.device.type == "cpu" and total.dtype != acc and not lift:
        ones = total.new_ones(total.shape[-1], dtype=acc) if weight is None else _cast(weight, acc)
        return total.dtype, ones, _cast(bias, acc)
    lift = lift or any(p is not None and p.dtype != total.dtype for p in (weight, bias))
    work = acc if lift else total.dtype
    return work, _cast(weight, work), _cast(bias, work)


def _norm_of_kept(s, weight, bias, channel_mask, eps):
    kept = channel_mask.to(s.dtype)
    count = kept.sum().clamp(min=1)
    s = s.masked_fill(~channel_mask, 0)
    mean = s.sum(dim=-1, keepdim=True) / count
    centred = (s - mean) * kept
    rstd = torch.rsqrt(centred.square().sum(dim=-1, keepdim=True) / count + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight.masked_fill(~channel_mask, 0)
    if bias is not None:
        y = y + bias.masked_fill(~channel_mask, 0)
    return y, mean, rstd


def layer_norm_bwd(dy, dtotal, total, mean, rstd, weight, bias, channel_mask, needs):
    """total (R, C) is what was normalised -> its gradient plus dtotal, dweight, dbias."""
    need_x, need_weight, need_bias = needs
    acc = mean.dtype
    if channel_mask is None:
        work, w, b = _norm_arguments(total, weight, bias, lift=dy.dtype != total.dtype)
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            _cast(dy, work),
            _cast(total, work),
            total.shape[-1:],
            mean[:, None],
            rstd[:, None],
            w,
            b,
            [need_x, need_weight, need_bias],
        )
    else:
        kept = channel_mask.to(acc)
        count = kept.sum().clamp(min=1)
        dy = _cast(dy, acc).masked_fill(~channel_mask, 0)
        s = _cast(total, acc).masked_fill(~channel_mask, 0)
        normed = (s - mean[:, None]) * rstd[:, None] * kept
        dweight = (dy * normed).sum(dim=0) if need_weight else None
        dbias = dy.sum(dim=0) if need_bias else None
        dx = None
        if need_x:
            d = dy if weight is None else dy * weight.masked_fill(~channel_mask, 0)
            mean_d = d.sum(dim=-1, keepdim=True) / count
            mean_dn = (d * normed).sum(dim=-1, keepdim=True) / count
            dx = (d - mean_d - normed * mean_dn) * rstd[:, None] * kept
    if need_x and dtotal is not None:
        dx = dx + dtotal
    return (
        _cast(dx, total.dtype) if need_x else _skip(total),
        _cast(dweight, weight.dtype) if need_weight else _skip(total),
        _cast(dbias, bias.dtype) if need_bias else _skip(total),
    )


def _row_chunks(m: int, n: int, device: torch.device):
    """Slices of rows such that a chunk's logits fit the budget of the device."""
    budget = _CHUNK_LOGITS.get(device.type, _CHUNK_LOGITS_DEFAULT)
    rows = max(1, budget // max(1, n))
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def _operand(b: Tensor, a: Tensor, acc: torch.dtype) -> Tensor:
    """b in the dtype in which it is multiplied with a: their own in 16 bit on CUDA, else `acc`.

    Tensor cores multiply 16 bit without rounding and sum in fp32; a CPU gains nothing by it.
    """
    own = torch.promote_types(a.dtype, b.dtype)
    narrow = _on_cuda(a) and own.itemsize == 2 and acc == torch.float32
    return _cast(b, own if narrow else acc)


def _mm(x: Tensor, y: Tensor, acc: torch.dtype) -> Tensor:
    """``x y`` in `acc`, of operands in `acc` or in 16 bit."""
    return x @ y if x.dtype == acc else torch.mm(x, y, out_dtype=acc)


def _addmm_(into: Tensor, x: Tensor, y: Tensor) -> None:
    """``into += x y``, of operands in into's dtype or in 16 bit."""
    if x.dtype == into.dtype:
        into.addmm_(x, y)
    else:
        torch.addmm(into, x, y, out_dtype=into.dtype, out=into)


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    cosines = _mm(_cast(a, b.dtype), b.T, scale.dtype)
    return cosines, cosines * scale


def _chunk_side(s: Tensor, t: Tensor | None, dim: int) -> list[Tensor]:
    """m, l and, with a teacher, m_t, l_t, u of the softmaxes along `dim`."""
    m = s.amax(dim, keepdim=True)
    centred = s - m
    if t is None:
        return [m.squeeze(dim), centred.exp_().sum(dim)]
    m_t = t.amax(dim, keepdim=True)
    weights = (t - m_t).exp_()
    l_t = weights.sum(dim)
    u = weights.mul_(centred).sum(dim)
    return [m.squeeze(dim), centred.exp_().sum(dim), m_t.squeeze(dim), l_t, u]


def _merge(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """The statistics of two sets of logits taken together; u stays centred on the new m."""
    m = torch.maximum(left[0], right[0])
    l = sum(side[1] * torch.exp(side[0] - m) for side in (left, right))  # noqa: E741
    if len(left) == 2:
        return [m, l]
    m_t = torch.maximum(left[2], right[2])
    l_t, u = torch.zeros_like(l), torch.zeros_like(l)
    for side in (left, right):
        weight = torch.exp(side[2] - m_t)
        l_t = l_t + weight * side[3]
        u = u + weight * (side[4] + side[3] * (side[0] - m))
    return [m, l, m_t, l_t, u]


def contrastive_stats(a, b, scale, teacher_a, teacher_b, teacher_scale, offset):
    """a (M, D), b (N, D) -> rows (5, M), cols (5, N), positive (M,), in chunks of rows."""
    m, n = a.shape[0], b.shape[0]
    rows, cols = scale.new_zeros(5, m), scale.new_zeros(5, n)
    positive = scale.new_empty(m)
    if m == 0 or n == 0:
        rows[0] = cols[0] = -math.inf
        return rows, cols, positive
    b = _operand(b, a, scale.dtype)
    if teacher_a is not None:
        teacher_b = _operand(teacher_b, teacher_a, scale.dtype)
    columns = None
    for chunk in _row_chunks(m, n, a.device):
        _, s = _logits(a[chunk], b, scale)
        t = None if teacher_a is None else _logits(teacher_a[chunk], teacher_b, teacher_scale)[1]
        positive[chunk] = s.diagonal(offset + chunk.start)
        side = _chunk_side(s, t, dim=1)
        rows[: len(side), chunk] = torch.stack(side)
        side = _chunk_side(s, t, dim=0)
        columns = side if columns is None else _merge(columns, side)
    cols[: len(columns)] = torch.stack(columns)
    return rows, cols, positive


def _side_gradient(s, t, stats, weight, alpha, positive_at, dim) -> Tensor:
    """weight (P - T) of one side of a chunk; expm1 at the positive keeps P - 1."""
    # Two subtractions: m + log l, added first, would round away what expm1 is there to keep.
    log_p = (s - stats[0].unsqueeze(dim)).sub_(torch.log(stats[1]).unsqueeze(dim))
    at_positive = torch.expm1(log_p.diagonal(positive_at))
    p = log_p.exp_()
    if t is not None:
        log_pt = (t - stats[2].unsqueeze(dim)).sub_(torch.log(stats[3]).unsqueeze(dim))
        at_positive = at_positive - alpha * torch.expm1(log_pt.diagonal(positive_at))
        p = p.sub_(log_pt.exp_(), alpha=alpha)
    p.diagonal(positive_at).copy_(at_positive)
    return p.mul_(weight.unsqueeze(dim) if weight.dim() else weight)


@torch.no_grad()  # backward runs with gradients on under create_graph=True
def contrastive_grads(
    a, b, scale, rows, cols, row_weight, col_weight, alpha, ta, tb, teacher_scale, offset, needs
):
    """-> da, db, dscale, from the same chunks: each forms its logits again.

    Where the features stay in 16 bit, a chunk of dS is rounded to their dtype once, in `ds_unit`s,
    and its products with the features are summed in fp32.
    """
    need_a, need_b, need_scale = needs
    acc = scale.dtype
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_a else _skip(a)
    db = torch.zeros(b.shape, dtype=acc, device=b.device) if need_b else _skip(b)
    dscale = scale.new_zeros(()) if need_scale else _skip(scale)
    if (row_weight is None and col_weight is None) or a.shape[0] == 0:
        return da.zero_(), db.to(b.dtype), dscale
    features = _operand(b, a, acc)
    tb = None if ta is None else _operand(tb, ta, acc)
    unit, factor = None, scale
    if features.dtype != acc:
        unit = ds_unit(features.dtype, row_weight, col_weight)
        row_weight, col_weight = (None if w is None else w / unit for w in (row_weight, col_weight))
        factor = scale * unit
    for chunk in _row_chunks(a.shape[0], b.shape[0], a.device):
        a_chunk = _cast(a[chunk], features.dtype)
        cosines, s = _logits(a_chunk, features, scale)
        t = None if ta is None else _logits(ta[chunk], tb, teacher_scale)[1]
        positive_at = offset + chunk.start
        ds = None
        if row_weight is not None:
            weight = row_weight[chunk] if row_weight.dim() else row_weight
            ds = _side_gradient(s, t, rows[:, chunk], weight, alpha, positive_at, dim=1)
        if col_weight is not None:
            side = _side_gradient(s, t, cols, col_weight, alpha, positive_at, dim=0)
            ds = side if ds is None else ds.add_(side)
        if need_scale:
            dscale += cosines.mul_(ds).sum()
        ds = _cast(ds, features.dtype)
        if need_a:
            da[chunk] = _mm(ds, features, acc).mul_(factor)
        if need_b:
            _addmm_(db, ds.T, a_chunk)
    if unit is not None and need_scale:
        dscale *= unit
    return da, db.mul_(factor).to(b.dtype) if need_b else db, dscale
