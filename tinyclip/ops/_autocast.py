"""How an op takes part in torch.autocast."""

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on this device, None where it is off."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def like_linear(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts the inputs of F.linear: every float tensor but fp64. Where the first
    is fp64 it stays the dtype of all, and none is rounded on the way."""
    leading = next(tensor for tensor in tensors if tensor is not None)
    dtype = autocast_dtype(leading.device)
    if dtype is None or leading.dtype == torch.float64:
        return tensors
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )
