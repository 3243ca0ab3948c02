"""Tile sizes: a shipped table by (architecture, dtype, head dim, length bucket, causal)."""

from typing import NamedTuple

import torch


class AttentionConfig(NamedTuple):
    """Tile of queries, tile of keys, warps a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def attention_config(kind: str, q: torch.Tensor, length: int, causal: bool) -> AttentionConfig:
    if q.dtype == torch.float32:
        return AttentionConfig(32, 32, 4, 1)
    return AttentionConfig(64, 64, 4, 2)
