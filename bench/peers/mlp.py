"""GELU-MLP's peers: Linear, activation, Linear, and our two implementations. y (M, C)."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import CannotRun, Peer, Tensors
from bench.timing import Timed


def activation(h: Tensor, s: dict) -> Tensor:
    return h * torch.sigmoid(1.702 * h) if s["activation"] == "quick_gelu" else F.gelu(h)


def eager(t: Tensors, s: dict) -> Tensor:
    """Linear, activation, Linear; QuickGELU as OpenAI and TinyCLIP write it."""
    hidden = activation(F.linear(t["x"], t["fc1_weight"], t["fc1_bias"]), s)
    if "hidden_gate" in t:
        hidden = hidden * t["hidden_gate"]
    return F.linear(hidden, t["fc2_weight"], t["fc2_bias"])


def ours(implementation: str) -> Peer:
    """One of our own two, whichever the table chose: what the table is written from."""

    @contextmanager
    def pinned():
        import tinyclip
        from tinyclip.triton_kernels.gelu_mlp import only

        with tinyclip.backend("triton"), only(implementation):
            yield

    def build(t: Tensors, s: dict, device: str) -> Timed:
        if device == "cpu":
            raise CannotRun("this backend exists on CUDA only")
        from bench import calls
        from tinyclip import ops

        return Timed(lambda: calls.gelu_mlp(ops, t, s), pinned)

    return Peer(build, engine=True)
