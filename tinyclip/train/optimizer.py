"""AdamW with open_clip's groups, and its learning rate as a function of the step."""

import math

import torch
from torch import nn

from tinyclip.train.settings import Settings


def learning_rate(step: int, lr: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0, as open_clip's ``cosine_lr``.

    Args:
        step: from 0.
        lr: the peak, reached at step ``warmup - 1``.
        warmup, steps: of the rise, and of the whole run.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to vectors, norms, biases and the logit scale."""
    parts = name.split(".")
    norm = any(part.startswith(("ln_", "bn")) for part in parts)
    return parameter.ndim >= 2 and not norm and parts[-1] not in ("bias", "logit_scale")


def clip_of(model: nn.Module) -> nn.Module:
    """The CLIP itself, of a CLIP or of a module that holds one, such as `distill.Masked`."""
    return getattr(model, "clip", model)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW over what requires grad, in two groups: with weight decay and without.

    Where the model is a CLIP within another module, such as `distill.Masked`, the groups of what
    that module adds follow. They may set what AdamW knows, and besides ``scheduled`` (False: a
    constant lr) and ``bounds`` (within which `Update` keeps the parameters).

    Fused: one kernel, which can leave out a step on the device's own word.
    """
    clip = clip_of(model)
    trained = [(name, p) for name, p in clip.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decays(name, p) == decay], "weight_decay": weight}
        for decay, weight in ((False, 0.0), (True, settings.wd))
    ]
    groups += [] if clip is model else model.groups()
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
