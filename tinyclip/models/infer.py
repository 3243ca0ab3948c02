"""The config that a state dict's shapes imply, layer by layer, and what is wrong with the rest."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tinyclip.models.clip import CLIP
from tinyclip.models.config import MOST_LAYERS, CLIPConfig, Layer, TextConfig, VisionConfig
from tinyclip.models.files import CheckpointError

_INDEX = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d{1,9})\..+")


def infer_config(
    file: Path | str,
    state: Mapping[str, Tensor],
    *,
    like: CLIPConfig | None = None,
    activation: str = "gelu",
) -> CLIPConfig:
    """Read every size off the tensors; a block's missing half is an absent half.

    Args:
        file: for messages.
        state: canonical names (`layouts.to_canonical`).
        like: where to take what is in no shape: the channels of a head (64 without it), whether
            the patches are a rectangle (a square without it), the activation, the norms' eps, and
            how many blocks there are when the last are empty.
        activation: without `like`.

    Raises:
        CheckpointError: a key that is needed is missing, or its shape breaks a rule.
    """
    conv1 = _tensor(file, state, "visual.conv1.weight", 4)
    width, channels, patch = conv1.shape[:3]
    if channels != 3 or patch < 1 or conv1.shape[3] != patch or width < 1:
        raise CheckpointError(
            file, f"must be (C, 3, P, P), got {tuple(conv1.shape)}", "visual.conv1.weight"
        )
    positions = len(_tensor(file, state, "visual.positional_embedding", 2))
    side = math.isqrt(max(positions - 1, 0))
    grid = like.vision.grid if like and like.vision.tokens == positions else (side, side)
    if side < 1 or math.prod(grid) + 1 != positions:
        raise CheckpointError(
            file,
            f"must be a class token and a square grid, got {positions} rows; if its grid is a"
            " rectangle, give its config: model=",
            "visual.positional_embedding",
        )
    tokens, text_width = _tensor(file, state, "token_embedding.weight", 2).shape
    context = len(_tensor(file, state, "positional_embedding", 2))
    embed_dim = _tensor(file, state, "visual.proj", 2).shape[1]
    sizes = {"token_embedding.weight": tokens * text_width, "positional_embedding": context}
    for key, size in {**sizes, "visual.proj": embed_dim}.items():
        if size < 1:
            raise CheckpointError(file, f"must not be empty, got {tuple(state[key].shape)}", key)
    head_dims = (like.vision.head_dim, like.text.head_dim) if like else (64, 64)
    stated = (like.vision.layers, like.text.layers) if like else ((), ())
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(
            image_size=side * patch if len(set(grid)) == 1 else (grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            width=width,
            layers=_layers(file, state, "visual.transformer.resblocks.", head_dims[0], stated[0]),
            head_dim=head_dims[0],
        ),
        text=TextConfig(
            context_length=context,
            vocab_size=tokens,
            width=text_width,
            layers=_layers(file, state, "transformer.resblocks.", head_dims[1], stated[1]),
            head_dim=head_dims[1],
        ),
        activation=like.activation if like else activation,
        layer_norm_eps=like.layer_norm_eps if like else 1e-5,
    )


def _tensor(file: Path | str, state: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    if key not in state:
        raise CheckpointError(file, "is missing", key)
    if state[key].dim() != dimensions:
        raise CheckpointError(
            file, f"must have {dimensions} dimensions, got {tuple(state[key].shape)}", key
        )
    return state[key]


def _layers(
    file: Path | str,
    state: Mapping[str, Tensor],
    prefix: str,
    head_dim: int,
    stated: tuple[Layer, ...],
) -> tuple[Layer, ...]:
    indices = set()
    for key in state:
        if key.startswith(prefix):
            match = _INDEX.fullmatch(key)
            if match is None or int(match[1]) >= MOST_LAYERS:
                raise CheckpointError(file, f"must be a block numbered below {MOST_LAYERS}", key)
            indices.add(int(match[1]))
    if not indices and set(stated) != {Layer(None, None)}:
        raise CheckpointError(file, "is missing", f"{prefix}0")
    layers = []
    for index in range(max([len(stated), *(index + 1 for index in indices)])):
        heads = mlp_width = None
        key = f"{prefix}{index}.attn.in_proj_weight"
        if key in state:
            rows = _tensor(file, state, key, 2).shape[0]
            heads, rest = divmod(rows, 3 * head_dim)
            if rest or not heads:
                raise CheckpointError(
                    file,
                    f"its {rows} rows must be 3 x heads x {head_dim}; if this model's heads are of"
                    " another width, give its config: model=",
                    key,
                )
        key = f"{prefix}{index}.mlp.c_fc.weight"
        if key in state:
            mlp_width = _tensor(file, state, key, 2).shape[0]
        layers.append(Layer(heads, mlp_width))
    return tuple(layers)


def check_agreement(
    file: Path | str, config_file: Path | str, inferred: CLIPConfig, stated: CLIPConfig
) -> None:
    """Raise at the first size that a config states and the weights do not have."""
    for section, here, there in (
        ("vision_cfg.", inferred.vision, stated.vision),
        ("text_cfg.", inferred.text, stated.text),
        ("", inferred, stated),
    ):
        for name in here.__dataclass_fields__:
            found, said = getattr(here, name), getattr(there, name)
            if found == said:
                continue
            if name == "layers" and len(found) == len(said):
                index = next(
                    i for i, pair in enumerate(zip(found, said, strict=True)) if len(set(pair)) > 1
                )
                name, found, said = f"layers[{index}]", found[index], said[index]
            elif name == "layers":
                found, said = len(found), len(said)
            raise CheckpointError(
                file, f"has {section}{name} {found}, but {config_file} says {said}"
            )


def check_state(file: Path | str, state: Mapping[str, Tensor], config: CLIPConfig) -> None:
    """Raise unless the state dict has the model's keys, no others, in the model's shapes."""
    with torch.device("meta"):
        expected = CLIP(config).state_dict()
    for key in expected:
        if key not in state:
            raise CheckpointError(file, "is missing", key)
    for key, value in state.items():
        if key not in expected:
            raise CheckpointError(file, "is no parameter of this model", key)
        wanted, got = tuple(expected[key].shape), tuple(value.shape)
        if got != wanted and not (key == "logit_scale" and got == (1,)):
            raise CheckpointError(file, f"must have the shape {wanted}, got {got}", key)
