"""What a CLIP model is made of, and open_clip's JSON vocabulary for it.

A tower's layers are uniform in published configs and irregular after pruning, so each has its own
`Layer`. JSON for an irregular tower adds ``layer_heads`` and ``layer_mlp_widths`` (null: absent).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from tinyclip.ops.gelu_mlp import ACTIVATIONS

# What open_clip's towers can be besides what ours are: refused unless it is off, as here.
_SWITCHED_OFF = {
    "ls_init_value": None,
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "output_tokens": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "timm_model_name": None,
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
    "teacher_width": -1,
}
# What says nothing about the shape of a tower that is not switched on above.
_IGNORED = {
    "attn_pooler_queries",
    "attn_pooler_heads",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "pad_id",
    "eos_id",
}
_SHARED = {"width", "layers", "head_width", "mlp_ratio", "act_kwargs", "norm_kwargs", "pool_type"}
_SHARED |= {"layer_heads", "layer_mlp_widths"}
_KNOWN = {
    "vision_cfg": _SHARED | {"image_size", "patch_size"},
    "text_cfg": _SHARED | {"context_length", "vocab_size", "heads"},
}
_POOLING = {"vision_cfg": "tok", "text_cfg": "argmax"}
_TOP_LEVEL = {"embed_dim", "quick_gelu", "activation", "vision_cfg", "text_cfg", "custom_text"}
# TinyCLIP's training switches; a pruned tower's widths are in its checkpoint.
_TOP_IGNORED = {"mask_image", "mask_text", "sparsity_warmup", "sparsity", "start_sparsity"}
MOST_LAYERS = 512


class Layer(NamedTuple):
    """One block: its heads (None: no attention) and the hidden width of its MLP (None: no MLP)."""

    heads: int | None
    mlp_width: int | None


@dataclass(frozen=True)
class VisionConfig:
    """The image tower; sizes in pixels, `image_size` a square's side or (height, width)."""

    image_size: int | tuple[int, int]
    patch_size: int
    width: int
    layers: tuple[Layer, ...]
    head_dim: int = 64

    def __post_init__(self) -> None:
        sides = self.image_size
        if isinstance(sides, (list, tuple)) and len(sides) == 2:
            same = sides[0] == sides[1]
            object.__setattr__(self, "image_size", sides[0] if same else tuple(sides))

    @property
    def height_width(self) -> tuple[int, int]:
        """Of an image, in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + 1


@dataclass(frozen=True)
class TextConfig:
    """The text tower: causal, pooled at the largest token id."""

    context_length: int
    vocab_size: int
    width: int
    layers: tuple[Layer, ...]
    head_dim: int = 64

    @property
    def tokens(self) -> int:
        return self.context_length


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width they meet in, and the activation of their MLPs."""

    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check(self)

    @property
    def uniform(self) -> bool:
        """Whether open_clip's and Hugging Face's own towers can have these shapes."""
        return all(
            len(set(tower.layers)) <= 1
            and all(layer.heads is not None and layer.mlp_width for layer in tower.layers)
            and all(layer.heads * tower.head_dim == tower.width for layer in tower.layers)
            for tower in (self.vision, self.text)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CLIPConfig":
        """Read open_clip's JSON vocabulary.

        Raises:
            ValueError: a key is missing, unknown, out of range, or asks for what these towers are
                not; the text names it.
        """
        _known("config", data, _TOP_LEVEL | _TOP_IGNORED)
        activation, eps = _shared_settings(data)
        vision, text = _section(data, "vision_cfg"), _section(data, "text_cfg")
        return cls(
            embed_dim=_size(data, "config", "embed_dim"),
            vision=VisionConfig(
                image_size=_image_size(vision),
                patch_size=_square(vision, "patch_size", 16),
                **_tower(vision, "vision_cfg", 768, heads=None),
            ),
            text=TextConfig(
                context_length=_size(text, "text_cfg", "context_length", 77),
                vocab_size=_size(text, "text_cfg", "vocab_size", 49408),
                **_tower(text, "text_cfg", 512, heads=8),
            ),
            activation=activation,
            layer_norm_eps=eps,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON that `from_dict` reads; for a uniform config open_clip reads it, too."""
        result: dict[str, Any] = {"embed_dim": self.embed_dim}
        if self.activation == "quick_gelu":
            result["quick_gelu"] = True
        elif self.activation == "relu":
            result["activation"] = "relu"
        for name, tower in (("vision_cfg", self.vision), ("text_cfg", self.text)):
            section = {f.name: getattr(tower, f.name) for f in fields(tower)}
            layers, head_dim = section.pop("layers"), section.pop("head_dim")
            section["layers"] = len(layers)
            if self.activation == "gelu_tanh":
                section["act_kwargs"] = {"approximate": "tanh"}
            if self.layer_norm_eps != 1e-5:
                section["norm_kwargs"] = {"eps": self.layer_norm_eps}
            if self.uniform and layers:
                section["mlp_ratio"] = _ratio(layers[0].mlp_width, tower.width)
                if name == "text_cfg":
                    section["heads"] = layers[0].heads
                elif head_dim != 64:
                    section["head_width"] = head_dim
                if section["mlp_ratio"] == 4.0:
                    del section["mlp_ratio"]
            else:
                section["head_width"] = head_dim
                section["layer_heads"] = [layer.heads for layer in layers]
                section["layer_mlp_widths"] = [layer.mlp_width for layer in layers]
            result[name] = section
        return result


def _ratio(hidden: int, width: int) -> float:
    """The ratio that gives `hidden` back when it is multiplied and cut, as open_clip does."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _known(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: key {key!r} is not known{hint}")


def _section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = data.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"config: {name} must be an object, got {type(section).__name__}")
    for key, off in _SWITCHED_OFF.items():
        if section.get(key, off) not in (off, None):
            raise ValueError(f"{name}: {key}={section[key]!r} is not supported, only {off!r}")
    pooling = _POOLING[name]
    if section.get("pool_type", pooling) != pooling:
        raise ValueError(
            f"{name}: pool_type={section['pool_type']!r} is not supported, only {pooling!r}"
        )
    _known(name, section, _KNOWN[name] | _IGNORED | set(_SWITCHED_OFF))
    return section


