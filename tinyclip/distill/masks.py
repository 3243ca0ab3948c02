"""Learned masks: which channels, heads and hidden units of a CLIP a smaller one is made of.

Wu et al. 2023 (TinyCLIP), section 3.2; the masks are hard concrete (Louizos et al. 2018), the
constraint on their size is CoFi's (Xia et al. 2022).

Letters: C channels, H heads, D head dim, F hidden, d the original's channels, a log-alpha.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tinyclip.distill.prune import prune
from tinyclip.models import CLIP, CLIPConfig, Gates, TextConfig, TowerGates, VisionConfig

GAMMA, ZETA, BETA, EPSILON = -0.1, 1.1, 2 / 3, 1e-6
START, BOUNDS = 10.0, (math.log(0.01), math.log(100))
_LAMBDA = 10.0
# logit(-GAMMA / (ZETA - GAMMA)): a stretched gate is 0 there.
_ZERO = math.log(-GAMMA / ZETA)

Tower = VisionConfig | TextConfig


def sampled_gate(a: Tensor, uniform: Tensor) -> Tensor:
    """``clip(sigmoid((logit u + a) / BETA) (ZETA - GAMMA) + GAMMA, 0, 1)``, of u in [0, 1)."""
    uniform = EPSILON + (1 - 2 * EPSILON) * uniform
    stretched = torch.sigmoid((torch.logit(uniform) + a) / BETA) * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0, 1)


def keep_probability(a: Tensor) -> Tensor:
    """How often `sampled_gate` is not 0: ``sigmoid(a + 1.5986)``, within EPSILON of 0 and 1."""
    return 1 - torch.sigmoid(BETA * _ZERO - a).clamp(EPSILON, 1 - EPSILON)


def settled_gate(a: Tensor, least: int = 0) -> Tensor:
    """The gates of one group after learning, with no chance in them.

    ``round(n - sum of keep_probability)`` of them, those of the smallest a, are 0; the others are
    ``sigmoid(0.8 a / BETA)``. Nothing waits for the device.

    Args:
        a: (n,).
        least: how many stay in any case.
    """
    gone = torch.round(len(a) - keep_probability(a).sum()).clamp(max=len(a) - least)
    rank = a.argsort(stable=True).argsort()
    return torch.where(rank >= gone, torch.sigmoid(0.8 * a / BETA), 0.0)


class TowerMasks(nn.Module):
    """The log-alphas of one tower: `channels` (C,), and of all layers `heads` and `hidden`.

    Args:
        tower: what is masked; where a layer lacks a half, there is nothing to mask.
        original: the tower whose sizes count.
    """

    def __init__(self, tower: Tower, original: Tower):
        super().__init__()
        self._heads = [layer.heads or 0 for layer in tower.layers]
        self._hidden = [layer.mlp_width or 0 for layer in tower.layers]
        self._per_head = _per_head(original)
        for name, count in (
            ("channels", tower.width),
            ("heads", sum(self._heads)),
            ("hidden", sum(self._hidden)),
        ):
            self.register_parameter(name, nn.Parameter(torch.full((count,), START)))

    def sample(self, uniform: Iterator[Tensor]) -> TowerGates:
        """Gates of the next numbers of `uniform`, which are (C,), (sum of H,) and (sum of F,)."""
        channels, heads, hidden = (sampled_gate(a, next(uniform)) for a in self.parameters())
        return TowerGates(channels, heads.split(self._heads), hidden.split(self._hidden))

    def gates(self) -> TowerGates:
        """The settled gates; at least one channel stays."""
        return TowerGates(
            settled_gate(self.channels, least=1),
            [settled_gate(a) for a in self.heads.split(self._heads)],
            [settled_gate(a) for a in self.hidden.split(self._hidden)],
        )

    def size(self) -> Tensor:
        """Expected parameters: each pair of a channel and a head or hidden unit, both kept."""
        channels, heads, hidden = (keep_probability(a).sum() for a in self.parameters())
        return _size(channels, heads, hidden, self._per_head)


class Masks(nn.Module):
    """The masks of both towers, and the two multipliers of their joint constraint.

    TinyCLIP has a pair of multipliers for each tower and uses their mean; as all have one gradient,
    one pair is the same.

    Args:
        config: of the model that is masked.
        original: the model whose parameters the sparsity is a share of, by default this one. A
            later stage masks the student of the one before, and gives the first stage's model.
    """

    def __init__(self, config: CLIPConfig, original: CLIPConfig | None = None):
        super().__init__()
        original = original or config
        self.image = TowerMasks(config.vision, original.vision)
        self.text = TowerMasks(config.text, original.text)
        self.lambda_1 = nn.Parameter(torch.tensor(_LAMBDA))
        self.lambda_2 = nn.Parameter(torch.tensor(_LAMBDA))
        self._total = sum(prunable_parameters(original))

    def log_alphas(self) -> list[nn.Parameter]:
        return [*self.image.parameters(), *self.text.parameters()]

    def uniform(self, seed: int, step: int) -> list[Tensor]:
        """Numbers in [0, 1) for `sample`, on the masks' device: of the two integers alone.

        So a run that goes on from a checkpoint, and every rank of it, draws the same masks.
        """
        log_alphas = self.log_alphas()
        sizes, like = [len(a) for a in log_alphas], log_alphas[0]
        words = np.array([seed, step], dtype=np.int64).view(np.uint64)
        bits = np.random.Philox(key=words).random_raw(sum(sizes))
        drawn = torch.from_numpy((bits >> np.uint64(40)).astype(np.float32)) * 2.0**-24
        # Only a pinned copy does not wait for the GPU.
        drawn = drawn.pin_memory() if like.is_cuda else drawn
        return list(drawn.to(like.device, like.dtype, non_blocking=True).split(sizes))

    def sample(self, uniform: list[Tensor]) -> Gates:
        """Random gates, differentiable in the log-alphas: those of a training step."""
        numbers = iter(uniform)
        return Gates(self.image.sample(numbers), self.text.sample(numbers))

    def gates(self) -> Gates:
        """The settled gates: those of evaluation, and of `prune`."""
        return Gates(self.image.gates(), self.text.gates())

    def sparsity(self) -> Tensor:
        """The expected share of the original's prunable parameters that is gone; differentiable."""
        return 1 - (self.image.size() + self.text.size()) / self._total

    def penalty(self, missing: Tensor) -> Tensor:
        """``lambda_1 m + lambda_2 m^2``: the Lagrangian term of what is missing, m >= 0."""
        return self.lambda_1 * missing + self.lambda_2 * missing.square()


