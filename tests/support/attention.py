"""Attention problems: lengths, dims, masks, gates, layouts, regimes."""

import math

import torch
import torch.nn.functional as F

from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM, Draw
from tests.support.problem import Problem
from tinyclip import ops

LENGTHS = (1, 2, 5, 17, 32, 33, 49, 50, 77)
DIMS = (8, 16, 21, 32, 40, 48, 59, 64, 72, 80, 88, 96, 111, 128)


def _fused(q, k, v, *, causal=False, key_mask=None, head_gate=None, scale=None):
    """What a PyTorch user writes: SDPA with a boolean mask, on strides its fused kernels take."""
    lq, lk = q.shape[1], k.shape[1]
    mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device)
    mask = mask.tril() if causal else mask
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
        k, v = (x.masked_fill(~key_mask[:, :, None, None], 0) for x in (k, v))  # 0 * NaN
    q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    if head_gate is not None:
        out = out * head_gate.to(out.dtype).reshape(-1, 1, head_gate.shape[-1], 1)
    return out


def _fused_packed(qkv, **options):
    return _fused(*qkv.unbind(2), **options)


def _cond(problem: Problem, tensors, douts):
    """out: P |v|, and P |scale| |q||k| |v - out| of fp32 at least: what rounding a logit's own
    terms does to it. With scores of 1e4 and few different rows peers may be exact, by luck.
    dq: scale (P (|dP| + |delta|)) |k|, and alike.
    """
    packed = "qkv" in tensors
    q, k, v = tensors["qkv"].unbind(2) if packed else (tensors[n] for n in "qkv")
    key_mask, gate = tensors["key_mask"], tensors["head_gate"]
    options, (dout,) = problem.options, douts
    scale = options["scale"] if options["scale"] is not None else q.shape[-1] ** -0.5
    if key_mask is not None:
        k, v = (x.masked_fill(~key_mask[:, :, None, None], 0) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    if options["causal"]:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    p = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    raw = torch.einsum("bhlm,bmhd->blhd", p, v.abs())
    g = 1.0 if gate is None else gate.reshape(-1, 1, gate.shape[-1], 1).abs()
    d = dout.abs() * g
    dp = torch.einsum("blhd,bmhd->bhlm", d, v.abs())
    ds = p * (dp + (dp * p).sum(-1, keepdim=True)) * abs(scale)
    dq = torch.einsum("bhlm,bmhd->blhd", ds, k.abs())
    dk = torch.einsum("bhlm,blhd->bmhd", ds, q.abs())
    dv = torch.einsum("bhlm,blhd->bmhd", p, d)
    dgate = (dout.abs() * raw).sum(dim=(1, 3))
    if gate is not None and gate.dim() == 1:
        dgate = dgate.sum(dim=0)
    work = problem.tensors["qkv" if packed else "q"].dtype
    wide = torch.finfo(torch.promote_types(work, torch.float32)).eps / torch.finfo(work).eps
    out = (raw + wide * _of_logits(p, q, k, v, scale)) * g
    conds = {"out": out, "dq": dq, "dk": dk, "dv": dv, "dhead_gate": dgate}
    conds["dqkv"] = torch.stack([dq, dk, dv], dim=2) if packed else None
    return conds


def _of_logits(p, q, k, v, scale):
    """P |scale| |q||k| |v - out|, (B, Lq, H, D); a query at a time, for it is a sum over (m, d)."""
    weight = p * torch.einsum("blhd,bmhd->bhlm", q.abs(), k.abs()) * abs(scale)
    out, values = torch.einsum("bhlm,bmhd->bhld", p, v), v.transpose(1, 2)
    rows = [
        torch.einsum("bhm,bhmd->bhd", weight[:, :, i], (values - out[:, :, i : i + 1]).abs())
        for i in range(out.shape[2])
    ]
    return torch.stack(rows, dim=1) if rows else out.transpose(1, 2)


def _regime_values(draw: Draw, regime: str, q_shape, k_shape, dtype):
    """q, k, v of the regime; the large one has scores, not only inputs, of 1e4."""
    q = draw.values(regime, *q_shape, dtype=dtype, large=100.0)
    k = draw.values(regime, *k_shape, dtype=dtype, large=100.0)
    v = draw.values(regime, *k_shape, dtype=dtype)
    if regime == "confident":
        q, k = 8 * q, 8 * k
        if q_shape == k_shape:
            k = q.clone()
    if regime == "negative":
        q = -q
    return q, k, v


def make(seed: int, *, packed: bool = False, device: str = "cpu", **choices) -> Problem:
    """The problem of a seed; `choices` narrows any drawn value: lengths=, dims=, dtypes=, ..."""
    draw = Draw(seed, device)

    def pick(name, values):
        return draw.one_of(choices.get(name, values))

    dtype = pick("dtypes", (torch.float32, torch.bfloat16, torch.float16))
    regime = pick("regimes", REGIMES)
    b, h = pick("batches", (1, 2, 3)), pick("heads", (1, 2, 3))
    lq, d = pick("lengths", LENGTHS), pick("dims", DIMS)
    causal = draw.chance(0.4)
    lk = lq if causal or packed or draw.chance(0.5) else pick("lengths", LENGTHS)
    layout, upstream = pick("layouts", LAYOUTS), pick("upstream", UPSTREAM)
    q, k, v = _regime_values(draw, regime, (b, lq, h, d), (b, lk, h, d), dtype)
    key_mask = head_gate = None
    if draw.chance(0.5):
        key_mask = draw.mask(b, lk)
        if draw.chance(0.3):
            key_mask[0] = False
        if layout != "expanded" and draw.chance(0.5):  # what is masked may be anything
            k[~key_mask.cpu()], v[~key_mask.cpu()] = math.nan, math.nan
    if packed:
        tensors = {"qkv": draw.tensor(torch.stack([q, k, v], dim=2), dtype, layout)}
    else:
        tensors = {n: draw.tensor(x, dtype, layout) for n, x in zip("qkv", (q, k, v), strict=True)}
    if draw.chance(0.4):
        shape = (h,) if draw.chance(0.5) else (b, h)
        gate_dtype = dtype if draw.chance(0.5) else torch.float32
        head_gate = draw.tensor(draw.normal(*shape), gate_dtype)
    tensors |= {"key_mask": key_mask, "head_gate": head_gate}
    frozen = frozenset(n for n in tensors if draw.chance(0.2))
    scale = draw.one_of((None, None, 0.3, -1.0)) if regime != "large" else None
    like = torch.empty(b, lq, h, d, dtype=dtype, device=device)
    return Problem(
        label=f"seed {seed} {dtype} {regime} {layout} {upstream} B{b}-Lq{lq}-Lk{lk}-H{h}-D{d}"
        f"{' causal' if causal else ''}{' mask' if key_mask is not None else ''}",
        op=ops.attention_qkv if packed else ops.attention,
        tensors=tensors,
        fused=_fused_packed if packed else _fused,
        cond=_cond,
        options={"causal": causal, "scale": scale},
        frozen=frozen,
        douts=[draw.upstream(like, upstream)],
    )
