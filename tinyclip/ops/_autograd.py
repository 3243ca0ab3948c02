"""What every op's autograd.Function shares: how it is called, and one answer to double backward."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    "tinyclip.ops: double backward is not supported (the gradient of an op of this package was"
    " differentiated; create_graph=True)"
)


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, also where torch.compile would refuse it for a tensor given
    twice, as the keys that are values."""
    if torch.compiler.is_compiling():
        seen, distinct = [], []
        for argument in arguments:
            if isinstance(argument, Tensor):
                if any(argument is other for other in seen):
                    argument = argument.view_as(argument)
                else:
                    seen.append(argument)
            distinct.append(argument)
        arguments = distinct
    return function.apply(*arguments)


class _Raise(torch.autograd.Function):
    """Identity of its first `count` tensors that raises when it is differentiated."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_MESSAGE)


def first_order(
    gradients: Iterable[Tensor | None], *sources: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients, such that differentiating them raises: to be returned from a backward.

    `sources` are what they were computed from, unless they know it themselves. The node that raises
    lies between the two, so that no search for a path to an input passes it by.
    """
    gradients = tuple(gradients)
    if not torch.is_grad_enabled():  # grad mode is on in backward only under create_graph=True
        return gradients
    wanted = [i for i, gradient in enumerate(gradients) if gradient is not None]
    below = [source for source in sources if source is not None and source.requires_grad]
    marked = _Raise.apply(len(wanted), *(gradients[i] for i in wanted), *below)
    result: list[Tensor | None] = [None] * len(gradients)
    for i, gradient in zip(wanted, marked, strict=True):
        result[i] = gradient
    return tuple(result)


def _mark(gradients, _):
    # None leaves the gradients as they are: handing them back would cost as much as the hook.
    return first_order(gradients) if torch.is_grad_enabled() else None


def once(result: Tensor) -> Tensor:
    """The result of a PyTorch function, differentiable once: for those it could twice.

    As `barrier`, at the cost of one call in backward; torch.compile does not trace it.
    """
    if result.grad_fn is not None:
        result.grad_fn.register_hook(_mark)
    return result


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        return first_order(gradients)


def barrier(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs, differentiable once: for compositions that PyTorch could differentiate twice.

    So the answer to double backward does not depend on the backend.
    """
    wanted = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return inputs
    guarded = applied(_Barrier, *(inputs[i] for i in wanted))
    result = list(inputs)
    for i, x in zip(wanted, guarded, strict=True):
        result[i] = x
    return tuple(result)
