"""Which activation of `ops.gelu_mlp` a module or function is: found by what it computes.

Names and classes of GELU's variants differ from library to library, and a wrong one loses accuracy
in silence. So the activation itself is evaluated in fp64, and must be one of the formulas.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
# The closest two formulas are 5e-4 apart; constants that a library wrote with ten digits are 1e-11.
CLOSE = 1e-10


def formula_of(activation: Any) -> str | None:
    """The name under which `ops.gelu_mlp` has the activation, or None.

    None, too, for what has parameters, buffers or parts, and for what changes with train and eval.
    """
    if not callable(activation):
        return None
    variants = [activation]
    if isinstance(activation, nn.Module):
        if [*activation.children(), *activation.parameters(), *activation.buffers()]:
            return None
        variants = [copy.copy(activation).train(mode) for mode in (True, False)]
    found = {_formula(variant) for variant in variants}
    return found.pop() if len(found) == 1 else None


def _formula(activation: Callable[[Tensor], Tensor]) -> str | None:
    near = torch.linspace(-20, 20, 4001, dtype=torch.float64, device="cpu")
    x = torch.cat([near, torch.tensor([-1e4, -1e2, 1e2, 1e4], dtype=near.dtype, device="cpu")])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = activation(x.clone())
    except Exception:  # whatever a stranger raises, it is no activation that is known here
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    for name, formula in FORMULAS.items():
        if ((y - formula(x)).abs() <= CLOSE * x.abs().clamp_min(1)).all():
            return name
    return None