class Ramp(NamedTuple):
    """A sparsity that rises from `start` to `end` over the first `steps` steps, then stays."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """The target of a step, from 0."""
        share = min(1.0, step / self.steps) if self.steps else 1.0
        return self.start + (self.end - self.start) * share


class Masked(nn.Module):
    """A CLIP under masks that are learned with it: what `tinyclip.train.fit` takes for a model.

    In training mode each step has random gates, in eval mode they are settled.

    Args:
        clip: trained, too.
        masks: of its config.
        target: the least sparsity at a step, such as a `Ramp`.
        lr: of the log-alphas, and of the multipliers, which ascend; constant, without decay.
        seed: of the gates.
    """

    def __init__(
        self,
        clip: CLIP,
        masks: Masks,
        target: Callable[[int], float],
        *,
        lr: float = 0.02,
        seed: int = 0,
    ):
        super().__init__()
        self.clip, self.masks = clip, masks
        self._target, self._lr, self._seed = target, lr, seed
        self.begin(0)

    def begin(self, step: int) -> None:
        """Draw for a step: a function of the seed and the step, for any number of forwards."""
        self._uniform = self.masks.uniform(self._seed, step)
        self._least = self._target(step)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `CLIP.forward`, under the gates of the step."""
        gates = self.masks.sample(self._uniform) if self.training else self.masks.gates()
        return self.clip(image, text, gates)

    def constrained(self, objective: Callable[..., dict[str, Tensor]]) -> Callable[..., dict]:
        """An objective, and the Lagrangian term ``lambda_1 m + lambda_2 m^2`` of the step, with
        ``m = max(target - sparsity, 0)``; `target`, `sparsity` and the multipliers are its terms.
        """

        def with_penalty(*args: Any) -> dict[str, Tensor]:
            terms, sparsity = objective(*args), self.masks.sparsity()
            loss = terms["loss"] + self.masks.penalty((self._least - sparsity).clamp(min=0))
            return {
                **terms,
                "loss": loss,
                "target": torch.tensor(self._least),
                "sparsity": sparsity.detach(),
                "lambda_1": self.masks.lambda_1.detach(),
                "lambda_2": self.masks.lambda_2.detach(),
            }

        return with_penalty

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of what is not in the CLIP."""
        multipliers = [self.masks.lambda_1, self.masks.lambda_2]
        shared = {"lr": self._lr, "weight_decay": 0.0, "scheduled": False}
        return [
            {"params": self.masks.log_alphas(), "bounds": BOUNDS, **shared},
            {"params": multipliers, "maximize": True, **shared},
        ]

    @torch.no_grad()
    def finished(self) -> CLIP:
        """The smaller model that the settled gates leave."""
        return prune(self.clip, self.masks.gates())


def prunable_parameters(config: CLIPConfig) -> tuple[int, int]:
    """Of the image and of the text tower: attention and MLPs with their biases, nothing else.

    ``layers (4 d^2 + 4 d + 8 d^2 + 5 d)`` where H D = d and F = 4 d: 85.0 M and 37.8 M of ViT-B-32.
    """
    return tuple(
        sum(
            (layer.heads or 0) * tower.head_dim * (4 * tower.width + 4)
            + (
                0
                if layer.mlp_width is None
                else 2 * tower.width * layer.mlp_width + layer.mlp_width + tower.width
            )
            for layer in tower.layers
        )
        for tower in (config.vision, config.text)
    )


def sparsity_of(config: CLIPConfig, original: CLIPConfig) -> float:
    """What `Masks.sparsity` is where all of a model is kept, counted of `original`."""
    sizes = (
        _size(
            tower.width,
            sum(layer.heads or 0 for layer in tower.layers),
            sum(layer.mlp_width or 0 for layer in tower.layers),
            _per_head(of),
        )
        for tower, of in ((config.vision, original.vision), (config.text, original.text))
    )
    return 1 - sum(sizes) / sum(prunable_parameters(original))


def _per_head(original: Tower) -> float:
    """Parameters of a head for each channel: ``(4 d^2 + 4 d) / H / d``, with H D = d."""
    return original.head_dim * (4 * original.width + 4) / original.width


def _size(channels: Any, heads: Any, hidden: Any, per_head: float) -> Any:
    """Parameters of so many channels, and heads and hidden units of all layers."""
    return channels * (per_head * heads + 2 * hidden)
