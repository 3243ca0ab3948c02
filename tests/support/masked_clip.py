"""CLIP under TinyCLIP's masks, from a state dict alone: its reference in plain maths, and gates.

Letters: L tokens, H heads, D head dim, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.gelu_mlp import activation
from tinyclip.models import CLIP, CLIPConfig, Gates, TowerGates


def gates(config: CLIPConfig, seed: int = 0, zeros: float = 0.3) -> Gates:
    """Soft gates in fp64 that need a gradient; of each vector about a share of `zeros` is 0."""
    draw = torch.Generator().manual_seed(seed)

    def gate(count: int) -> Tensor:
        soft = torch.rand(count, generator=draw, dtype=torch.float64) + 0.3
        soft[torch.rand(count, generator=draw) < zeros] = 0
        return soft.requires_grad_()

    def tower(made) -> TowerGates:
        channels = gate(made.width)
        with torch.no_grad():
            channels[0] = 0.7  # one stays
        return TowerGates(
            channels,
            [gate(layer.heads or 0) for layer in made.layers],
            [gate(layer.mlp_width or 0) for layer in made.layers],
        )

    return Gates(tower(config.vision), tower(config.text))


def leaves(given: Gates) -> list[Tensor]:
    return [gate for tower in given for gate in (tower.channels, *tower.heads, *tower.hidden)]


def _norm(state, name: str, x: Tensor, kept: Tensor, eps: float) -> Tensor:
    """Over the kept channels, found and put back as TinyCLIP does; the others are 0."""
    (index,) = torch.where(kept)
    part = x.index_select(-1, index)
    mean = part.mean(-1, keepdim=True)
    part = (part - mean) / ((part - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    part = part * state[f"{name}.weight"][index] + state[f"{name}.bias"][index]
    return torch.zeros_like(x).index_copy(-1, index, part)


def _blocks(state, prefix: str, tower, given: TowerGates, config: CLIPConfig, x: Tensor, causal):
    kept, z = given.channels != 0, given.channels
    for number, layer in enumerate(tower.layers):
        start = f"{prefix}transformer.resblocks.{number}."
        if layer.heads is not None:
            y = _norm(state, start + "ln_1", x, kept, config.layer_norm_eps)
            y = F.linear(
                y, state[start + "attn.in_proj_weight"], state[start + "attn.in_proj_bias"]
            )
            q, k, v = y.unflatten(-1, (3, layer.heads, tower.head_dim)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) * tower.head_dim**-0.5
            if causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            heads = scores.softmax(-1) @ v * given.heads[number].view(1, -1, 1, 1)
            heads = heads.transpose(1, 2).flatten(2)
            out = start + "attn.out_proj."
            x = x + F.linear(heads, state[out + "weight"], state[out + "bias"]) * z
        if layer.mlp_width is not None:
            y = _norm(state, start + "ln_2", x, kept, config.layer_norm_eps)
            fc, proj = start + "mlp.c_fc.", start + "mlp.c_proj."
            y = activation(config.activation, F.linear(y, state[fc + "weight"], state[fc + "bias"]))
            y = y * given.hidden[number]
            x = x + F.linear(y, state[proj + "weight"], state[proj + "bias"]) * z
    return x


def reference(model: CLIP, image: Tensor, text: Tensor, given: Gates) -> tuple[Tensor, Tensor]:
    """Both features, not normalised, of the masked forward pass."""
    state, config = dict(model.named_parameters()), model.config
    z, kept, eps = given.image.channels, given.image.channels != 0, config.layer_norm_eps
    patch = config.vision.patch_size
    x = F.conv2d(image, state["visual.conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(image), 1, -1)
    x = (torch.cat([first, x], 1) + state["visual.positional_embedding"]) * z
    x = _norm(state, "visual.ln_pre", x, kept, eps)
    x = _blocks(state, "visual.", config.vision, given.image, config, x, causal=False)
    x = (_norm(state, "visual.ln_post", x, kept, eps)[:, 0] * z) @ state["visual.proj"]

    z, kept = given.text.channels, given.text.channels != 0
    y = state["token_embedding.weight"][text] + state["positional_embedding"][: text.shape[1]]
    y = _blocks(state, "", config.text, given.text, config, y * z, causal=True)
    y = _norm(state, "ln_final", y, kept, eps)[torch.arange(len(text)), text.argmax(-1)]
    return x, (y * z) @ state["text_projection"]
