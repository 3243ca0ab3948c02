"""GELU-MLP's peer: Linear, activation, Linear, as CLIP code writes it. y (M, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Tensors


def activation(h: Tensor, s: dict) -> Tensor:
    return h * torch.sigmoid(1.702 * h) if s["activation"] == "quick_gelu" else F.gelu(h)


def eager(t: Tensors, s: dict) -> Tensor:
    """Linear, activation, Linear; QuickGELU as OpenAI and TinyCLIP write it."""
    hidden = activation(F.linear(t["x"], t["fc1_weight"], t["fc1_bias"]), s)
    if "hidden_gate" in t:
        hidden = hidden * t["hidden_gate"]
    return F.linear(hidden, t["fc2_weight"], t["fc2_bias"])
