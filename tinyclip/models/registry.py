"""The published models by name, and models of any shape from a config."""

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tinyclip.models.clip import CLIP
from tinyclip.models.config import CLIPConfig
from tinyclip.models.files import read_json

# OpenAI's names for what open_clip calls *-quickgelu.
_OPENAI = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted. ``-quickgelu`` are OpenAI's weights' models."""
    folder = resources.files("tinyclip.models") / "configs"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))


@lru_cache
def _read(name: str) -> CLIPConfig:
    text = (resources.files("tinyclip.models") / "configs" / f"{name}.json").read_text()
    return CLIPConfig.from_dict(json.loads(text))


def get_config(model: str | Mapping[str, Any] | CLIPConfig) -> CLIPConfig:
    """The config of a name (`list_models`, or OpenAI's own such as ``ViT-B/32``), of a JSON file
    in open_clip's vocabulary, or of what such a file holds.

    Raises:
        ValueError: the name is not known (near matches are given), or the JSON breaks a rule.
        TypeError: `model` is none of the three.
    """
    if isinstance(model, CLIPConfig):
        return model
    if isinstance(model, Mapping):
        return CLIPConfig.from_dict(model)
    if not isinstance(model, str):
        raise TypeError(
            f"get_config: model must be a name, a dict or a CLIPConfig, got {type(model).__name__}"
        )
    if model.endswith(".json") and Path(model).is_file():
        data = read_json(Path(model))
        return get_config(data.get("model_cfg", data))
    names = list_models()
    name = _OPENAI.get(model, model)
    if name not in names:
        folded = {known.lower(): known for known in [*names, *_OPENAI]}
        near = difflib.get_close_matches(model.lower(), folded, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(repr(folded[n]) for n in near)}?" if near else ""
        raise ValueError(
            f"get_config: model {model!r} is not known{hint or '.'} All names are those of"
            " tinyclip.list_models()"
        )
    return _read(name)


def create_model(
    model: str | Mapping[str, Any] | CLIPConfig,
    *,
    activation: str | None = None,
    nonscalar_logit_scale: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CLIP:
    """A CLIP model with new weights.

    Args:
        model: a name of `list_models`, a dict in open_clip's JSON vocabulary or a file of one, or a
            config.
        activation: what the config's must be; None takes it as it is.
        nonscalar_logit_scale: ``logit_scale`` of shape (1,), which FSDP needs, instead of ().
        device, dtype: of the parameters.

    Raises:
        ValueError: the model is not known, its config breaks a rule, or has another activation.
    """
    config = get_config(model)
    check_activation("create_model", config, activation)
    with torch.device(device or torch.get_default_device()):
        built = CLIP(config, nonscalar_logit_scale)
    return built.to(dtype=dtype)


def check_activation(who: str, config: CLIPConfig, activation: str | None) -> None:
    """Raise unless the config has the activation that the caller counts on, if any."""
    if activation is not None and activation != config.activation:
        raise ValueError(
            f"{who}: activation must be the config's, {config.activation!r}, got {activation!r}:"
            " weights give wrong features under another one"
        )
