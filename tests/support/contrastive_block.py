"""Contrastive problems in the general form: a block of rows, its offset, and weights.

The value whose gradients pass 2 gives, with L the logarithm of a softmax's denominator:

    sum_i w_i (L_i - (1 - alpha) S_i,positive - alpha sum_j P_t,ij S_ij) + the same over columns

where a column whose positive lies in another block has no such term.
"""

import torch
import torch.nn.functional as F

from tests.support.contrastive import once
from tests.support.draw import LAYOUTS, REGIMES, Draw
from tests.support.problem import Problem
from tinyclip import ops

SIZES = (1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 129, 257, 511, 640, 700)
WIDTHS = (1, 7, 32, 100, 257, 512, 600)


def _side(stats, weight, positive, alpha):
    m, l, _, l_t, u = stats  # noqa: E741
    value = torch.log(l) + m - (1 - alpha) * positive
    if alpha > 0:
        value = value - alpha * (m + u / l_t)
    return (weight * value).sum()


def _spread(positive, offset, columns):
    return F.pad(positive, (offset, columns - offset - len(positive)))


class _Block(torch.autograd.Function):
    """The two public passes, as a loss would be built on them."""

    @staticmethod
    def forward(ctx, a, b, scale, ta, tb, row_weight, col_weight, options):
        alpha, offset = options["alpha"], options["offset"]
        teacher = None if ta is None else (ta, tb, options["teacher_scale"])
        stats = ops.contrastive_stats(a, b, scale, teacher=teacher, offset=offset)
        ctx.problem = (a, b, scale, stats, row_weight, col_weight)
        ctx.keywords = {"alpha": alpha, "teacher": teacher, "offset": offset}
        by_row = _side(stats.rows, row_weight, stats.positive, alpha)
        positive = _spread(stats.positive, offset, len(b))
        return by_row + _side(stats.cols, col_weight, positive, alpha)

    @staticmethod
    def backward(ctx, dout):
        a, b, scale, stats, row_weight, col_weight = ctx.problem
        weights = [
            w if isinstance(w, float) and w == 0 else dout * w for w in (row_weight, col_weight)
        ]
        # A weight for all is a float: the other way to say it.
        weights = [w.item() if isinstance(w, torch.Tensor) and w.dim() == 0 else w for w in weights]
        grads = ops.contrastive_grads(
            a, b, scale, stats, row_weight=weights[0], col_weight=weights[1], **ctx.keywords
        )
        return *grads, None, None, None, None, None


def _op(a, b, scale, teacher_a, teacher_b, row_weight, col_weight, **options):
    weights = (options[f"every_{n}"] if w is None else w
               for n, w in (("row", row_weight), ("col", col_weight)))  # fmt: skip
    return _Block.apply(a, b, scale, teacher_a, teacher_b, *weights, options)


def _fused(a, b, scale, teacher_a, teacher_b, row_weight, col_weight, **options):
    """Whole matrices and logsumexp, in fp32 at least."""
    work = torch.promote_types(a.dtype, torch.float32)
    alpha, offset = options["alpha"], options["offset"]
    s = scale.to(work).reshape(()) * a.to(work) @ b.to(work).T
    positive = s.diagonal(offset)[: len(a)]
    value = 0.0
    for dim, weight, own in ((1, row_weight, positive), (0, col_weight, None)):
        weight = options["every_row" if dim else "every_col"] if weight is None else weight
        own = _spread(positive, offset, len(b)) if own is None else own
        side = s.logsumexp(dim) - (1 - alpha) * own
        if teacher_a is not None and alpha > 0:
            t = options["teacher_scale"] * teacher_a.to(work) @ teacher_b.to(work).T
            side = side - alpha * (t.softmax(dim) * s).sum(dim)
        value = value + (weight * side).sum()
    return value


