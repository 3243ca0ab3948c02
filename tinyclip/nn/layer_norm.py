"""LayerNorm over the last dimension. Letters: C channels."""

import torch
from torch import Tensor, nn

from tinyclip import ops


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over one dimension, computed by `ops.layer_norm`.

    Args:
        normalized_shape: C, or ``(C,)``.
        eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
        keep_dtype: give the input's dtype under autocast too, as open_clip's LayerNorm does;
            without it autocast gives fp32, as torch.nn.LayerNorm does.

    Raises:
        ValueError: `normalized_shape` has more than one dimension.
    """

    def __init__(
        self,
        normalized_shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        keep_dtype: bool = False,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                "LayerNorm: normalized_shape must be one dimension (C,),"
                f" got {tuple(self.normalized_shape)}"
            )
        self.keep_dtype = keep_dtype

    def forward(
        self, x: Tensor, residual: Tensor | None = None, channel_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x, or ``x + residual``.

        Args:
            x: (..., C), any float dtype.
            residual: x's shape; with it the sum comes back too, for the next residual addition.
            channel_mask: bool (C,), True = kept; as in `ops.layer_norm`.

        Returns:
            y, or ``(y, x + residual)``.
        """
        result = ops.layer_norm(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            channel_mask=channel_mask,
        )
        if not self.keep_dtype:
            return result
        if residual is None:
            return result.to(x.dtype)
        y, total = result
        return y.to(torch.promote_types(x.dtype, residual.dtype)), total

    def extra_repr(self) -> str:
        return super().extra_repr() + (", keep_dtype=True" if self.keep_dtype else "")
