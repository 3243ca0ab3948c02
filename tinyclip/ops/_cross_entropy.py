"""The cross-entropies that the contrastive operator's statistics stand for."""

import torch
from torch import Tensor


def cross_entropy(stats: Tensor, positive: Tensor, alpha: float) -> Tensor:
    """Of each row (column): (1 - alpha) hard + alpha soft, from its five numbers."""
    m, l, _, l_t, u = stats  # noqa: E741
    log_l = torch.log(l)
    if alpha == 0.0:
        return log_l + (m - positive)
    soft = log_l - u / l_t
    if alpha == 1.0:
        return soft
    return (1 - alpha) * (log_l + (m - positive)) + alpha * soft
