"""LayerNorm's peers: y, or (y, x + residual); and two ways to mask channels without a kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Tensors


def eager(t: Tensors, s: dict) -> Tensor | tuple[Tensor, Tensor]:
    """The add (if any) and F.layer_norm."""
    x = t["x"] + t["residual"] if "residual" in t else t["x"]
    y = F.layer_norm(x, x.shape[-1:], t["weight"], t["bias"])
    return (y, x) if "residual" in t else y


def multiplied(t: Tensors, s: dict) -> Tensor:
    """A masked LayerNorm without indexing: sums over all channels, the dropped ones times zero."""
    kept = t["channel_mask"].to(t["x"].dtype)
    count = kept.sum()
    centred = (t["x"] - (t["x"] * kept).sum(-1, keepdim=True) / count) * kept
    variance = (centred * centred).sum(-1, keepdim=True) / count
    return (centred * torch.rsqrt(variance + 1e-5) * t["weight"] + t["bias"]) * kept


def tinyclip_masked(t: Tensors, s: dict) -> Tensor:
    """TinyCLIP's mask phase: find the kept channels (a host sync), gather, normalise, scatter."""
    kept = torch.where(t["channel_mask"])[0]
    normed = F.layer_norm(
        t["x"].index_select(-1, kept), kept.shape, t["weight"][kept], t["bias"][kept]
    )
    return torch.zeros_like(t["x"]).index_copy(-1, kept, normed)
