"""What a forward pass costs, from the shapes alone.

Letters: L tokens, C channels, I heads times their width, F hidden, P patch side, E embedding.
"""

import math
from typing import NamedTuple

from tinyclip.models.config import CLIPConfig, TextConfig, VisionConfig


class Macs(NamedTuple):
    """Multiply-accumulates of one image, and of one caption."""

    image: int
    text: int


def count_macs(config: CLIPConfig, text_tokens: int | None = None) -> Macs:
    """Multiply-accumulates of the matrix products: ``4 L C I + 2 L^2 I + 2 L C F`` a layer.

    The patch convolution and the projections count, norms, activations and the look-up of
    embeddings do not; a causal product counts whole.

    Args:
        config: irregular towers are summed layer by layer.
        text_tokens: of a caption, by default the context length.

    Returns:
        `Macs`.
    """
    vision, text = config.vision, config.text
    patches = math.prod(vision.grid) * 3 * vision.patch_size**2 * vision.width
    image = patches + _layers(vision, vision.tokens) + vision.width * config.embed_dim
    caption = _layers(text, text_tokens or text.tokens) + text.width * config.embed_dim
    return Macs(image, caption)


def _layers(tower: VisionConfig | TextConfig, tokens: int) -> int:
    total = 0
    for layer in tower.layers:
        inner = (layer.heads or 0) * tower.head_dim
        total += 4 * tokens * tower.width * inner + 2 * tokens**2 * inner
        total += 2 * tokens * tower.width * (layer.mlp_width or 0)
    return total