def _cond(problem: Problem, tensors, douts):
    a, b, scale = tensors["a"], tensors["b"], tensors["scale"].reshape(())
    alpha, offset = problem.options["alpha"], problem.options["offset"]
    cosines = a @ b.T
    s, lengths = scale * cosines, a.abs() @ b.abs().T
    hard = torch.zeros_like(s)
    hard.diagonal(offset)[: len(a)].fill_(1 - alpha)
    ds, exact_ds, level = torch.zeros_like(s), torch.zeros_like(s), torch.zeros(())
    for dim, name in ((1, "row"), (0, "col")):
        weight = tensors[f"{name}_weight"]
        weight = problem.options[f"every_{name}"] if weight is None else weight.unsqueeze(dim)
        weight = torch.as_tensor(weight).abs()
        target = hard
        if alpha > 0:
            t = tensors["teacher_a"] @ tensors["teacher_b"].T * problem.options["teacher_scale"]
            target = hard + alpha * t.softmax(dim)
        ds = ds + weight * (s.softmax(dim) + target)
        exact_ds = exact_ds + weight * (s.softmax(dim) - target)
        denominators = s.abs().amax(dim, keepdim=True) + torch.log(
            torch.tensor(float(s.shape[dim]))
        )
        terms = denominators + (target * s.abs()).sum(dim, keepdim=True)
        level = level + (weight * terms).sum()
    ds, exact_ds = ds * douts[0].abs(), exact_ds * douts[0]
    conds = {
        "out": level,
        "da": scale.abs() * ds @ b.abs(),
        "db": scale.abs() * ds.T @ a.abs(),
        "dscale": (ds * lengths).sum().reshape(tensors["scale"].shape),
    }
    if problem.rounded_ds:
        rounded = scale.abs() * exact_ds.abs() * once(problem, "a", "da")
        conds["da"] = conds["da"] + rounded @ b.abs()
        conds["db"] = conds["db"] + rounded.T @ a.abs()
    eps = torch.finfo(problem.tensors["scale"].dtype).eps
    return {name: (terms, eps) for name, terms in conds.items()}


def make(seed: int, *, device: str = "cpu", **choices) -> Problem:
    """The problem of a seed; `choices` narrows any drawn value: rows=, columns=, widths=, ..."""
    draw = Draw(seed, device)

    def pick(name, values):
        return draw.one_of(choices.get(name, values))

    dtype = pick("dtypes", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    work = torch.promote_types(dtype, torch.float32)
    regime, layout = pick("regimes", REGIMES), pick("layouts", LAYOUTS)
    m, n = sorted((pick("sizes", SIZES), pick("sizes", SIZES)))
    d, dt = pick("widths", WIDTHS), pick("widths", WIDTHS)
    offset = draw.one_of((0, n - m, draw.choices.randint(0, n - m)))
    alpha, scale = pick("alphas", (0.0, 0.3, 1.0)), pick("scales", (1.0, 14.3, 50.0, 100.0))
    a = draw.values(regime, m, d, dtype=dtype, large=1.0)
    b = draw.values(regime, n, d, dtype=dtype, large=1.0)
    if regime == "confident":
        b[offset : offset + m] = a + 0.01 * b[offset : offset + m]
    if regime == "negative":
        b, scale = -b, 1000.0
    if regime == "large":
        scale = 1e4
    if regime not in ("denormal", "integers", "one_hot"):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    tensors = {
        "a": draw.tensor(a, dtype, layout),
        "b": draw.tensor(b, dtype, layout),
        "scale": torch.full(draw.one_of(((), (1,))), scale, dtype=work, device=device),
        "teacher_a": None,
        "teacher_b": None,
    }
    if alpha > 0:
        for name, rows in (("teacher_a", m), ("teacher_b", n)):
            features = F.normalize(draw.normal(rows, dt), dim=1)
            tensors[name] = draw.tensor(features, draw.one_of((dtype, torch.float32)), layout)
    options = {"teacher_scale": 30.0, "alpha": alpha, "offset": offset}
    kinds = draw.one_of((("float", "float"), ("vector", "float"), ("float", "vector"),
                         ("vector", "vector"), ("off", "vector"), ("float", "off")))  # fmt: skip
    for name, size, kind in zip(("row", "col"), (m, n), kinds, strict=True):
        vector = torch.rand(size, generator=draw.generator, dtype=torch.float64).to(work) / n
        tensors[f"{name}_weight"] = vector.to(device) if kind == "vector" else None
        options[f"every_{name}"] = {"float": 0.5 / n, "off": 0.0}.get(kind)
    frozen = {"teacher_a", "teacher_b", "row_weight", "col_weight"}
    return Problem(
        label=f"seed {seed} {dtype} {regime} {layout} {m}x{n}+{offset} D{d}-Dt{dt} alpha {alpha}"
        f" s {scale} {kinds[0]}/{kinds[1]}",
        op=_op,
        tensors=tensors,
        fused=_fused,
        cond=_cond,
        options=options,
        frozen=frozenset(frozen),
        douts=[draw.normal().to(device, work)],
        roundings=dict.fromkeys(("da", "db", "dscale"), 8 + scale),
        rounded_ds=choices.get("rounded_ds", False),
    )
