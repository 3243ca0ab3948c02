"""The contrastive operator: CLIP's loss, affinity mimicking, and the two passes underneath.

``S = s A BT`` is never stored. Pass 1 (`contrastive_stats`) reduces it to five numbers a row and a
column and the positive's logit; pass 2 (`contrastive_grads`) forms it again and turns it into
gradients. Anything that is a weighted sum of row and column cross-entropies against
``(1 - alpha) positive + alpha softmax(teacher)`` can be built on the two.

Letters: M rows, N columns, D width of the student's features, Dt of the teacher's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinyclip import _extension
from tinyclip.ops import _checks, _contrastive, _ranks
from tinyclip.ops._autocast import like_linear
from tinyclip.ops._contracts import implementation
from tinyclip.ops._dispatch import (
    Candidate,
    Cannot,
    Op,
    Slower,
    Spec,
    always,
    constant_when_compiled,
    fp64_why_not,
    make_spec,
    register,
    select,
)
from tinyclip.ops._layout import unit_stride
from tinyclip.ops._native import cpu_why_not
from tinyclip.ops._triton import triton_why_not


class Teacher(NamedTuple):
    """A teacher's features (M, Dt), row for row, and its own logit scale (already exp'd)."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor | float


class Stats(NamedTuple):
    """What pass 1 keeps of ``S``: fp32 (fp64 for fp64).

    ``rows`` (5, M) and ``cols`` (5, N) hold m = max S, l = sum exp(S - m), m_t and l_t the same of
    the teacher's logits T, and u = sum exp(T - m_t) (S - m); zeros for the last three without a
    teacher. ``positive`` (M,) is S[i, offset + i].
    """

    rows: Tensor
    cols: Tensor
    positive: Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    teacher: Teacher | None = None,
    alpha: float = 0.0,
    group: object | None = None,
) -> Tensor:
    """``(1 - alpha) CLIP + alpha affinity``, each half of rows plus columns, mean over the rows.

    CLIP is the cross-entropy of each row and column of ``logit_scale * image textT`` against its
    own pair (Radford et al. 2021, figure 3); affinity mimicking is the cross-entropy against the
    teacher's softmax over the same row or column (Wu et al. 2023, section 3.1). Memory is O(M D),
    never M x M.

    Under autocast the features, the teacher's included, are cast to the autocast dtype as F.linear
    casts its inputs (where any of them is fp64, none is); logits, statistics, scale and loss stay
    fp32. Without autocast fp32 products follow ``torch.get_float32_matmul_precision()``.

    Args:
        image: (M, D), L2-normalised by the caller, row i belongs to row i of `text`.
        text: (M, D). fp32, bf16, fp16 or fp64, any strides.
        logit_scale: the multiplier s, already exp'd: a float, or a tensor of shape () or (1,).
        teacher: `Teacher` of (M, Dt) features and its own scale; receives no gradient.
        alpha: in [0, 1]; above 0 needs a teacher.
        group: None never communicates. With a process group, which all its ranks must enter, image
            and text are the rank's rows (any number, 0 included), the loss is the global batch's,
            and gradients are W times the rank's share: after DDP's mean over the W ranks, every
            parameter gradient, the scale's included, is that of one process.

    Returns:
        The loss, 0-d, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or M is 0 (on all ranks); the text
            names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare_loss(
        image, text, logit_scale, teacher=teacher, alpha=alpha, group=group
    )
    return select(spec).run(*problem)


def contrastive_stats(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    *,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    offset: int = 0,
) -> Stats:
    """Pass 1: the statistics of ``S = scale a bT`` along rows and columns. Not differentiable.

    Nothing is cast under autocast: `contrastive_grads` has to form the same bits of S, and a caller
    may run one pass inside an autocast block and the other outside. Pass both the same features.

    Args:
        a: (M, D), b: (N, D); the positive of row i is column ``offset + i``.
        scale: a float, or a tensor of shape () or (1,).
        teacher: (its a (M, Dt), its b (N, Dt), its scale).
        offset: at least 0, with ``offset + M <= N``.

    Returns:
        `Stats`.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare_stats(a, b, scale, teacher=teacher, offset=offset)
    return Stats(*select(spec).run(*problem))


