"""The `triton` backend of the contrastive passes: its kernels, walked panel by panel."""

from functools import partial

import torch
from torch import Tensor

from tinyclip.ops import _panels
from tinyclip.triton_kernels import contrastive


class Kernels:
    stats = staticmethod(contrastive.stats)
    grads = staticmethod(contrastive.grads)

    one_dtype = False

    @staticmethod
    def tile(kind: str, dtype: torch.dtype, teacher: bool) -> tuple[int, int]:
        return contrastive.tile_of(kind, dtype, teacher)[:2]

    @staticmethod
    def features(x: Tensor) -> Tensor:
        return x


contrastive_stats = partial(_panels.contrastive_stats, Kernels)
contrastive_grads = partial(_panels.contrastive_grads, Kernels)
