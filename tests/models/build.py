"""Small models of other libraries, and checkpoints in everybody's names.

Real ones where a library is at hand (open_clip, transformers); for TinyCLIP's own code, which is
not installed, the maths written plainly over a published state dict's names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import tinyclip
from tinyclip.models import CLIP, Layer

WIDTHS = {"image_size": 224, "patch_size": 32, "width": 128, "layers": 3}
TEXT = {"context_length": 77, "vocab_size": 600, "width": 128, "heads": 2, "layers": 2}


def json_config(quick_gelu: bool = False, **text) -> dict:
    """A B/32-shaped model of small width, in open_clip's vocabulary."""
    return {
        "embed_dim": 64,
        "quick_gelu": quick_gelu,
        "vision_cfg": dict(WIDTHS),
        "text_cfg": {**TEXT, **text},
    }


IRREGULAR = {
    "embed_dim": 48,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 16,
        "width": 101,
        "layers": 4,
        "head_width": 64,
        "layer_heads": [2, 1, None, 3],
        "layer_mlp_widths": [77, 0, 130, None],
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 600,
        "width": 90,
        "layers": 3,
        "head_width": 64,
        "layer_heads": [1, None, 2],
        "layer_mlp_widths": [33, 64, 121],
    },
}


def model(config: dict, seed: int = 0) -> CLIP:
    """Every parameter random, biases and norms included: nothing may hide behind a zero."""
    torch.manual_seed(seed)
    built = tinyclip.create_model(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def images(size: int = 224, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def captions(vocabulary: int = 600, length: int = 77, count: int = 5, seed: int = 2) -> Tensor:
    """Random ids; the largest, which ends a caption, at a different place in each row."""
    ids = torch.randint(
        1, vocabulary - 1, (count, length), generator=torch.Generator().manual_seed(seed)
    )
    for row, line in enumerate(ids):
        end = 2 + row * (length - 3) // max(1, count - 1)
        line[end] = vocabulary - 1
        line[end + 1 :] = 0
    return ids


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    distance = (ours - theirs).norm().item()
    return distance and distance / theirs.norm().item()


def microsoft(state: dict[str, Tensor], ddp: bool = False) -> dict[str, Tensor]:
    """A state dict in the names of TinyCLIP's released code, with its mask parameters."""
    middle = ".module." if ddp else "."
    named = {}
    for key, value in state.items():
        if key == "logit_scale":
            named[f"_logit_scale{middle}logit_scale"] = value
        elif key.startswith("visual."):
            named[f"_image_encoder{middle}{key}"] = value
        else:
            named[f"_text_encoder{middle}{key}"] = value
    for tower in ("image", "text"):
        for mask in ("hidden_loga", "heads_loga", "intermediate_loga", "lambda_1", "lambda_2"):
            named[f"_{tower}_encoder{middle}l0_module.{mask}"] = torch.randn(3)
    return named


def _oracle_block(state, start: str, x: Tensor, layer: Layer, causal: bool, activation: str):
    """TinyCLIP's pruned block: three projections, an explicit softmax, absent halves skipped."""

    def linear(y, name):
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    if layer.heads is not None:
        y = norm(x, start + "ln_1")
        packed = y @ state[start + "attn.in_proj_weight"].T + state[start + "attn.in_proj_bias"]
        q, k, v = packed.reshape(*y.shape[:2], 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, start + "attn.out_proj")
    if layer.mlp_width is not None:
        y = linear(norm(x, start + "ln_2"), start + "mlp.c_fc")
        y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else F.gelu(y)
        x = x + linear(y, start + "mlp.c_proj")
    return x


def oracle(built: CLIP, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both embeddings from a model's state dict and config in fp64, without its modules."""
    state = {key: value.double() for key, value in built.state_dict().items()}
    config = built.config

    def norm(y, name):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    patch = config.vision.patch_size
    x = F.conv2d(image.double(), state["visual.conv1.weight"], stride=patch).flatten(2)
    first = state["visual.class_embedding"].expand(len(image), 1, -1)
    x = torch.cat([first, x.transpose(1, 2)], 1) + state["visual.positional_embedding"]
    x = norm(x, "visual.ln_pre")
    for index, layer in enumerate(config.vision.layers):
        start = f"visual.transformer.resblocks.{index}."
        x = _oracle_block(state, start, x, layer, False, config.activation)
    x = norm(x, "visual.ln_post")[:, 0] @ state["visual.proj"]

    y = state["token_embedding.weight"][text] + state["positional_embedding"][: text.shape[1]]
    for index, layer in enumerate(config.text.layers):
        start = f"transformer.resblocks.{index}."
        y = _oracle_block(state, start, y, layer, True, config.activation)
    y = norm(y, "ln_final")[torch.arange(len(text)), text.argmax(-1)] @ state["text_projection"]
    return x, y
