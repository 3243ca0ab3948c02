"""Thin modules over the ops, state-dict compatible with their PyTorch and open_clip twins.

`MultiheadAttention` and `LayerNorm` stand in for PyTorch's, `GELUMLP` and `ResidualAttentionBlock`
for open_clip's, `ContrastiveLoss` for CLIP's loss and TinyCLIP's. docs/models.md shows them in use.
"""

from tinyclip.nn.attention import MultiheadAttention
from tinyclip.nn.block import ResidualAttentionBlock
from tinyclip.nn.layer_norm import LayerNorm
from tinyclip.nn.loss import ContrastiveLoss
from tinyclip.nn.mlp import GELUMLP

__all__ = [
    "GELUMLP",
    "ContrastiveLoss",
    "LayerNorm",
    "MultiheadAttention",
    "ResidualAttentionBlock",
]
