"""The modules of other libraries that can be swapped, found by their class.

No library is imported for this: an instance of its classes can only be there if it was already.
"""

import inspect
import sys
from typing import NamedTuple

from torch import nn

from tinyclip.integrations.swaps import of_open_clip, of_timm, of_torch, of_transformers
from tinyclip.integrations.swaps.base import Swap

SWAPS = (
    ("torch.nn", "MultiheadAttention", of_torch.MultiheadAttention),
    ("torch.nn", "LayerNorm", of_torch.LayerNorm),
    ("torch.nn", "Sequential", of_torch.SequentialMLP),
    *of_transformers.SWAPS,
    *of_open_clip.SWAPS,
    *of_timm.SWAPS,
)
_WRITTEN_IN = "its MLP is written into its forward"
REFUSED = (
    ("torch.nn", "TransformerEncoderLayer", "mlp", _WRITTEN_IN),
    ("torch.nn", "TransformerDecoderLayer", "mlp", _WRITTEN_IN),
    *of_timm.REFUSED,
)


class Verdict(NamedTuple):
    """What can be done with a module: a swap, or the reason why not."""

    option: str
    swap: type[Swap] | None
    reason: str | None = None


class Known:
    """The table, with the classes of the libraries that are imported."""

    def __init__(self):
        self._swaps = dict(_found(SWAPS))
        self._refused = {cls: rest for cls, *rest in _found(REFUSED)}
        self._unread = tuple(cls for (cls,) in _found(of_transformers.WEIGHTS_UNREAD))

    def weights_unread(self, module: nn.Module) -> nn.Module | None:
        """The module's attention, where it is called with need_weights=True for nothing."""
        return module.attention if isinstance(module, self._unread) else None

    def judge(self, module: nn.Module) -> Verdict | None:
        """None for a module that is nothing of ours."""
        for cls in type(module).__mro__:
            if cls in self._refused:
                option, reason = self._refused[cls]
                return Verdict(option, None, reason)
            if cls in self._swaps:
                swap = self._swaps[cls]
                if swap is of_torch.SequentialMLP and not swap.fits(module):
                    return None
                reason = _foreign(module, cls, swap) or swap.why_not(module)
                return Verdict(swap.option, None if reason else swap, reason)
        return None


def _found(rows):
    for place, name, *rest in rows:
        cls = getattr(sys.modules.get(place), name, None)
        if isinstance(cls, type):
            yield cls, *rest


def _foreign(module: nn.Module, cls: type[nn.Module], swap: type[Swap]) -> str | None:
    """Why the module's forward is not the one that the swap stands for."""
    if "forward" in vars(module):
        return "its forward was replaced already"
    if type(module).forward is not cls.forward:
        return f"a {cls.__name__} with a forward of its own"
    theirs = tuple(inspect.signature(cls.forward).parameters)
    ours = tuple(name for name in inspect.signature(swap.forward).parameters if name != "residual")
    if theirs != ours:
        return f"a version with other arguments: {', '.join(theirs[1:])}"
    return None
