"""The maths of every op, written plainly: any device, any float dtype, no attention to speed.

This is the oracle: run on fp64 copies, it is what every other backend is compared with; run in
a low precision, it is the eager maths whose error the tolerance rule allows twice. Gradients
are written out, so that a kernel's author finds each formula here, and gradcheck proves them.

Letters: B batch, L tokens, H heads, D head dim, C channels, F hidden, M/N rows/columns of the
similarity matrix. A gradient that `needs` does not ask for is returned empty.
"""

import math

import torch
from torch import Tensor


def _skip(like: Tensor) -> Tensor:
    return like.new_empty(0)


# Attention: out = softmax(scale q kT) v per head, times the head's gate.


def _visible(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    """(B, 1, Lq, Lk), True where a query may attend."""
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    visible = visible[None, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _hide(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zeros where no query looks, so that whatever lies there (NaN) cannot leak through 0 * x."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, :, None, None], 0)


def _scores_and_probabilities(q, k, key_mask, causal, scale) -> tuple[Tensor, Tensor]:
    visible = _visible(q, k, key_mask, causal)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    scores = scores.masked_fill(~visible, -math.inf)
    probabilities = torch.softmax(scores, dim=-1)
    sees_nothing = ~visible.any(dim=-1, keepdim=True)
    return scores, probabilities.masked_fill(sees_nothing, 0)


def _blind(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    """(B or 1, Lq, 1, 1), True where a query sees no key; what it and its gradient hold is void."""
    return ~_visible(q, k, key_mask, causal).any(dim=-1).transpose(1, 2)[..., None]


def _per_head(gate: Tensor) -> Tensor:
    """(H,) or (B, H) as (1, H, 1) or (B, 1, H, 1), to multiply (B, L, H, D)."""
    return gate[..., None, :, None]


def attention_fwd(q, k, v, key_mask, head_gate, causal, scale):
    """-> out (B, Lq, H, D), stats (2, B, H, Lq): each softmax's maximum and sum."""
    k, v = _hide(k, key_mask), _hide(v, key_mask)
    scores, p = _scores_and_probabilities(q, k, key_mask, causal, scale)
    out = torch.einsum("bhlm,bmhd->blhd", p, v)
    if head_gate is not None:
        out = (out * _per_head(head_gate)).to(q.dtype)
    work = scores.to(torch.promote_types(q.dtype, torch.float32))
    stats = work.new_zeros(2, *work.shape[:-1])
    stats[0] = work.amax(dim=-1) if k.shape[1] else -math.inf
    stats[1] = torch.exp(work - stats[0].clamp(min=torch.finfo(work.dtype).min)[..., None]).sum(-1)
    return out.contiguous(), stats


def attention_bwd(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs):
    """-> dq, dk, dv, dhead_gate."""
    need_q, need_k, need_v, need_gate = needs
    k, v = _hide(k, key_mask), _hide(v, key_mask)
    blind = _blind(q, k, key_mask, causal)
    q, dout = q.masked_fill(blind, 0), dout.masked_fill(blind, 0)
    _, p = _scores_and_probabilities(q, k, key_mask, causal, scale)
    dq, dk, dv, dgate = (_skip(q) for _ in range(4))
    if need_gate:
        ungated = torch.einsum("bhlm,bmhd->blhd", p, v)
        dgate = (dout * ungated).sum(dim=(1, 3))  # (B, H)
        dgate = (dgate if head_gate.dim() == 2 else dgate.sum(dim=0)).to(head_gate.dtype)
    if head_gate is not None:
        dout = (dout * _per_head(head_gate)).to(q.dtype)
    if need_v:
        dv = _hide(torch.einsum("bhlm,blhd->bmhd", p, dout), key_mask).contiguous()
    if need_q or need_k:
        dp = torch.einsum("blhd,bmhd->bhlm", dout, v)
        delta = (dp * p).sum(dim=-1, keepdim=True)
        ds = p * (dp - delta) * scale
        if need_q:
            dq = torch.einsum("bhlm,bmhd->blhd", ds, k).contiguous()
        if need_k:
            dk = _hide(torch.einsum("bhlm,blhd->bmhd", ds, q), key_mask).contiguous()
    return dq, dk, dv, dgate


def attention_qkv_bwd(dout, qkv, out, stats, key_mask, head_gate, causal, scale, needs):
    """-> dqkv (B, L, 3, H, D), dhead_gate."""
    q, k, v = qkv.unbind(2)
    need_qkv, need_gate = needs
    dq, dk, dv, dgate = attention_bwd(
        dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, [need_qkv] * 3 + [need_gate]
    )
    return torch.stack([dq, dk, dv], dim=2) if need_qkv else dq, dgate


# GELU-MLP: y = (act(x W1T + b1) * gate) W2T + b2.


def _activation(kind: str, x: Tensor) -> Tensor:
    if kind == "gelu":
        return x * (0.5 * torch.erfc(-x * math.sqrt(0.5)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return x.clamp(min=0)


def _activation_slope(kind: str, x: Tensor) -> Tensor:
    if kind == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density
    if kind == "gelu_tanh":
        slope = math.sqrt(2 / math.pi)
        t = torch.tanh(slope * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * 0.044715 * x * x)
    if kind == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return s + x * s * (1.702 * (1 - s))
    return (x > 0).to(x.dtype)


def gelu_mlp_fwd(x, w1, b1, w2, b2, gate, activation):
    """x (R, C) -> y (R, C_out), pre (R, F): the pre-activation, saved for backward."""
    pre = x @ w1.T
    if b1 is not None:
        pre = pre + b1
    hidden = _activation(activation, pre)
    if gate is not None:
        hidden = (hidden * gate).to(x.dtype)
    y = hidden @ w2.T
    return y if b2 is None else y + b2, pre


def gelu_mlp_bwd(dy, x, pre, w1, w2, gate, activation, needs):
    """-> dx, dw1, db1, dw2, db2, dgate."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    dx, dw1, db1, dw2, db2, dgate = (_skip(x) for _ in range(6))
    if need_b2:
        db2 = dy.sum(dim=0)
    if need_w2:
        hidden = _activation(activation, pre)
        hidden = hidden if gate is None else (hidden * gate).to(x.dtype)
        dw2 = dy.T @ hidden
    if need_x or need_w1 or need_b1 or need_gate:
        dhidden = dy @ w2
        if need_gate:
            dgate = (dhidden * _activation(activation, pre)).sum(dim=0).to(gate.dtype)
        if gate is not None:
            dhidden = (dhidden * gate).to(x.dtype)
        dpre = dhidden * _activation_slope(activation, pre)
        if need_x:
            dx = dpre @ w1
        if need_w1:
            dw1 = dpre.T @ x
        if need_b1:
            db1 = dpre.sum(dim=0)
    return dx, dw1, db1, dw2, db2, dgate


# LayerNorm: y = (s - mean) rstd w + b with s = x + residual, over the kept channels only.


def _kept(s: Tensor, channel_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """s at the working precision with zeros where masked, the mask, and how many are kept."""
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if channel_mask is None:
        channel_mask = torch.ones(s.shape[-1], dtype=torch.bool, device=s.device)
    count = channel_mask.sum().clamp(min=1)
    return s.masked_fill(~channel_mask, 0), channel_mask, count


def layer_norm_fwd(x, residual, weight, bias, channel_mask, eps, out_dtype):
    """x (R, C) -> y, x + residual (empty without one), mean (R,), rstd (R,)."""
    total = x if residual is None else x + residual
    s, kept, count = _kept(total, channel_mask)
    mean = s.sum(dim=-1, keepdim=True) / count
    centred = (s - mean).masked_fill(~kept, 0)
    rstd = torch.rsqrt((centred * centred).sum(dim=-1, keepdim=True) / count + eps)
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    y = y.masked_fill(~kept, 0).to(out_dtype)
    return y, _skip(x) if residual is None else total, mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_bwd(dy, dtotal, total, mean, rstd, weight, bias, channel_mask, needs):
    """total (R, C) is what was normalised -> its gradient plus dtotal, dweight, dbias."""
    need_x, need_weight, need_bias = needs
    dx, dweight, dbias = (_skip(total) for _ in range(3))
    s, kept, count = _kept(total, channel_mask)
    dy = dy.to(s.dtype).masked_fill(~kept, 0)
    normed = ((s - mean[:, None]) * rstd[:, None]).masked_fill(~kept, 0)
    if need_weight:
        dweight = (dy * normed).sum(dim=0).to(weight.dtype)
    if need_bias:
        dbias = dy.sum(dim=0).to(bias.dtype)
    if need_x:
        d = dy if weight is None else (dy * weight).masked_fill(~kept, 0)
        mean_d = d.sum(dim=-1, keepdim=True) / count
        mean_dn = (d * normed).sum(dim=-1, keepdim=True) / count
        dx = (d - mean_d - normed * mean_dn) * rstd[:, None]
        dx = dx.masked_fill(~kept, 0)
        dx = (dx if dtotal is None else dx + dtotal).to(total.dtype)
    return dx, dweight, dbias


# The contrastive operator: S = s A BT, its statistics, and the gradients of any weighted sum of
# row and column cross-entropies against (1 - alpha) positive + alpha softmax(teacher).


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and logits at the scale's precision: fp32, or fp64 for fp64."""
    cosines = a.to(scale.dtype) @ b.to(scale.dtype).T
    return cosines, cosines * scale


def _side(s: Tensor, t: Tensor | None, dim: int) -> Tensor:
    """(5, rows or columns): m, l, m_t, l_t, u of softmaxes along `dim`; zeros for no teacher."""
    stats = s.new_zeros(5, s.shape[1 - dim])
    if s.shape[dim] == 0:
        stats[0] = -math.inf
        return stats
    m = s.amax(dim, keepdim=True)
    stats[0] = m.squeeze(dim)
    stats[1] = torch.exp(s - m).sum(dim)
    if t is not None:
        m_t = t.amax(dim, keepdim=True)
        weights = torch.exp(t - m_t)
        stats[2] = m_t.squeeze(dim)
        stats[3] = weights.sum(dim)
        stats[4] = (weights * (s - m)).sum(dim)
    return stats


def contrastive_stats(a, b, scale, teacher_a, teacher_b, teacher_scale, offset):
    """a (M, D), b (N, D) -> rows (5, M), cols (5, N), positive (M,)."""
    _, s = _logits(a, b, scale)
    t = None if teacher_a is None else _logits(teacher_a, teacher_b, teacher_scale)[1]
    positive = s.diagonal(offset)[: a.shape[0]].clone()
    return _side(s, t, dim=1), _side(s, t, dim=0), positive


def contrastive_grads(
    a, b, scale, rows, cols, row_weight, col_weight, alpha, ta, tb, teacher_scale, offset, needs
):
    """-> da, db, dscale of sum_i row_weight_i CE(row i) + sum_j col_weight_j CE(column j)."""
    need_a, need_b, need_scale = needs
    cosines, s = _logits(a, b, scale)
    t = None if ta is None else _logits(ta, tb, teacher_scale)[1]
    is_positive = torch.zeros_like(s, dtype=torch.bool)
    is_positive.diagonal(offset).fill_(True)
    ds = torch.zeros_like(s)
    for stats, weight, dim in ((rows, row_weight, 1), (cols, col_weight, 0)):
        if weight is None:
            continue
        m, l, m_t, l_t, _ = (stat.unsqueeze(dim) for stat in stats)  # noqa: E741
        log_p = (s - m) - torch.log(l)
        # P - T with T = (1 - alpha) positive + alpha P_t. At the positive, expm1 keeps P - 1.
        if t is None:
            difference = torch.where(is_positive, torch.expm1(log_p), torch.exp(log_p))
        else:
            log_pt = (t - m_t) - torch.log(l_t)
            difference = torch.where(
                is_positive,
                torch.expm1(log_p) - alpha * torch.expm1(log_pt),
                torch.exp(log_p) - alpha * torch.exp(log_pt),
            )
        ds = ds + difference * (weight.unsqueeze(dim) if weight.dim() else weight)
    da = (scale * (ds @ b.to(s.dtype))).to(a.dtype) if need_a else _skip(a)
    db = (scale * (ds.T @ a.to(s.dtype))).to(b.dtype) if need_b else _skip(b)
    dscale = (ds * cosines).sum() if need_scale else _skip(scale)
    return da, db, dscale
