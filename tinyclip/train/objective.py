"""What is differentiated: the plain CLIP loss. Distillation's is in tinyclip.distill."""

from torch import Tensor

from tinyclip import ops


class Contrastive:
    """CLIP's loss (Radford et al. 2021): each image against all texts of the batch, and back."""

    def __call__(
        self, image: Tensor, text: Tensor, scale: Tensor, pair: object, group: object | None
    ) -> dict[str, Tensor]:
        """The terms of one batch.

        Args:
            image, text: (B, E) the student's features, L2-normalised.
            scale: its multiplier, already exp'd.
            pair: what a teacher would read; not looked at.
            group: the process group that shares the batch, or None.

        Returns:
            ``{"loss": ...}``, 0-d: what is differentiated.
        """
        return {"loss": ops.contrastive_loss(image, text, scale, group=group)}
