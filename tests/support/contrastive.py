"""Contrastive problems: batch, widths, teachers, alpha, scales, layouts, regimes."""

import torch
import torch.nn.functional as F

import tinyclip
from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM, Draw
from tests.support.problem import Problem
from tinyclip import ops

ROWS = (1, 2, 3, 17, 50, 64, 129)
WIDTHS = (1, 7, 32, 64, 100, 128)


def loss(image, text, logit_scale, teacher_image, teacher_text, *, teacher_scale, alpha):
    """The public op with the teacher's tensors by name."""
    teacher = None
    if teacher_image is not None:
        teacher = tinyclip.Teacher(teacher_image, teacher_text, teacher_scale)
    return ops.contrastive_loss(image, text, logit_scale, teacher=teacher, alpha=alpha)


def _fused(image, text, logit_scale, teacher_image, teacher_text, *, teacher_scale, alpha):
    """open_clip's loss and TinyCLIP's soft loss: whole matrices, F.cross_entropy, fp32 or fp64."""
    work = torch.promote_types(image.dtype, torch.float32)
    image, text, logit_scale = (x.to(work) for x in (image, text, logit_scale.reshape(())))
    logits = logit_scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    value = 0.0
    if alpha < 1:
        hard = F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
        value = value + (1 - alpha) * hard / 2
    if alpha > 0:
        target = teacher_scale * teacher_image.detach().to(work) @ teacher_text.detach().to(work).T
        soft = F.cross_entropy(logits, target.softmax(1))
        soft = soft + F.cross_entropy(logits.T, target.T.softmax(1))
        value = value + alpha * soft / 2
    return value


def _cond(problem: Problem, tensors, douts):
    """Gradients: s (P + T) |B|, with 8 + s roundings, of fp32 (fp64 for fp64) logits.

    An engine that hands dS to 16-bit products rounds it once: s |dS| |B|, half an eps of theirs.
    """
    image, text, scale = tensors["image"], tensors["text"], tensors["logit_scale"].reshape(())
    alpha, m = problem.options["alpha"], len(tensors["image"])
    cosines = image @ text.T
    s, lengths = scale * cosines, image.abs() @ text.abs().T
    p_rows, p_cols = s.softmax(1), s.softmax(0)
    t_rows = t_cols = torch.eye(m, dtype=s.dtype, device=s.device)
    soft_terms = torch.zeros(())
    if alpha > 0:
        t = tensors["teacher_image"] @ tensors["teacher_text"].T * problem.options["teacher_scale"]
        soft_terms = ((t.softmax(1) + t.softmax(0)) * s.abs()).sum() / m
        t_rows = (1 - alpha) * t_rows + alpha * t.softmax(1)
        t_cols = (1 - alpha) * t_cols + alpha * t.softmax(0)
    ds = (p_rows + t_rows + p_cols + t_cols) / (2 * m) * douts[0].abs()
    exact_ds = (p_rows - t_rows + p_cols - t_cols) / (2 * m) * douts[0]
    work = torch.promote_types(problem.tensors["image"].dtype, torch.float32)
    eps = torch.finfo(work).eps
    level = s.abs().amax(1).mean() + s.abs().amax(0).mean() + s.diagonal().abs().mean()
    conds = {
        "out": level + soft_terms + 2 * torch.log(torch.tensor(float(m))),
        "dimage": scale.abs() * ds @ text.abs(),
        "dtext": scale.abs() * ds.T @ image.abs(),
        "dlogit_scale": (ds * lengths).sum().reshape(tensors["logit_scale"].shape),
    }
    if problem.rounded_ds:
        rounded = scale.abs() * exact_ds.abs() * once(problem, "image", "dimage")
        conds["dimage"] = conds["dimage"] + rounded @ text.abs()
        conds["dtext"] = conds["dtext"] + rounded.T @ image.abs()
    return {name: (terms, eps) for name, terms in conds.items()}


def once(problem: Problem, features: str, gradient: str) -> float:
    """Half an eps of the features, counted in what the rule allows `gradient`'s terms."""
    tensor = problem.tensors[features]
    work = torch.promote_types(tensor.dtype, torch.float32)
    own, wide = (torch.finfo(dtype).eps for dtype in (tensor.dtype, work))
    return 0.5 * own / (wide * problem.roundings[gradient])


def make(seed: int, *, device: str = "cpu", **choices) -> Problem:
    """The problem of a seed; `choices` narrows any drawn value: rows=, widths=, dtypes=, ..."""
    draw = Draw(seed, device)

    def pick(name, values):
        return draw.one_of(choices.get(name, values))

    dtype = pick("dtypes", (torch.float32, torch.bfloat16, torch.float16))
    regime, layout = pick("regimes", REGIMES), pick("layouts", LAYOUTS)
    upstream = pick("upstream", UPSTREAM)
    m, d, dt = pick("rows", ROWS), pick("widths", WIDTHS), pick("widths", WIDTHS)
    alpha = pick("alphas", (0.0, 0.3, 1.0))
    scale = pick("scales", (1.0, 14.3, 50.0, 100.0))
    image = draw.values(regime, m, d, dtype=dtype, large=1.0)
    text = draw.values(regime, m, d, dtype=dtype, large=1.0)
    if regime == "confident":
        text = image + 0.01 * text
    if regime == "negative":
        text, scale = -text, 1000.0
    if regime == "large":
        scale = 1e4
    if regime not in ("denormal", "integers", "one_hot"):
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    tensors = {
        "image": draw.tensor(image, dtype, layout),
        "text": draw.tensor(text, dtype, layout),
        "logit_scale": torch.full(draw.one_of(((), (1,))), scale, device=device),
        "teacher_image": None,
        "teacher_text": None,
    }
    if alpha > 0:
        for name in ("teacher_image", "teacher_text"):
            features = F.normalize(draw.normal(m, dt), dim=1)
            tensors[name] = draw.tensor(features, draw.one_of((dtype, torch.float32)), layout)
    frozen = {n for n in ("image", "text", "logit_scale") if draw.chance(0.2)}
    return Problem(
        label=f"seed {seed} {dtype} {regime} {layout} M{m}-D{d}-Dt{dt} alpha {alpha} s {scale}",
        op=loss,
        tensors=tensors,
        fused=_fused,
        cond=_cond,
        options={"teacher_scale": 30.0, "alpha": alpha},
        frozen=frozenset(frozen | {"teacher_image", "teacher_text"}),
        douts=[draw.upstream(torch.empty((), device=device), upstream)],
        roundings=dict.fromkeys(("dimage", "dtext", "dlogit_scale"), 8 + scale),
        rounded_ds=choices.get("rounded_ds", False),
    )
