"""How others name the same tensors, and back.

Inside this package the names are those of open_clip's ``CLIP``, which are OpenAI's. The other
layouts: ``custom_text`` (open_clip's CustomTextCLIP), ``hf`` (Hugging Face's CLIPModel) and
``microsoft`` (the published TinyCLIP checkpoints). Values are moved and transposed, never rounded.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyclip.models.files import CheckpointError

LAYOUTS = ("open_clip", "custom_text", "hf", "microsoft")

# What files carry besides parameters, and models make themselves.
_OPENAI_MARKERS = {"input_resolution", "context_length", "vocab_size"}
_DROPPED = re.compile(
    r"(.*\.)?position_ids|(text\.)?attn_mask|" + "|".join(sorted(_OPENAI_MARKERS))
)

_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")

_HF_NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_HF_TRANSPOSED = {"visual.proj", "text_projection"}
_HF_BLOCKS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_HF_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"((?:visual\.)?transformer\.resblocks\.)(\d+)\.(.+)")
_HF_BLOCK = re.compile(r"((?:vision|text)_model\.encoder\.layers\.)(\d+)\.(.+)")
_HF_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")

_MICROSOFT = re.compile(
    r"(_image_encoder|_text_encoder|_logit_scale"
    r"|image_encoder_without_ddp|text_encoder_without_ddp|logit_scale_without_ddp)"
    r"\.(?:module\.)*(.+)"
)


def to_canonical(file: Path | str, state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Recognise a state dict's layout and give its parameters their names here.

    Returns:
        (layout, state): one of LAYOUTS, or ``"openai"`` where OpenAI's own marks are found; and
        every parameter under open_clip's name.

    Raises:
        CheckpointError: the layout is unknown, or two tensors claim one name.
    """
    state = _strip_module(state)
    layout = _recognise(file, state)
    if layout == "microsoft":
        state = _from_microsoft(file, state)
    state = {key: value for key, value in state.items() if not _DROPPED.fullmatch(key)}
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(file, f"must be a float tensor, got {kind}", key)
    if layout == "custom_text":
        state = {_without_text(key): value for key, value in state.items()}
    elif layout == "hf":
        state = _from_hf(file, state)
    return layout, state


def from_canonical(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Give a state dict of this package's CLIP the names, and shapes, of another layout.

    Raises:
        ValueError: `layout` is none of LAYOUTS, or ``hf`` is asked for a tower it cannot hold.
    """
    if layout == "open_clip":
        return dict(state)
    if layout == "custom_text":
        return {"text." + k if k.startswith(_TEXT) else k: v for k, v in state.items()}
    if layout == "microsoft":
        return {_to_microsoft(key): value for key, value in state.items()}
    if layout == "hf":
        return _to_hf(state)
    raise ValueError(f"from_canonical: layout must be one of {LAYOUTS}, got {layout!r}")


def _strip_module(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the ``module.`` that DistributedDataParallel leaves before every key."""
    while state and all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def _recognise(file: Path | str, state: Mapping[str, Any]) -> str:
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        return "hf"
    if any(_MICROSOFT.fullmatch(key) for key in state):
        return "microsoft"
    if any(key.startswith(("visual.layer1.", "visual.attnpool.")) for key in state):
        key = next(key for key in state if key.startswith(("visual.layer1.", "visual.attnpool.")))
        raise CheckpointError(file, "is a ResNet tower; only transformer towers are here", key)
    if any(key.startswith("visual.") for key in state):
        if any(key.startswith("text.") for key in state):
            return "custom_text"
        return "openai" if _openai_made(state) else "open_clip"
    shown = ", ".join(repr(key) for key in sorted(state)[:3])
    raise CheckpointError(
        file, f"its layout is none of {', '.join(LAYOUTS)}; it holds {len(state)} keys: {shown} ..."
    )


def _openai_made(state: Mapping[str, Any]) -> bool:
    """OpenAI's files name their sizes, or have 16-bit matrices beside fp32 norms."""
    if _OPENAI_MARKERS & state.keys():
        return True
    matrix, norm = state.get("visual.conv1.weight"), state.get("visual.ln_pre.weight")
    return (
        isinstance(matrix, Tensor)
        and isinstance(norm, Tensor)
        and (matrix.dtype, norm.dtype) == (torch.float16, torch.float32)
    )


def _without_text(key: str) -> str:
    return key[len("text.") :] if key.startswith("text.") else key


def _from_microsoft(file: Path | str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the encoders' prefixes; a tensor may be there twice, under an alias, if it is equal."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        match = _MICROSOFT.fullmatch(key)
        name = match[2] if match else key
        if name.startswith("l0_module."):
            continue
        if name in result and not _equal(result[name], value):
            raise CheckpointError(file, f"differs from another tensor that is named {name!r}", key)
        result[name] = value
    return result


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _to_microsoft(key: str) -> str:
    if key == "logit_scale":
        return "_logit_scale.logit_scale"
    return ("_image_encoder." if key.startswith("visual.") else "_text_encoder.") + key


def _from_hf(file: Path | str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {theirs: ours for ours, theirs in _HF_NAMES.items()}
    blocks = {theirs: ours for ours, theirs in _HF_BLOCKS.items()}
    parts = {theirs: ours for ours, theirs in _HF_IN_BLOCK.items()}
    result, packed = {}, {}
    for key, value in state.items():
        if key in names:
            ours = names[key]
            if ours in _HF_TRANSPOSED and value.dim() != 2:
                raise CheckpointError(file, f"must have two dimensions, got {value.dim()}", key)
            result[ours] = value.T if ours in _HF_TRANSPOSED else value
            continue
        match = _HF_BLOCK.fullmatch(key)
        if match is None:
            raise CheckpointError(file, "is no key of a CLIPModel", key)
        start = f"{blocks[match[1]]}{int(match[2])}."
        if qkv := _HF_QKV.fullmatch(match[3]):
            packed.setdefault(f"{start}attn.in_proj_{qkv[2]}", {})[qkv[1]] = key
            continue
        part, _, kind = match[3].rpartition(".")
        if part not in parts:
            raise CheckpointError(file, "is no key of a CLIPModel", key)
        result[f"{start}{parts[part]}.{kind}"] = value
    for ours, theirs in packed.items():
        keys = [theirs.get(name) for name in "qkv"]
        if None in keys:
            raise CheckpointError(file, f"needs q_proj, k_proj and v_proj, got {theirs}", ours)
        three = [state[key] for key in keys]
        if len({(value.shape, value.dtype) for value in three}) > 1:
            shapes = [tuple(value.shape) for value in three]
            raise CheckpointError(file, f"q, k and v must have one shape, got {shapes}", keys[0])
        if three[0].dim() == 0:
            raise CheckpointError(file, "must have one or two dimensions, got none", keys[0])
        result[ours] = torch.cat(three)
    return result


def _to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        if key in _HF_NAMES:
            result[_HF_NAMES[key]] = value.T if key in _HF_TRANSPOSED else value
            continue
        tower, index, rest = _BLOCK.fullmatch(key).groups()
        start = f"{_HF_BLOCKS[tower]}{index}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{start}self_attn.{name}_proj.{kind}"] = part
        else:
            part, _, kind = rest.rpartition(".")
            result[f"{start}{_HF_IN_BLOCK[part]}.{kind}"] = value
    return result