def contrastive_grads(
    a: Tensor,
    b: Tensor,
    scale: Tensor | float,
    stats: Stats,
    *,
    row_weight: Tensor | float,
    col_weight: Tensor | float,
    alpha: float = 0.0,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2: gradients of ``sum_i row_weight_i CE(row i) + sum_j col_weight_j CE(column j)``.

    ``dS = w_r (P_r - T_r) + w_c (P_c - T_c)`` with P the softmax that `stats` describes and
    ``T = (1 - alpha) positive + alpha softmax(teacher)``. Not differentiable. Nothing is cast under
    autocast: see `contrastive_stats`.

    Args:
        a, b, scale, teacher, offset: as given to `contrastive_stats`.
        stats: what it returned; in a distributed loss the columns of all ranks, merged.
        row_weight: float or (M,), col_weight: float or (N,); the float 0 switches a side off.
        alpha: in [0, 1]; above 0 needs a teacher.

    Returns:
        (da, db, dscale), each of its tensor's shape and dtype; dscale 0-d for a float scale.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
        BackendUnavailable: the backend asked for cannot run this problem.
    """
    spec, problem = _prepare_grads(
        a,
        b,
        scale,
        stats,
        row_weight=row_weight,
        col_weight=col_weight,
        alpha=alpha,
        teacher=teacher,
        offset=offset,
    )
    da, db, dscale = select(spec).run(*problem)
    if isinstance(scale, Tensor):
        dscale = dscale.reshape(scale.shape).to(scale.dtype)
    return da, db, dscale


def _prepare_loss(image, text, logit_scale, *, teacher=None, alpha=0.0, group=None):
    op = "contrastive_loss"
    alpha = _checks.number(op, "alpha", alpha, low=0.0, high=1.0)
    if teacher is not None:
        teacher = Teacher(*_triple(op, teacher))
    names = ("image", "text", "logit_scale", "(M, D)", "(M, D)", "(M, Dt)", "(M, Dt)")
    others = _scales(logit_scale, teacher if alpha > 0 else None)
    image, text, scale, *teacher = _features(op, names, image, text, logit_scale, teacher)
    m, n = image.shape[0], text.shape[0]
    if m != n:
        raise ValueError(f"{op}: text must have as many rows as image ({m}), got {n}")
    if group is not None:
        _ranks.check_group(group)
    elif m == 0:
        raise ValueError(f"{op}: image must have at least one row, got shape {tuple(image.shape)}")
    if alpha == 0.0:
        teacher = [None] * 3
    elif teacher[0] is None:
        raise ValueError(f"{op}: alpha > 0 needs a teacher, got alpha = {alpha} and none")
    features = (image, text, *teacher[:2])
    if not any(x is not None and x.dtype == torch.float64 for x in features):
        features = like_linear(*features)
    image, text, *teacher[:2] = _laid_out(*features)
    spec = _spec(op, image, text, (image, text, scale), teacher, others)
    return spec, (image, text, scale, *teacher, alpha, group)


def _prepare_stats(a, b, scale, *, teacher=None, offset=0):
    op = "contrastive_stats"
    if teacher is not None:
        teacher = _triple(op, teacher)
    names = ("a", "b", "scale", "(M, D)", "(N, D)", "(M, Dt)", "(N, Dt)")
    others = _scales(scale, teacher)
    a, b, scale, *teacher = _features(op, names, a, b, scale, teacher)
    _check_offset(op, offset, a, b)
    a, b, *teacher[:2] = _laid_out(a, b, *teacher[:2])
    spec = _spec(op, a, b, (), teacher, others)
    return spec, (*_detached(a, b, scale, *teacher), offset)


def _prepare_grads(
    a, b, scale, stats, *, row_weight, col_weight, alpha=0.0, teacher=None, offset=0
):
    op = "contrastive_grads"
    alpha = _checks.number(op, "alpha", alpha, low=0.0, high=1.0)
    if teacher is not None:
        teacher = _triple(op, teacher)
    names = ("a", "b", "scale", "(M, D)", "(N, D)", "(M, Dt)", "(N, Dt)")
    others = (*_scales(scale, teacher if alpha > 0 else None), row_weight, col_weight)
    a, b, scale, *teacher = _features(op, names, a, b, scale, teacher)
    _check_offset(op, offset, a, b)
    if not isinstance(stats, Stats):
        raise TypeError(
            f"{op}: stats must be what contrastive_stats returned, got {type(stats).__name__}"
        )
    m, n = a.shape[0], b.shape[0]
    shapes = (("rows", "(5, M)", (5, m)), ("cols", "(5, N)", (5, n)), ("positive", "(M,)", (m,)))
    for (name, shape, sizes), value in zip(shapes, stats, strict=True):
        _checks.tensor(op, f"stats.{name}", value, shape, (scale.dtype,))
        _checks.sizes(op, f"stats.{name}", value, shape, sizes)
        _checks.same_device(op, f"stats.{name}", value, "a", a)
    row_weight = _weight(op, "row_weight", row_weight, "(M,)", m, scale)
    col_weight = _weight(op, "col_weight", col_weight, "(N,)", n, scale)
    if alpha == 0.0:
        teacher = [None] * 3
    elif teacher[0] is None:
        raise ValueError(f"{op}: alpha > 0 needs a teacher, got alpha = {alpha} and none")
    a, b, *teacher[:2] = _laid_out(a, b, *teacher[:2])
    spec = _spec(op, a, b, (), teacher, others)
    a, b, scale, rows, cols, row_weight, col_weight, *teacher = _detached(
        a, b, scale, stats.rows, stats.cols, row_weight, col_weight, *teacher
    )
    problem = (a, b, scale, rows, cols, row_weight, col_weight, alpha, *teacher, offset)
    return spec, (*problem, [True, True, True])


def _triple(op, teacher):
    if not isinstance(teacher, tuple) or len(teacher) != 3:
        got = f"{len(teacher)} items" if isinstance(teacher, tuple) else type(teacher).__name__
        form = (
            "tinyclip.Teacher(image, text, logit_scale)"
            if op == "contrastive_loss"
            else ("a tuple (its a, its b, its scale)")
        )
        raise TypeError(f"{op}: teacher must be {form}, got {got}")
    return teacher


def _scales(scale, teacher):
    """Both scales as they were passed."""
    return (scale,) if teacher is None else (scale, teacher[2])


def _features(op, names, a, b, scale, teacher):
    """Validate a, b, scale, and the teacher's three (or three None); scales 0-d and working."""
    a_name, b_name, scale_name, a_shape, b_shape, ta_shape, tb_shape = names
    _checks.tensor(op, a_name, a, a_shape)
    _checks.tensor(op, b_name, b, b_shape)
    _checks.sizes(op, b_name, b, b_shape, (None, a.shape[1]))
    _checks.same_device(op, b_name, b, a_name, a)
    work = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    scale = _scale(op, scale_name, scale, a_name, a, work)
    if teacher is None:
        return a, b, scale, None, None, None
    ta, tb, t_scale = teacher
    ta_name, tb_name = f"teacher.{a_name}", f"teacher.{b_name}"
    _checks.tensor(op, ta_name, ta, ta_shape)
    _checks.tensor(op, tb_name, tb, tb_shape)
    _checks.sizes(op, ta_name, ta, ta_shape, (a.shape[0], None))
    _checks.sizes(op, tb_name, tb, tb_shape, (b.shape[0], ta.shape[1]))
    for name, tensor in ((ta_name, ta), (tb_name, tb)):
        _checks.same_device(op, name, tensor, a_name, a)
    t_scale = _scale(op, f"teacher.{scale_name}", t_scale, a_name, a, work)
    return a, b, scale, ta.detach(), tb.detach(), t_scale.detach()


def _laid_out(*features):
    """The features with adjacent elements in each row; what is None stays None."""
    return [x if x is None else unit_stride(x) for x in features]


def _scale(op, name, scale, a_name, a, dtype) -> Tensor:
    if not isinstance(scale, Tensor):
        return a.new_full((), _number(op, name, scale, dtype), dtype=dtype)
    _checks.strided(op, name, scale, "() or (1,)")
    if scale.numel() != 1 or scale.dim() > 1:
        raise ValueError(f"{op}: {name} must have shape () or (1,), got {tuple(scale.shape)}")
    _checks.same_device(op, name, scale, a_name, a)
    return scale.reshape(()).to(dtype)


def _number(op, name, value, dtype) -> float:
    """`value` if it is a number that `dtype` holds."""
    largest = torch.finfo(dtype).max
    return _checks.number(op, name, value, low=-largest, high=largest)


def _weight(op, name, weight, shape, size, scale) -> Tensor | None:
    """(size,) or 0-d at the working precision; None switches the side off."""
    if isinstance(weight, Tensor):
        _checks.tensor(op, name, weight, shape)
        _checks.sizes(op, name, weight, shape, (size,))
        _checks.same_device(op, name, weight, "a", scale)
        return weight.to(scale.dtype)
    weight = _number(op, name, weight, scale.dtype)
    return None if weight == 0.0 else scale.new_full((), weight)


def _check_offset(op, offset, a, b):
    _checks.integer(op, "offset", offset)
    m, n = a.shape[0], b.shape[0]
    if offset < 0 or offset + m > n:
        raise ValueError(
            f"{op}: offset must satisfy 0 <= offset and offset + M <= N: the positive of row i is"
            f" column offset + i; got offset = {offset}, M = {m}, N = {n}"
        )


def _detached(*tensors):
    return [tensor if tensor is None else tensor.detach() for tensor in tensors]


def _spec(op, a, b, differentiable, teacher, others):
    """The spec; `others` may hold numbers, which are no tensors of the call."""
    ta, tb, _ = teacher
    sizes = {"M": a.shape[0], "N": b.shape[0], "D": a.shape[1]}
    if ta is not None:
        sizes["Dt"] = ta.shape[1]
    flags = () if ta is None else ("teacher",)
    others = (b, ta, tb, *(x for x in others if isinstance(x, Tensor)))
    return make_spec(op, a, differentiable, sizes, flags, others)


def _features_example(device):
    def features(width, requires_grad=False):
        return torch.empty(64, width, device=device, requires_grad=requires_grad)

    return features(512, True), features(512, True), features(768), features(768)


def _example_loss(device):
    image, text, t_image, t_text = _features_example(device)
    return (image, text, 100.0), {"teacher": Teacher(t_image, t_text, 100.0), "alpha": 1.0}


def _example_stats(device):
    a, b, ta, tb = _features_example(device)
    return (a, b, 100.0), {"teacher": (ta, tb, 100.0)}


def _example_grads(device):
    (a, b, scale), kwargs = _example_stats(device)
    rows = torch.empty(5, 64, device=device)
    stats = Stats(rows, rows, torch.empty(64, device=device))
    return (a, b, scale, stats), {**kwargs, "alpha": 1.0, "row_weight": 1.0, "col_weight": 1.0}


def _candidates(run):
    """The same order for all three: `run(backend)` is the candidate's run."""
    order = (
        ("cuda", _cuda_why_not),
        ("triton", _triton_why_not),
        ("cpu", cpu_why_not),
        ("torch", always),
        ("reference", always),
    )
    return tuple(Candidate(name, why_not, run(name)) for name, why_not in order)


# Forward and backward on an H100, M = 32,768, D = 512: with bf16 features `cuda` takes a third of
# the time of whole matrices, with fp32 features two thirds of the `torch` backend's. `triton` is
# slower than `cuda`, but for fp32 features without a teacher, and faster than both of those.
_MEASURED_MAJOR = 9


def _unmeasured(spec: Spec) -> Slower | None:
    """`Slower` on an architecture on which nobody has timed the kernels."""
    if spec.capability is None:  # no CUDA device: whether it serves is not a question of speed
        return None
    major, minor = spec.capability
    if major == _MEASURED_MAJOR:
        return None
    return Slower(
        f"measured on compute capability {_MEASURED_MAJOR}.x (H100) alone, this device has"
        f" {major}.{minor}: it serves where it is asked for by name"
    )


@constant_when_compiled
def _cuda_missing() -> str | None:
    return _extension.cuda_why_not(torch.cuda.current_device())


def _cuda_why_not(spec: Spec) -> Cannot | Slower | None:
    if spec.device != "cuda":
        return Cannot(f"needs a CUDA device, the tensors are on {spec.device}")
    fp64 = fp64_why_not(spec)
    if fp64 is not None:
        return fp64
    if spec.capability < (8, 0):
        return Cannot(f"needs compute capability 8.0, the device has {spec.capability}")
    missing = _cuda_missing()
    return _unmeasured(spec) if missing is None else Cannot(missing)


def _triton_why_not(spec: Spec) -> Cannot | Slower | None:
    return triton_why_not(spec) or _unmeasured(spec)


def _pass(op):
    return lambda backend: implementation(op, backend)


register(
    Op(
        "contrastive_loss",
        contrastive_loss,
        _prepare_loss,
        _candidates(_contrastive.loss),
        _example_loss,
    )
)
register(
    Op(
        "contrastive_stats",
        contrastive_stats,
        _prepare_stats,
        _candidates(_pass("contrastive_stats")),
        _example_stats,
    )
)
register(
    Op(
        "contrastive_grads",
        contrastive_grads,
        _prepare_grads,
        _candidates(_pass("contrastive_grads")),
        _example_grads,
    )
)
