"""The two-layer perceptron of a transformer block. Letters: C channels, F hidden."""

import warnings

from torch import Tensor, nn

from tinyclip import ops
from tinyclip.ops.gelu_mlp import ACTIVATIONS


def gated(layer: nn.Linear, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``gate * layer(x)``: C_out C numbers are multiplied, not tokens C_out."""
    if gate is None:
        return layer.weight, layer.bias
    gate = gate.to(layer.weight.dtype)
    return layer.weight * gate[:, None], None if layer.bias is None else layer.bias * gate


class GELUMLP(nn.Module):
    """``c_proj(act(c_fc(x)))``, computed by `ops.gelu_mlp`; open_clip's parameter names.

    Args:
        width: C, in and out.
        hidden: F; 0 leaves c_proj's bias alone, as in a pruned TinyCLIP layer.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"quick_gelu"`` or ``"relu"``.
        bias: whether both layers have one.

    Raises:
        ValueError: a size is out of range; in forward, as `ops.gelu_mlp`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str = "gelu",
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if width < 1 or hidden < 0:
            raise ValueError(
                f"GELUMLP: width must be positive and hidden not negative, got {width} and {hidden}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"GELUMLP: activation must be one of {ACTIVATIONS}, got {activation!r}"
            )
        self.activation = activation
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.c_fc = nn.Linear(width, hidden, bias, device=device, dtype=dtype)
            self.c_proj = nn.Linear(hidden, width, bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, hidden_gate: Tensor | None = None, out_gate: Tensor | None = None
    ) -> Tensor:
        """x (..., C) -> (..., C); hidden_gate (F,) multiplies the activation, out_gate (C,) y."""
        return ops.gelu_mlp(
            x,
            self.c_fc.weight,
            self.c_fc.bias,
            *gated(self.c_proj, out_gate),
            activation=self.activation,
            hidden_gate=hidden_gate,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
