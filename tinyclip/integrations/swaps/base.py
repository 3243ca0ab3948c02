"""How one module's forward is swapped: its class becomes a child of a `Swap` and of its own class.

An instance that keeps its `__dict__` keeps its parameters, hooks and names; `isinstance` still
holds, `super().forward` is the host's own forward, and copies and pickles carry the swap along.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from tinyclip.integrations.swaps.masks import Masks

MARK = "_tinyclip"  # the one attribute that a swapped module has more than before


@dataclass(eq=False)
class Session:
    """What the modules of one call of `accelerate` share.

    `declined` counts (class, reason) of the calls that the host's forward computed.
    """

    masks: Masks
    strict: bool = False
    declined: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(eq=False)
class State:
    """What a swapped module knows besides its own attributes."""

    session: Session
    activation: Any = None
    formula: str | None = None
    weights_read: bool = True


class _Made(type):
    """What a swapped module's class constructs, as a Sequential's slice is, is the host's."""

    def __call__(cls, *args, **kwargs):
        return cls._parts[1](*args, **kwargs)


class Swap:
    """The part of a swapped module's class that comes before the host's class."""

    option: ClassVar[str]  # the argument of `accelerate` that switches it: attention, mlp, norm
    _parts: ClassVar[tuple[type["Swap"], type[nn.Module]]]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """What about this instance, now and for good, the ops do not compute."""
        return None

    @classmethod
    def learn(cls, module: nn.Module, session: Session) -> State:
        """The state that the swapped module is given."""
        return State(session)

    @classmethod
    def limit(cls, module: nn.Module) -> str | None:
        """Which calls of a swapped instance are left to the host."""
        return None

    @classmethod
    def example(cls, module: nn.Module) -> tuple[str, tuple, dict] | None:
        """(op, arguments, keyword arguments) of a typical call, for the report's backend."""
        return None

    @classmethod
    def detail(cls, module: nn.Module) -> str:
        """What the report says of the module."""
        return ""

    def _decline(self, reason: str) -> None:
        """Count a call that the host computes; under strict, raise instead."""
        session = self._tinyclip.session
        name = self._parts[1].__name__
        if session.strict:
            raise RuntimeError(f"accelerate: {name}: {reason}, and strict is True")
        # A graph would count at every compilation, and a counter that changes would cause them.
        if not torch.compiler.is_compiling():
            session.declined[name, reason] += 1

    def _get_name(self) -> str:
        return f"tinyclip.{self._parts[1].__name__}"

    def __reduce_ex__(self, protocol):
        # The class is made when it is needed and lies in no module where pickle could find it.
        _, _, *rest = super().__reduce_ex__(max(2, protocol))
        return _instance, self._parts, *rest


_CLASSES: dict[tuple[type[Swap], type[nn.Module]], type] = {}


def swapped_class(swap: type[Swap], host: type[nn.Module]) -> type:
    """The class of host's instances whose forward is the swap's; one for each pair."""
    made = _CLASSES.get((swap, host))
    if made is None:
        body = {"__module__": swap.__module__, "__doc__": swap.__doc__, "_parts": (swap, host)}
        made = _CLASSES[swap, host] = _Made(host.__name__, (swap, host), body)
    return made


def _instance(swap: type[Swap], host: type[nn.Module]) -> nn.Module:
    return object.__new__(swapped_class(swap, host))


def install(module: nn.Module, swap: type[Swap], session: Session) -> None:
    """Swap the module's forward."""
    state = swap.learn(module, session)
    module.__class__ = swapped_class(swap, type(module))
    setattr(module, MARK, state)


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swap)


def is_covered(module: nn.Module) -> bool:
    """Whether another class was put over the swapped one since, as fully_shard does."""
    return "_parts" not in vars(type(module))


def remove(module: nn.Module) -> None:
    """Give a swapped module its class back."""
    module.__class__ = module._parts[1]
    delattr(module, MARK)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, which a fused op would leave out."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether the module computes what its class says, no more and no less.

    LoRA, quantisation and sharding put other classes, forwards or hooks there, also later.
    """
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


def where(module: nn.Module) -> Mapping[str, Any]:
    """Device and dtype of the module's first float parameter, for tensors of an example."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": torch.device("cpu"), "dtype": torch.float32}
