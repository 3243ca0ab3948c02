"""Which files a saved model is made of: ours, open_clip's, Hugging Face's.

A folder is known by its config file. ``tinyclip.json`` holds ``model_cfg`` (open_clip's
vocabulary) and ``preprocess_cfg``, as open_clip_config.json does.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tinyclip.models.config import CLIPConfig, Layer, TextConfig, VisionConfig
from tinyclip.models.files import CheckpointError, read_json
from tinyclip.models.preprocess import Preprocess
from tinyclip.models.registry import list_models

# config file -> the weight files it may come with, best first
WEIGHTS = {
    "tinyclip.json": ("model.safetensors", "model.pt"),
    "open_clip_config.json": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    "config.json": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# transformers writes what differs from these, and every version wrote at least that.
_HF_DEFAULTS = {
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
}


class Source(NamedTuple):
    """A weight file and what was found beside it."""

    weights: Path
    folder: Path | None  # None for a file that stands alone
    config_file: Path | None
    config: CLIPConfig | None
    preprocess: Preprocess | None
    tokenizer: str | None  # a name that the config gives


def find(path: Path) -> Source:
    """What `path`, a folder or a weight file, is.

    Raises:
        FileNotFoundError: it does not exist, or the folder lacks a file.
        CheckpointError: it is neither, or its config breaks a rule.
    """
    if path.is_dir():
        _check_no_run(path)
        for name, weights in WEIGHTS.items():
            if (path / name).is_file():
                for weight in weights:
                    if (path / weight).is_file():
                        return _described(path / weight, path / name)
                raise FileNotFoundError(f"{path}: {name} needs one of {', '.join(weights)}")
        raise CheckpointError(
            path, f"holds none of {', '.join(WEIGHTS)}: give the weight file itself, or add one"
        )
    if not path.is_file():
        hint = "; a model's name has no weights: give a folder or a weight file"
        said = hint if str(path) in list_models() else ""
        raise FileNotFoundError(f"{path}: no such file or folder{said}")
    for name, weights in WEIGHTS.items():
        if path.name in weights and (path.parent / name).is_file():
            return _described(path, path.parent / name)
    return Source(path, None, None, None, None, None)


def _check_no_run(path: Path) -> None:
    """Raise of a run's folder: its config.json is not a model's."""
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not (path / "environment.json").is_file():
        return
    model = path / "model"
    if not model.is_dir():  # it has not come to its end
        last = max(checkpoints.glob("step_*"), default=checkpoints / "step_XXXXXXXX")
        model = last / "model"
    raise CheckpointError(path, f"is the folder of a run: its model is {model}")


def _described(weights: Path, config_file: Path) -> Source:
    data, folder = read_json(config_file), config_file.parent
    tokenizer = None
    try:
        if config_file.name == "config.json":
            config = config_from_hf(data)
            image = folder / "preprocessor_config.json"
            size = config.vision.image_size
            preprocess = Preprocess.from_hf(read_json(image), size) if image.is_file() else None
        else:
            model = data.get("model_cfg", data)
            config = CLIPConfig.from_dict(model if isinstance(model, Mapping) else {})
            size = config.vision.image_size
            preprocess = Preprocess.from_open_clip(data.get("preprocess_cfg", {}), size)
            tokenizer = model["text_cfg"].get("hf_tokenizer_name")
            if tokenizer is not None and not isinstance(tokenizer, str):
                raise ValueError(f"text_cfg: hf_tokenizer_name must be a string, got {tokenizer!r}")
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(config_file, str(error)) from error
    return Source(weights, folder, config_file, config, preprocess, tokenizer)


def config_from_hf(data: Mapping[str, Any]) -> CLIPConfig:
    """The config of a Hugging Face ``CLIPModel``.

    Raises:
        ValueError: it is of another model type, or asks for what these towers are not.
    """
    if data.get("model_type") != "clip":
        raise ValueError(f"model_type must be 'clip', got {data.get('model_type')!r}")
    sections = {}
    for name, defaults in _HF_DEFAULTS.items():
        given = data.get(f"{name}_dict") or data.get(name) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must be an object, got {type(given).__name__}")
        sections[name] = {**defaults, **given}
    vision, text = sections["vision_config"], sections["text_config"]
    for key in ("hidden_act", "layer_norm_eps"):
        if vision[key] != text[key]:
            raise ValueError(
                f"{key} must be that of both towers, got {vision[key]!r} in vision_config and"
                f" {text[key]!r} in text_config"
            )
    activations = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()}
    if vision["hidden_act"] not in activations:
        raise ValueError(
            f"hidden_act must be one of {tuple(activations)}, got {vision['hidden_act']!r}"
        )
    tokens, end = text["vocab_size"], text["eos_token_id"]
    # 2 is what configs said before 2023; transformers pools at the largest id then, as we do.
    if end != 2 and isinstance(tokens, int) and end != tokens - 1:
        raise ValueError(
            f"eos_token_id must be the last of the vocabulary, {tokens - 1}, or 2, got {end!r}:"
            " captions are pooled at the largest id"
        )
    embed_dim = data.get("projection_dim", 512)
    heads = {name: _positive(name, part, "num_attention_heads") for name, part in sections.items()}
    common = {
        name: {
            "width": _positive(name, part, "hidden_size"),
            "head_dim": _positive(name, part, "hidden_size") // heads[name],
            "layers": _hf_layers(name, part, heads[name]),
        }
        for name, part in sections.items()
    }
    return CLIPConfig(
        embed_dim=_positive("config.json", {"projection_dim": embed_dim}, "projection_dim"),
        vision=VisionConfig(
            image_size=_positive("vision_config", vision, "image_size"),
            patch_size=_positive("vision_config", vision, "patch_size"),
            **common["vision_config"],
        ),
        text=TextConfig(
            context_length=_positive("text_config", text, "max_position_embeddings"),
            vocab_size=_positive("text_config", text, "vocab_size"),
            **common["text_config"],
        ),
        activation=activations[vision["hidden_act"]],
        layer_norm_eps=vision["layer_norm_eps"],
    )


def _positive(where: str, section: Mapping[str, Any], key: str) -> int:
    value = section[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")
    return value


def _hf_layers(where: str, section: Mapping[str, Any], heads: int) -> tuple[Layer, ...]:
    count, width = _positive(where, section, "num_hidden_layers"), section["hidden_size"]
    if width % heads:
        raise ValueError(f"{where}: hidden_size {width} must be divisible by {heads} heads")
    if count > 512:
        raise ValueError(f"{where}: num_hidden_layers must be at most 512, got {count}")
    return (Layer(heads, _positive(where, section, "intermediate_size")),) * count


def config_to_hf(config: CLIPConfig) -> dict[str, Any]:
    """The config.json of a ``CLIPModel``, for a uniform config."""

    def tower(part: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": part.width,
            "intermediate_size": part.layers[0].mlp_width,
            "num_hidden_layers": len(part.layers),
            "num_attention_heads": part.layers[0].heads,
            "projection_dim": config.embed_dim,
            "hidden_act": HF_ACTIVATIONS[config.activation],
            "layer_norm_eps": config.layer_norm_eps,
        }

    vision, text = config.vision, config.text
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": {
            **tower(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            **tower(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": max(text.vocab_size - 2, 0),
            "eos_token_id": text.vocab_size - 1,
        },
    }
