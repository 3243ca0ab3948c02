"""Memory layouts that every backend accepts: rows whose elements are adjacent."""

import math

from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """x, copied unless the elements of its last dimension are adjacent in memory."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (rows, C) of unit stride: a view where the strides allow one."""
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
