"""CLIP's loss and TinyCLIP's affinity mimicking as a module."""

import torch
from torch import Tensor, nn

from tinyclip import ops


class ContrastiveLoss(nn.Module):
    """``(1 - alpha) CLIP + alpha affinity`` by `ops.contrastive_loss`, which says what they are.

    Args:
        alpha: in [0, 1], the weight of affinity mimicking; above 0 forward needs a teacher.
        group: a process group for the loss of the global batch; None never communicates.

    Raises:
        ValueError: alpha is out of range; in forward, as `ops.contrastive_loss`.
    """

    def __init__(
        self, alpha: float = 0.0, group: "torch.distributed.ProcessGroup | None" = None
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"ContrastiveLoss: alpha must be in [0, 1], got {alpha}")
        self.alpha, self.group = alpha, group

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        teacher: ops.Teacher | None = None,
    ) -> Tensor:
        """image, text (M, D) L2-normalised, the scale already exp'd -> 0-d loss, fp32 or fp64."""
        return ops.contrastive_loss(
            image, text, logit_scale, teacher=teacher, alpha=self.alpha, group=self.group
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
