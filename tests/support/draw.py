"""Inputs: eight regimes of values, odd memory layouts, upstream gradients; all from a seed."""

import random

import torch

REGIMES = (
    "normal",
    "integers",
    "confident",
    "negative",
    "large",
    "denormal",
    "constant",
    "one_hot",
)
LAYOUTS = (
    "contiguous",
    "transposed",
    "heads_first",
    "sliced",
    "offset",
    "strided_last",
    "expanded",
)
UPSTREAM = ("contiguous", "zero_stride", "transposed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """A seeded source of choices and tensors."""

    def __init__(self, seed: int, device: str = "cpu"):
        self.choices = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def one_of(self, values):
        return self.choices.choice(list(values))

    def chance(self, probability: float) -> bool:
        return self.choices.random() < probability

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def mask(self, *shape: int, keep: float = 0.6) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator) < keep).to(self.device)

    def values(self, regime: str, *shape: int, dtype=torch.float32, large: float = 1e4):
        """fp64 values of the regime; `confident` is up to the problem, and normal here.

        In fp16, whose sums of products end at 65504, `large` is 100 and integers go to 2.
        """
        large = min(large, 100.0) if dtype == torch.float16 else large
        x = self.normal(*shape)
        if regime == "integers":
            most = 2 if dtype == torch.float16 else 8
            return torch.randint(-most, most + 1, shape, generator=self.generator).double()
        if regime == "negative":
            return -x.abs()
        if regime == "large":
            return large * x.sign() * (0.5 + 0.5 * torch.rand(shape, generator=self.generator))
        if regime == "denormal":
            return x * torch.finfo(dtype).smallest_normal / 4
        if regime == "constant":
            return torch.full(shape, 3.0, dtype=torch.float64)
        if regime == "one_hot" and x.numel():
            return torch.nn.functional.one_hot(x.argmax(dim=-1), shape[-1]).double()
        return x

    def tensor(self, values: torch.Tensor, dtype: torch.dtype, layout: str = "contiguous"):
        """The values in `dtype` on the device, laid out in memory as `layout` says."""
        if layout == "expanded" and values.dim() > 1 and values.shape[0] > 1:
            # The one layout that changes the values: a batch of one, seen many times.
            return values[:1].to(self.device, dtype).contiguous().expand(values.shape)
        x = values.to(self.device, dtype)
        return relayout(x, layout)

    def upstream(self, like: torch.Tensor, kind: str) -> torch.Tensor:
        """A gradient for `like`: ordinary, one number seen everywhere, or transposed."""
        if kind == "zero_stride":
            one = self.normal(1).to(self.device, like.dtype)
            return one.reshape([1] * like.dim()).expand(like.shape)
        return relayout(self.normal(*like.shape).to(self.device, like.dtype), kind)


def relayout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other strides."""
    if layout == "transposed" and x.dim() > 1:
        order = [1, 0, *range(2, x.dim())]
        return x.permute(order).contiguous().permute(order)
    if layout == "heads_first" and x.dim() > 2:  # (B, L, H, D) over memory (B, H, L, D)
        order = [0, x.dim() - 2, *range(1, x.dim() - 2), x.dim() - 1]
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "offset":
        flat = x.new_full((x.numel() + 1,), float("nan"))
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    if layout == "strided_last":
        wide = x.new_full((*x.shape, 2), float("nan"))
        wide[..., 0] = x
        return wide[..., 0]
    return x.contiguous()
