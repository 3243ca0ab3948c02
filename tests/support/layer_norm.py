"""LayerNorm problems: rows, widths, residuals, channel masks, layouts, regimes."""

import torch
import torch.nn.functional as F

from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM, Draw
from tests.support.problem import Problem
from tinyclip import ops

ROWS = (1, 2, 7, 31, 50, 77)
WIDTHS = (1, 2, 21, 32, 48, 64, 100, 257)


def _fused(x, weight, bias, *, residual=None, channel_mask=None, eps=1e-5):
    """F.layer_norm; a mask by selecting the kept channels, as TinyCLIP does."""
    total = x if residual is None else x + residual
    weight, bias = (None if t is None else t.to(total.dtype) for t in (weight, bias))
    if channel_mask is None:
        y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    else:
        kept = channel_mask.nonzero().squeeze(-1)
        weight, bias = (None if t is None else t[kept] for t in (weight, bias))
        part = F.layer_norm(total[..., kept], (len(kept),), weight, bias, eps)
        y = torch.zeros_like(total).index_copy(-1, kept, part)
    return y if residual is None else (y, total)


def _cond(problem: Problem, tensors, douts):
    """(|s| + |mean|) rstd |w| + |b|, and the gradient with its three terms added."""
    x, residual = tensors["x"], tensors["residual"]
    s = x if residual is None else x + residual
    s_terms = x.abs() if residual is None else x.abs() + residual.abs()
    kept = tensors["channel_mask"]
    kept = torch.ones(s.shape[-1], device=s.device) if kept is None else kept.double()
    count = kept.sum().clamp(min=1)

    def mean(t):
        return (t * kept).sum(-1, keepdim=True) / count

    rstd = torch.rsqrt(mean((s - mean(s)).square()) + problem.options["eps"])
    normed = (s - mean(s)) * rstd * kept
    terms = (s_terms + mean(s_terms)) * rstd * kept
    w = 1.0 if tensors["weight"] is None else tensors["weight"].abs()
    b = 0.0 if tensors["bias"] is None else tensors["bias"].abs()
    dy = douts[0].abs() * kept
    d = dy * w
    n = normed.abs() + terms
    dtotal = douts[1].abs() if residual is not None else 0.0
    ds = (d + mean(d) + n * mean(d * n)) * rstd * kept + dtotal
    leading = tuple(range(s.dim() - 1))
    return {
        "out": (terms * w + b) * kept,
        "out1": s_terms,
        "dx": ds,
        "dresidual": ds,
        "dweight": (dy * terms).sum(leading),
        "dbias": dy.sum(leading),
    }


def make(seed: int, *, device: str = "cpu", **choices) -> Problem:
    """The problem of a seed; `choices` narrows any drawn value: rows=, widths=, dtypes=, ..."""
    draw = Draw(seed, device)

    def pick(name, values):
        return draw.one_of(choices.get(name, values))

    dtype, regime = pick("dtypes", (torch.float32, torch.bfloat16, torch.float16)), None
    regime = pick("regimes", REGIMES)
    rows, c = pick("rows", ROWS), pick("widths", WIDTHS)
    layout, upstream = pick("layouts", LAYOUTS), pick("upstream", UPSTREAM)
    leading = (rows,) if draw.chance(0.5) else (2, rows)
    parameter_dtype = torch.float32 if draw.chance(0.4) else dtype

    def features():
        x = draw.values(regime, *leading, c, dtype=dtype)
        if regime == "confident":  # one channel drowns the rest, as in trained towers
            x = x * torch.where(torch.arange(c) == c // 2, 100.0, 1.0)
        return draw.tensor(x, dtype, layout)

    def parameter():
        return draw.tensor(draw.normal(c), parameter_dtype) if draw.chance(0.8) else None

    mask = draw.mask(c, keep=0.7) if draw.chance(0.4) else None
    if mask is not None and draw.chance(0.1):
        mask[:] = False
    tensors = {
        "x": features(),
        "weight": parameter(),
        "bias": parameter(),
        "residual": features() if draw.chance(0.5) else None,
        "channel_mask": mask,
    }
    like = torch.empty(*leading, c, dtype=dtype, device=device)
    douts = [draw.upstream(like, upstream)]
    if tensors["residual"] is not None:
        douts.append(draw.upstream(like, upstream))
    return Problem(
        label=f"seed {seed} {dtype}/{parameter_dtype} {regime} {layout} {upstream} {leading} C{c}"
        f"{' mask' if mask is not None else ''}",
        op=ops.layer_norm,
        tensors=tensors,
        fused=_fused,
        cond=_cond,
        options={"eps": draw.one_of((1e-5, 1e-6))},
        frozen=frozenset(n for n in tensors if draw.chance(0.2)),
        douts=douts,
    )
