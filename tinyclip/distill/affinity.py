"""Affinity mimicking: a student learns its teacher's softmax over the pairs of a batch.

Wu et al. 2023 (TinyCLIP), section 3.1. Letters: B pairs, L tokens, D width of the features.
"""

import math

import torch
from torch import Tensor, nn

from tinyclip import ops


class AffinityMimicking:
    """The objective ``(1 - alpha) CLIP + alpha affinity`` of `ops.contrastive_loss`.

    Student and teacher meet in similarities only, each with its own scale, so the teacher may have
    another width, another input size and another tokenizer.

    Args:
        teacher: a `CLIP`, or any module whose forward takes (image, text) to L2-normalised
            features (B, D) each and the scale, already exp'd. It is put into eval mode and frozen.
        alpha: in [0, 1]. 1, as in TinyCLIP, leaves CLIP's own loss out; at 0 the teacher is
            not run.
        teacher_scale: a fixed multiplier for the teacher's similarities instead of its own, as
            TinyCLIP's ``--logit-scale 50`` sets for both sides.
        parts: whether to compute both terms where alpha is between 0 and 1; that takes one
            more pass over the similarities, without a gradient. Over ranks it must be one value.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the text names it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        alpha: float = 1.0,
        teacher_scale: float | None = None,
        parts: bool = True,
    ):
        if not isinstance(teacher, nn.Module):
            raise TypeError(
                f"AffinityMimicking: teacher must be a module, got {type(teacher).__name__}"
            )
        if not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"AffinityMimicking: alpha must be a number in [0, 1], got {alpha!r}")
        number = isinstance(teacher_scale, (int, float))
        if teacher_scale is not None and not (number and 0 < teacher_scale < math.inf):
            raise ValueError(
                f"AffinityMimicking: teacher_scale must be a positive number, got {teacher_scale!r}"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.alpha, self.teacher_scale, self.parts = float(alpha), teacher_scale, parts

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        pair: tuple[Tensor, Tensor],
        group: object | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            image, text: (B, D), the student's features, L2-normalised.
            scale: the student's, already exp'd.
            pair: what the teacher reads: images (B, 3, height, width) and captions (B, L).
            group: as in `ops.contrastive_loss`.

        Returns:
            ``loss``, to be differentiated, and without a gradient its terms ``affinity`` (alpha >
            0) and ``clip`` (alpha < 1); where `parts` is off and both count, neither.

        Raises:
            ValueError: the batch is not on the teacher's device; as `ops.contrastive_loss`.
        """
        alpha = self.alpha
        teacher = None if alpha == 0 else self.target(pair)
        loss = ops.contrastive_loss(image, text, scale, teacher=teacher, alpha=alpha, group=group)
        value = loss.detach()
        if alpha in (0.0, 1.0):
            return {"loss": loss, "affinity" if alpha else "clip": value}
        if not self.parts:
            return {"loss": loss}
        # The engine returns the mixture. The part of less weight is computed, the other is what
        # remains, so that no rounding is divided by a small weight.
        light = 0.0 if alpha >= 0.5 else 1.0
        with torch.no_grad():
            computed = ops.contrastive_loss(
                image, text, scale, teacher=teacher, alpha=light, group=group
            )
        weight = alpha if light else 1 - alpha
        rest = (value - weight * computed) / (1 - weight)
        affinity, clip = (computed, rest) if light else (rest, computed)
        return {"loss": loss, "affinity": affinity, "clip": clip}

    @torch.no_grad()
    def target(self, pair: tuple[Tensor, Tensor]) -> ops.Teacher:
        """The teacher's features of a pair and its scale, under the autocast that is active.

        No gradient, but not inference mode either: what the loss keeps for backward must be an
        ordinary tensor.
        """
        image, text = pair
        parameter = next(self.teacher.parameters())
        if image.device != parameter.device:
            raise ValueError(
                f"AffinityMimicking: the batch must be on the teacher's device,"
                f" {parameter.device}, got {image.device}"
            )
        image, text, scale = self.teacher(image.to(parameter.dtype), text)
        return ops.Teacher(image, text, scale if self.teacher_scale is None else self.teacher_scale)
