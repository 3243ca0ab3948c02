"""How the contrastive loss is put together from the two passes, and differentiated, in one process.

`loss(backend)` is what a candidate runs. A process group's part is `_ranks.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tinyclip.ops import _ranks
from tinyclip.ops._autograd import applied, first_order
from tinyclip.ops._contracts import implementation, without_autocast
from tinyclip.ops._cross_entropy import cross_entropy

# Up to so many logits a backend keeps dS from forward to backward, 2 MiB at most in fp32: below
# that, forming the logits again costs more than it saves.
_KEPT_LOGITS = {"cpu": 1 << 19}


def loss(backend: str) -> Callable[..., Tensor]:
    """The loss on `backend`, differentiable with respect to image, text and scale."""

    def run(image, text, scale, t_image, t_text, t_scale, alpha, group):
        problem = (image, text, scale, t_image, t_text, t_scale, alpha)
        if group is not None:
            return _ranks.contrastive_loss(*problem, group, backend)
        differentiable = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (image, text, scale)
        )
        if differentiable and image.shape[0] ** 2 <= _KEPT_LOGITS.get(backend, 0):
            return applied(_WholeFunction, *problem, backend)
        return applied(_TwoPassFunction, *problem, backend)

    return run


class _TwoPassFunction(torch.autograd.Function):
    """Forward reduces S to statistics, backward forms it again: O(M D) memory."""

    @staticmethod
    def forward(ctx, image, text, scale, t_image, t_text, t_scale, alpha, backend):
        stats = implementation("contrastive_stats", backend)
        rows, cols, positive = stats(image, text, scale, t_image, t_text, t_scale, 0)
        by_row = cross_entropy(rows, positive, alpha).mean()
        by_column = cross_entropy(cols, positive, alpha).mean()
        ctx.save_for_backward(image, text, scale, t_image, t_text, t_scale, rows, cols)
        ctx.alpha, ctx.backend = alpha, backend
        return 0.5 * (by_row + by_column)

    @staticmethod
    def backward(ctx, dloss):
        image, text, scale, t_image, t_text, t_scale, rows, cols = ctx.saved_tensors
        grads = implementation("contrastive_grads", ctx.backend)
        weight = dloss * (0.5 / image.shape[0])
        needs = list(ctx.needs_input_grad[:3])
        gradients = grads(
            *(image, text, scale, rows, cols, weight, weight, ctx.alpha),
            *(t_image, t_text, t_scale, 0, needs),
        )
        gradients = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return first_order((*gradients, *[None] * 5), dloss, image, text, scale)


class _WholeFunction(torch.autograd.Function):
    """A problem so small that forward leaves dS, for an upstream gradient of 1, to backward."""

    @staticmethod
    def forward(ctx, image, text, scale, t_image, t_text, t_scale, alpha, backend):
        whole = implementation("contrastive_whole", backend)
        value, ds, dscale = whole(image, text, scale, t_image, t_text, t_scale, alpha)
        ctx.save_for_backward(image, text, scale, ds, dscale)
        return value

    @staticmethod
    def backward(ctx, dloss):
        saved = ctx.saved_tensors
        gradients = without_autocast(_carry, (*saved, dloss, ctx))
        return first_order((*gradients, *[None] * 5), dloss, *saved)


def _carry(image, text, scale, ds, dscale, dloss, ctx):
    """dS to the features, at its precision, and only then to theirs."""
    need_image, need_text, need_scale = ctx.needs_input_grad[:3]
    ds = ds * (dloss * scale)
    dimage = (ds @ text.to(ds.dtype)).to(image.dtype) if need_image else None
    dtext = (ds.T @ image.to(ds.dtype)).to(text.dtype) if need_text else None
    return dimage, dtext, dscale * dloss if need_scale else None
