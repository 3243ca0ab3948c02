"""From a model under gates to the smaller dense model that computes the same.

Wu et al. 2023 (TinyCLIP), section 3.2. What a gate of 0 masks is cut away; the other gates are
multiplied into the weights.

Letters: C channels, H heads, D head dim, F hidden, E embedding.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tinyclip.models import CLIP, Gates, Layer, TextConfig, TowerGates, VisionConfig
from tinyclip.nn import ResidualAttentionBlock


@torch.no_grad()
def prune(model: CLIP, gates: Gates) -> CLIP:
    """The model without what is masked: its features are those of ``model(image, text, gates)``.

    Heads and hidden widths are per layer; a half of a block of which nothing is left is absent, and
    the constant that its bias added to the stream is in the bias before it. Norms and input
    projections are cut, everything that writes into the stream, and the last projection's rows, are
    multiplied by the gates.

    Args:
        model: irregular models included; it is not changed.
        gates: of its shapes, on its device.

    Returns:
        A model of its own memory, dtype and device, in the mode of `model`.

    Raises:
        ValueError: a tower has no channel left, or the gates are of another model.
    """
    old, state = model.config, model.state_dict()
    towers = (
        ("image", "visual.", old.vision, model.visual.transformer, gates.image),
        ("text", "", old.text, model.transformer, gates.text),
    )
    made, configs = {"logit_scale": state["logit_scale"].clone()}, []
    for name, prefix, config, transformer, given in towers:
        _check(name, config, given)
        tower = _Tower(config, given.channels)
        for key, channel in _OF_TOWER[name].items():
            made[key] = tower.cut(state[key], channel, gated=not key.startswith(_NORMS))
        into = "visual.ln_pre.bias" if name == "image" else "positional_embedding"
        layers = []
        for index, block in enumerate(transformer.resblocks):
            start = f"{prefix}transformer.resblocks.{index}."
            halves = (
                ("attn.out_proj.bias", tower.attention(block, given.heads[index])),
                ("mlp.c_proj.bias", tower.mlp(block, given.hidden[index])),
            )
            for bias, (tensors, constant) in halves:
                made |= {start + key: value for key, value in tensors.items()}
                if tensors:
                    into = start + bias
                elif constant is not None:
                    made[into] += constant
            layers.append(tower.layer(*(tensors for _, (tensors, _) in halves)))
        configs.append(replace(config, width=len(tower.kept), layers=tuple(layers)))
    vision, text = configs
    with torch.device("meta"):
        pruned = CLIP(
            replace(old, vision=vision, text=text),
            nonscalar_logit_scale=model.logit_scale.dim() == 1,
        )
    pruned.load_state_dict(made, assign=True)
    return pruned.train(model.training)


_NORMS = ("visual.ln_", "ln_")
# What is outside the blocks, and along which dimension its channels lie.
_OF_TOWER = {
    "image": {
        "visual.class_embedding": 0,
        "visual.positional_embedding": 1,
        "visual.proj": 0,
        "visual.conv1.weight": 0,
        "visual.ln_pre.weight": 0,
        "visual.ln_pre.bias": 0,
        "visual.ln_post.weight": 0,
        "visual.ln_post.bias": 0,
    },
    "text": {
        "positional_embedding": 1,
        "text_projection": 0,
        "token_embedding.weight": 1,
        "ln_final.weight": 0,
        "ln_final.bias": 0,
    },
}


def _check(name: str, config: VisionConfig | TextConfig, gates: TowerGates) -> None:
    """Raise where the gates are not those of the tower; the heads' are of a layer each."""
    wanted = [config.width, *(layer.heads or 0 for layer in config.layers)]
    wanted += [layer.mlp_width or 0 for layer in config.layers]
    found = [len(gate) for gate in (gates.channels, *gates.heads, *gates.hidden)]
    if found != wanted:
        raise ValueError(
            f"prune: gates of the {name} tower must have the sizes {wanted} (channels, heads of"
            f" each layer, hidden of each layer), got {found}"
        )
    if not gates.channels.any():
        raise ValueError(f"prune: gates of the {name} tower must keep a channel, got none")


class _Tower:
    """One tower's kept channels, and the parts of its blocks cut to them."""

    def __init__(self, config: VisionConfig | TextConfig, channels: Tensor):
        self._head_dim = config.head_dim
        (self.kept,) = torch.nonzero(channels, as_tuple=True)
        self._gate = channels[self.kept]

    def cut(self, value: Tensor, dim: int = 0, gated: bool = False) -> Tensor:
        """A copy of the kept channels, which lie along `dim`; multiplied by their gates or not."""
        value = value.index_select(dim, self.kept)
        if not gated:
            return value
        shape = [1] * value.dim()
        shape[dim] = -1
        return value * self._gate.to(value.dtype).view(shape)

    def attention(
        self, block: ResidualAttentionBlock, gate: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """ln_1 and attn with the kept heads; or nothing, and what their bias adds to the stream."""
        attn = block.attn
        if attn is None:
            return {}, None
        bias = self.cut(attn.out_proj.bias, gated=True)
        (heads,) = torch.nonzero(gate, as_tuple=True)
        if not len(heads):
            return {}, bias
        by_head = (3, -1, self._head_dim)
        weight = attn.in_proj_weight.unflatten(0, by_head)[:, heads].flatten(0, 2)
        out = self.cut(attn.out_proj.weight, gated=True).unflatten(1, by_head[1:])[:, heads]
        return {
            **self._norm("ln_1.", block.ln_1),
            "attn.in_proj_weight": self.cut(weight, 1),
            "attn.in_proj_bias": attn.in_proj_bias.unflatten(0, by_head)[:, heads].flatten(),
            "attn.out_proj.weight": (out * gate[heads].to(out.dtype)[:, None]).flatten(1),
            "attn.out_proj.bias": bias,
        }, None

    def mlp(
        self, block: ResidualAttentionBlock, gate: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """ln_2 and mlp with the kept hidden units; or nothing, and what their bias adds."""
        mlp = block.mlp
        if mlp is None:
            return {}, None
        bias = self.cut(mlp.c_proj.bias, gated=True)
        (hidden,) = torch.nonzero(gate, as_tuple=True)
        if not len(hidden):
            return {}, bias
        out = self.cut(mlp.c_proj.weight, gated=True)[:, hidden]
        return {
            **self._norm("ln_2.", block.ln_2),
            "mlp.c_fc.weight": self.cut(mlp.c_fc.weight[hidden], 1),
            "mlp.c_fc.bias": mlp.c_fc.bias[hidden],
            "mlp.c_proj.weight": out * gate[hidden].to(out.dtype),
            "mlp.c_proj.bias": bias,
        }, None

    def _norm(self, start: str, norm: torch.nn.Module) -> dict[str, Tensor]:
        return {start + name: self.cut(value) for name, value in norm.state_dict().items()}

    def layer(self, attention: dict[str, Tensor], mlp: dict[str, Tensor]) -> Layer:
        """The sizes of what is left of a block."""
        heads = width = None
        if attention:
            heads = len(attention["attn.in_proj_bias"]) // (3 * self._head_dim)
        if mlp:
            width = len(mlp["mlp.c_fc.bias"])
        return Layer(heads, width)
