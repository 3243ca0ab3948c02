"""The unit in which a 16-bit dS of the contrastive operator is kept, whoever forms it."""

import torch
from torch import Tensor


def ds_unit(dtype: torch.dtype, *weights: Tensor | None) -> Tensor:
    """A power of two, 0-d: dS divided by it fits `dtype`, and its smallest parts do not vanish.

    The weights of a loss are about 1 / (2 M), and a gradient scaler multiplies them by 65,536. So
    the unit is the power of two at or below the largest weight (1 if all are 0). fp16 ends at
    65,504 and dS at four units (two sides, weights below twice the unit), so there it is 2^-13 of
    that.
    """
    largest = torch.stack([w.abs().max() for w in weights if w is not None]).max()
    exponent = torch.frexp(largest).exponent
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1)
    unit = torch.where(largest > 0, unit, torch.ones_like(unit))
    return unit * 2.0**-13 if dtype == torch.float16 else unit
