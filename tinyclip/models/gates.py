"""TinyCLIP's masks as a forward pass takes them. Letters: C channels, H heads, F hidden."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class TowerGates(NamedTuple):
    """What multiplies the parts of one tower; where a gate is 0 the part is not there.

    Args:
        channels: (C,), of the stream: the embeddings, what every half of a block adds, and the rows
            of the projection. Norms are over the channels where it is not 0, and not multiplied.
        heads: (H,) of each layer, (0,) of one without attention.
        hidden: (F,) of each layer, (0,) of one without an MLP.
    """

    channels: Tensor
    heads: Sequence[Tensor]
    hidden: Sequence[Tensor]

    def layers(self) -> list[dict[str, Tensor]]:
        """The arguments of each `nn.ResidualAttentionBlock`."""
        return [
            {"head_gate": head, "hidden_gate": hidden, "channel_gate": self.channels}
            for head, hidden in zip(self.heads, self.hidden, strict=True)
        ]


class Gates(NamedTuple):
    """Of both towers."""

    image: TowerGates
    text: TowerGates
