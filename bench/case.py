"""A case: one op at one size, and all that is needed to gate it, time it and place it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from bench.inputs import Draw
from bench.peers import Maths, Peer, Tensors
from bench.work import Passes

FORWARD, BOTH = "forward", "forward+backward"
FORWARD_GRAPHED, GRAPHED = "forward, graphed", "forward+backward, graphed"
# The replay of a CUDA graph: the kernels without their launches.
GRAPHS = (FORWARD_GRAPHED, GRAPHED)


@dataclass(frozen=True)
class Case:
    """One op at one size, or a step of a whole model.

    Ours is ``call(ops, tensors, sizes)``, or, where it has to be built first, the peer `ours`;
    with neither PyTorch alone is timed.
    """

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
    ours: Peer | None = None
    # A model under autocast: its gradients are judged as one vector, at the precision of `dtype`.
    whole_model: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    @property
    def has_ours(self) -> bool:
        return self.call is not None or self.ours is not None

    @property
    def has_backward(self) -> bool:
        return any("backward" in mode for mode in self.modes)

    def draw(self, device: str, seed: int = 0, reduced: bool = False) -> Tensors:
        """Fresh random inputs, of the gate's smaller size if `reduced`."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = {**self.sizes, **(self.reduced if reduced else {})}
        return self.inputs(sizes, Draw(device, self.dtype, generator))

    def passes(self) -> Passes:
        """Exact FLOPs and least bytes of the forward and of the backward."""
        return self.work(dict(self.sizes), self.dtype)


def small(case: Case) -> Case:
    """The case at a small batch, for what is launched only to be compiled.

    Batches and rows stay multiples of 16, on which kernels are specialised; one picture stays one.
    """
    most = {"B": 2048 if case.op.startswith("contrastive") else 16, "M": 3200}
    sizes = {n: min(size, most[n]) if n in most else size for n, size in case.sizes.items()}
    return replace(case, sizes=sizes)
