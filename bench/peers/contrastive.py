"""The contrastive loss's peers: all of them hold the B x B matrix, some hold four.

In 16 bit their logits are rounded, as autocast rounds them for every project below; the softmax is
fp32. `eager_fp32` rounds nothing, which is the op's own contract.

Letters: B rows of both towers, D width of the student's features, Dt of the teacher's.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import CannotRun, Peer, Tensors, open_clip
from bench.timing import Timed

TEACHER_SCALE = 50.0  # TinyCLIP fixes the teacher's multiplier there


def _labels(t: Tensors) -> Tensor:
    return torch.arange(len(t["image"]), device=t["image"].device)


def _soft(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def _loss(t: Tensors, s: dict, dtype: torch.dtype) -> Tensor:
    image, text = t["image"].to(dtype), t["text"].to(dtype)
    logits = ((t["logit_scale"] * image) @ text.T).float()
    labels = _labels(t)
    hard = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    if "teacher_image" not in t:
        return hard
    teacher = t["teacher_image"].to(dtype) @ t["teacher_text"].to(dtype).T
    teacher = (TEACHER_SCALE * teacher).float()
    rows = F.cross_entropy(logits, teacher.softmax(-1))
    columns = F.cross_entropy(logits.T, teacher.T.softmax(-1))
    return (1 - s["alpha"]) * hard + s["alpha"] * (rows + columns) / 2


def eager(t: Tensors, s: dict) -> Tensor:
    """One matrix of logits, cross-entropy over its rows and its columns."""
    return _loss(t, s, t["image"].dtype)


def eager_fp32(t: Tensors, s: dict) -> Tensor:
    """The same with logits never rounded to 16 bit: the op's own contract, eagerly."""
    return _loss(t, s, torch.float32)


def tinyclip(t: Tensors, s: dict) -> Tensor:
    """TinyCLIP's distillation as it is written: two student and two teacher matrices, softmaxed.

    (1 - alpha) CLIP loss + alpha (1/2)(CE(softmax(T_i2t), S_i2t) + CE(softmax(T_t2i), S_t2i)).
    """
    image, text, labels = t["image"], t["text"], _labels(t)
    by_image = ((t["logit_scale"] * image) @ text.T).float()
    by_text = ((t["logit_scale"] * text) @ image.T).float()
    with torch.no_grad():
        wanted_by_image = TEACHER_SCALE * t["teacher_image"] @ t["teacher_text"].T
        wanted_by_text = TEACHER_SCALE * t["teacher_text"] @ t["teacher_image"].T
        wanted_by_image = wanted_by_image.float().softmax(-1)
        wanted_by_text = wanted_by_text.float().softmax(-1)
    soft = (_soft(by_image, wanted_by_image) + _soft(by_text, wanted_by_text)) / 2
    if s["alpha"] == 1:
        return soft
    hard = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
    return (1 - s["alpha"]) * hard + s["alpha"] * soft


def open_clip_loss() -> Peer:
    """open_clip's ClipLoss, under autocast where the features are 16 bit."""

    def build(t: Tensors, s: dict, device: str) -> Timed:
        loss = open_clip("loss").ClipLoss()
        dtype = t["image"].dtype

        def call() -> Tensor:
            half = dtype.itemsize == 2
            with torch.autocast(device, dtype) if half else contextlib.nullcontext():
                return loss(t["image"], t["text"], t["logit_scale"])

        return Timed(call)

    return Peer(build)


def _logits(t: Tensors, prefix: str, scale: Tensor | float) -> Tensor:
    image, text = t[f"{prefix}image"], t[f"{prefix}text"]
    dtype = torch.promote_types(image.dtype, torch.float32)
    return scale * (image.to(dtype) @ text.to(dtype).T)


def stats(t: Tensors, s: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 1 with both matrices in memory: (5, B) of rows, of columns, and the positives."""
    logits = _logits(t, "", t["logit_scale"])
    teacher = _logits(t, "teacher_", TEACHER_SCALE) if "teacher_image" in t else None
    return _side(logits, teacher, 1), _side(logits, teacher, 0), logits.diagonal().clone()


def _side(logits: Tensor, teacher: Tensor | None, dim: int) -> Tensor:
    largest = logits.amax(dim, keepdim=True)
    centred = logits - largest
    kept = [largest.squeeze(dim), centred.exp().sum(dim)]
    if teacher is None:
        return torch.stack([*kept, *3 * [torch.zeros_like(kept[0])]])
    largest = teacher.amax(dim, keepdim=True)
    weights = (teacher - largest).exp()
    return torch.stack(
        [*kept, largest.squeeze(dim), weights.sum(dim), (weights * centred).sum(dim)]
    )


def grads(t: Tensors, s: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2 with the matrix in memory: (P - T) of rows and columns, then two products."""
    logits, alpha = _logits(t, "", t["logit_scale"]), s.get("alpha", 0.0)
    teacher = _logits(t, "teacher_", TEACHER_SCALE) if "teacher_image" in t else None
    both = torch.zeros_like(logits)
    for kept, dim in ((t["rows"], 1), (t["cols"], 0)):
        m, l, m_t, l_t, _ = (row.unsqueeze(dim) for row in kept)  # noqa: E741
        both = both + (logits - m).exp() / l
        if teacher is not None:
            both = both - alpha * (teacher - m_t).exp() / l_t
    both = (both - 2 * (1 - alpha) * torch.eye(len(both), device=both.device)) / (2 * len(both))
    image, text, scale = t["image"], t["text"], t["logit_scale"]
    dscale = (both * logits).sum() / scale
    both = both * scale
    da, db = both @ text.to(both.dtype), both.T @ image.to(both.dtype)
    return da.to(image.dtype), db.to(text.dtype), dscale


def engine(backend: str) -> Peer:
    """The op itself on the backend of this name, as long as `auto` does not take it by itself."""

    def build(t: Tensors, s: dict, device: str) -> Timed:
        import tinyclip
        from bench import calls

        with tinyclip.backend(backend):
            rows = tinyclip.explain("contrastive_loss", t["image"], t["text"], 1.0).rows
        if refused := [row[2] for row in rows if row[:2] == (backend, "cannot")]:
            raise CannotRun(refused[0])
        return Timed(
            lambda: calls.contrastive_loss(tinyclip.ops, t, s), lambda: tinyclip.backend(backend)
        )

    return Peer(build, engine=True)
