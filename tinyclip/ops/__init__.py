"""What can be computed: one file an op, every op through any backend that can run it.

`attention`, `attention_qkv`, `gelu_mlp`, `layer_norm`, `contrastive_loss`, and the two passes
`contrastive_stats` and `contrastive_grads` that other losses can be built on. `reference.py` holds
the maths, `_torch.py` PyTorch's fastest built-ins, `_contracts.py` what torch.library knows of
the ops, `_dispatch.py` who computes them. docs/ops.md is the page for users.
"""

from tinyclip.ops._contracts import SAC_SAVE_OPS
from tinyclip.ops._dispatch import BACKENDS, BackendUnavailable, backend, explain
from tinyclip.ops.attention import attention, attention_qkv
from tinyclip.ops.contrastive import (
    Stats,
    Teacher,
    contrastive_grads,
    contrastive_loss,
    contrastive_stats,
)
from tinyclip.ops.gelu_mlp import gelu_mlp
from tinyclip.ops.layer_norm import layer_norm

OPS = (
    "attention",
    "attention_qkv",
    "gelu_mlp",
    "layer_norm",
    "contrastive_loss",
    "contrastive_stats",
    "contrastive_grads",
)

__all__ = [
    "BACKENDS",
    "OPS",
    "SAC_SAVE_OPS",
    "BackendUnavailable",
    "Stats",
    "Teacher",
    "attention",
    "attention_qkv",
    "backend",
    "contrastive_grads",
    "contrastive_loss",
    "contrastive_stats",
    "explain",
    "gelu_mlp",
    "layer_norm",
]
