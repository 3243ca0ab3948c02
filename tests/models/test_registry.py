"""The published configs, their parameter counts, and what a config may not say."""

import json

import pytest
import torch

import tinyclip
from tests.models import build
from tinyclip import models

# Millions, of the published models: the vision tower, the text tower without its token embedding,
# and all.
COUNTS = {
    "TinyCLIP-ViT-61M-32-Text-29M": (61.41, 28.67, 115.4),
    "TinyCLIP-ViT-40M-32-Text-19M": (39.69, 19.22, 84.2),
    "TinyCLIP-ViT-39M-16-Text-19M": (38.59, 19.22, 83.1),
    "TinyCLIP-ViT-8M-16-Text-3M": (8.28, 2.52, 23.5),
    "ViT-B-32": (87.85, 38.13, 151.28),
    "ViT-B-16": (86.19, 38.13, 149.6),
}
OPENAI = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = models.CLIP(models.get_config(name))
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    vision = sum(parameter.numel() for parameter in model.visual.parameters()) / 1e6
    text = total - vision - model.token_embedding.weight.numel() / 1e6
    for got, expected in zip((vision, text, total), COUNTS[name], strict=True):
        assert abs(got - expected) < 0.1


def test_the_names():
    names = tinyclip.list_models()
    assert set(names) == {*COUNTS, *OPENAI, *(name + "-quickgelu" for name in OPENAI)}
    assert names == sorted(names)
    for name in names:
        quick = name.endswith("-quickgelu")
        assert models.get_config(name).activation == ("quick_gelu" if quick else "gelu")
    for openai in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"):
        assert models.get_config(openai).activation == "quick_gelu"


@pytest.mark.parametrize("name", OPENAI)
def test_the_configs_are_open_clips(name):
    open_clip = pytest.importorskip("open_clip")
    for spelled in (name, name + "-quickgelu"):
        config = open_clip.get_model_config(spelled)
        assert models.get_config(spelled) == models.get_config(config)
        with torch.device("meta"):
            theirs = open_clip.model.CLIP(**config).state_dict()
        ours = tinyclip.create_model(spelled, device="meta").state_dict()
        shapes = [{key: value.shape for key, value in state.items()} for state in (ours, theirs)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ViT-B32", "'ViT-B-32'"),
        ("vit-b-32", "'ViT-B-32'"),
        ("TinyCLIP-40M", "'TinyCLIP-ViT-40M-32-Text-19M'"),
        ("ViT-L-14@336px", "'ViT-L/14@336px'"),
    ],
)
def test_near_matches(name, near):
    with pytest.raises(ValueError, match=f"{name!r} is not known; did you mean .*{near}"):
        tinyclip.create_model(name)


def test_create_model_from_json_and_config():
    model = tinyclip.create_model(build.IRREGULAR, dtype=torch.bfloat16, device="meta")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.logit_scale.device.type == "meta"
    assert tinyclip.create_model(model.config, device="meta").config == model.config
    with pytest.raises(TypeError, match="got int"):
        tinyclip.create_model(3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"activation": "relu"},
        {"vision_cfg": {**build.WIDTHS, "head_width": 32, "mlp_ratio": 4.3637}},
        {"text_cfg": {**build.TEXT, "heads": 4}},
        {"irregular": True},
        {"kwargs": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}},
    ],
    ids=str,
)
def test_json_there_and_back(changes):
    config = dict(build.IRREGULAR if changes.pop("irregular", False) else build.json_config())
    for section in ("vision_cfg", "text_cfg"):
        config[section] = {**config[section], **changes.get("kwargs", {})}
    changes.pop("kwargs", None)
    config = models.CLIPConfig.from_dict({**config, **changes})
    assert models.CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("embed_dim", 0, "embed_dim must be a positive integer, got 0"),
        ("embed_dim", True, "embed_dim must be a positive integer, got True"),
        ("quick_gelu", 1, "quick_gelu must be true or false, got 1"),
        ("activation", "swish", "activation must be one, got"),
        ("activation", "relu", "activation must be one, got"),
        ("vision_cfg", 3, "vision_cfg must be an object, got int"),
        ("tower", {}, "key 'tower' is not known"),
        ("vision_cfg.widht", 3, "'widht' is not known; did you mean 'width'"),
        ("vision_cfg.layers", [3, 4, 6, 3], "ResNet"),
        ("vision_cfg.image_size", [224, 192, 3], "image_size must be a positive integer"),
        ("vision_cfg.image_size", [224, 0], "image_size must be a positive integer"),
        ("vision_cfg.image_size", [224, 100], "multiple of patch_size"),
        ("vision_cfg.image_size", 230, "multiple of patch_size"),
        ("vision_cfg.width", 100, "width 100 must be divisible into heads"),
        ("vision_cfg.mlp_ratio", "4", "mlp_ratio must be a positive number"),
        ("vision_cfg.pool_type", "avg", "pool_type='avg' is not supported"),
        ("vision_cfg.qk_norm", True, "qk_norm=True is not supported"),
        ("vision_cfg.act_kwargs", {"approximate": "tanh"}, "those of both towers"),
        ("vision_cfg.layer_heads", [1], "layer_heads must be a list of 3"),
        ("vision_cfg.layer_heads", [1, -1, 2], "layer 1 has heads -1"),
        ("text_cfg.heads", 7, "width 128 must be divisible into heads, got 7"),
        ("text_cfg.no_causal_mask", True, "no_causal_mask=True is not supported"),
        ("text_cfg.hf_model_name", "roberta-base", "hf_model_name='roberta-base' is not"),
        ("text_cfg.layer_mlp_widths", [3, 1.5], "layer 1 has MLP 1.5"),
    ],
)
def test_malformed_configs(path, value, rule):
    config = build.json_config(True)
    section, _, key = path.rpartition(".")
    (config[section] if section else config)[key] = value
    with pytest.raises(ValueError, match=rule.replace("(", r"\(")):
        tinyclip.create_model(config)