def _shared_settings(data: Mapping[str, Any]) -> tuple[str, float]:
    """The activation and the norms' eps, which both towers must agree on."""
    sections = [_section(data, name) for name in ("vision_cfg", "text_cfg")]
    found = []
    for section in sections:
        act, norm = section.get("act_kwargs") or {}, section.get("norm_kwargs") or {}
        _known("act_kwargs", act, {"approximate"})
        _known("norm_kwargs", norm, {"eps"})
        found.append((act.get("approximate", "none"), norm.get("eps", 1e-5)))
    if found[0] != found[1]:
        raise ValueError(
            "config: act_kwargs and norm_kwargs must be those of both towers, got"
            f" {found[0]} in vision_cfg and {found[1]} in text_cfg"
        )
    approximate, eps = found[0]
    if approximate not in ("none", "tanh"):
        raise ValueError(f"config: act_kwargs.approximate must be none or tanh, got {approximate}")
    quick = data.get("quick_gelu", False)
    if not isinstance(quick, bool):
        raise ValueError(f"config: quick_gelu must be true or false, got {quick!r}")
    said = {"quick_gelu"} if quick else set()
    said |= {"gelu_tanh"} if approximate == "tanh" else set()
    said |= {data["activation"]} if "activation" in data else set()
    if len(said) > 1:
        raise ValueError(f"config: the activation must be one, got {sorted(map(str, said))}")
    return said.pop() if said else "gelu", eps


def _size(data: Mapping[str, Any], where: str, key: str, default: int | None = None) -> int:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")
    return value


def _image_size(section: Mapping[str, Any]) -> int | tuple[int, int]:
    value = section.get("image_size", 224)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return _size(section, "vision_cfg", "image_size", 224)
    height, width = (_size({"image_size": side}, "vision_cfg", "image_size") for side in value)
    return height, width


def _square(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return _size({key: value}, "vision_cfg", key)


def _tower(section: Mapping[str, Any], where: str, width: int, heads: int | None) -> dict[str, Any]:
    """Width, head width and layers; text towers say how many heads, image towers how wide."""
    width = _size(section, where, "width", width)
    if isinstance(section.get("layers"), (list, tuple)):
        raise ValueError(
            f"{where}: layers={section['layers']!r} is a ResNet tower; only transformers are here"
        )
    count = _size(section, where, "layers", 12)
    if count > MOST_LAYERS:
        raise ValueError(f"{where}: layers must be at most {MOST_LAYERS}, got {count}")
    if heads is None or "head_width" in section:
        head_dim = _size(section, where, "head_width", 64)
        heads = width // head_dim
    else:
        heads = _size(section, where, "heads", heads)
        head_dim = width // heads
    if "layer_heads" not in section and (heads * head_dim != width or not heads):
        raise ValueError(
            f"{where}: width {width} must be divisible into heads, got {heads} of {head_dim}"
        )
    ratio = section.get("mlp_ratio", 4.0)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1e6:
        raise ValueError(f"{where}: mlp_ratio must be a positive number, got {ratio!r}")
    heads = section.get("layer_heads", [heads] * count)
    widths = section.get("layer_mlp_widths", [int(width * ratio)] * count)
    for key, values in (("layer_heads", heads), ("layer_mlp_widths", widths)):
        if not isinstance(values, (list, tuple)) or len(values) != count:
            raise ValueError(f"{where}: {key} must be a list of {count}, one a layer")
    return {
        "width": width,
        "head_dim": head_dim,
        "layers": tuple(Layer(*pair) for pair in zip(heads, widths, strict=True)),
    }


def _check(config: CLIPConfig) -> None:
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"config: activation must be one of {ACTIVATIONS}, got {config.activation!r}"
        )
    if not isinstance(config.layer_norm_eps, float) or not 0 <= config.layer_norm_eps < 1:
        raise ValueError(
            f"config: layer_norm_eps must be a number in [0, 1), got {config.layer_norm_eps!r}"
        )
    vision = config.vision
    if any(side % vision.patch_size for side in vision.height_width):
        raise ValueError(
            f"vision_cfg: image_size {vision.image_size} must be a multiple of patch_size"
            f" {vision.patch_size}"
        )
    for name, tower in (("vision_cfg", vision), ("text_cfg", config.text)):
        for index, layer in enumerate(tower.layers):
            for what, value, least in (("heads", layer.heads, 1), ("MLP", layer.mlp_width, 0)):
                wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
                if value is not None and wrong:
                    raise ValueError(
                        f"{name}: layer {index} has {what} {value!r}; it must be an integer from"
                        f" {least} on, or null where the layer has none"
                    )
