"""A case: one op at one size, and all that is needed to gate it, time it and place it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.inputs import Draw
from bench.peers import Maths, Peer, Tensors
from bench.work import Passes

FORWARD, BOTH, GRAPHED = "forward", "forward+backward", "forward+backward, graphed"


@dataclass(frozen=True)
class Case:
    """One op at one size; ``call(ops, tensors, sizes)`` is None where PyTorch alone is timed."""

    op: str
    name: str
    device: str
    dtype: torch.dtype
    sizes: Mapping[str, object]
    inputs: Callable[[dict, Draw], Tensors]
    work: Callable[[dict, torch.dtype], Passes]
    call: Callable | None
    peers: Mapping[str, Peer]
    eager: Maths  # the yardsticks of the gate: the plain maths in the case's dtype ...
    fused: str | None = None  # ... and the peer that is PyTorch's own fused op, where it has one
    reduced: Mapping[str, int] = field(default_factory=dict)
    modes: tuple[str, ...] = (FORWARD, BOTH)

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def draw(self, device: str, seed: int = 0, reduced: bool = False) -> Tensors:
        """Fresh random inputs, of the gate's smaller size if `reduced`."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = {**self.sizes, **(self.reduced if reduced else {})}
        return self.inputs(sizes, Draw(device, self.dtype, generator))

    def passes(self) -> Passes:
        """Exact FLOPs and least bytes of the forward and of the backward."""
        return self.work(dict(self.sizes), self.dtype)
