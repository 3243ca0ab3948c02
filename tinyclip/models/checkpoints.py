"""Loading a model from everybody's checkpoints, and saving it as theirs."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyclip.models import folders
from tinyclip.models.clip import CLIP
from tinyclip.models.config import CLIPConfig
from tinyclip.models.files import CheckpointError, read_tensors, write_json, write_tensors
from tinyclip.models.infer import check_agreement, check_state, infer_config
from tinyclip.models.layouts import from_canonical, to_canonical
from tinyclip.models.positions import resize_positions
from tinyclip.models.preprocess import Preprocess
from tinyclip.models.registry import check_activation, get_config
from tinyclip.models.tokenizer import Tokenizer

FORMATS = ("tinyclip", "open_clip", "hf", "microsoft")
_LOG = logging.getLogger("tinyclip")
_POSITIONS = {"microsoft": "tinyclip", "hf": "hf"}


class Loaded(NamedTuple):
    """A model, its preprocessing, and where its files were found."""

    model: CLIP
    preprocess: Preprocess
    source: folders.Source
    layout: str


def load_model(
    path: str | Path,
    *,
    model: str | Mapping[str, Any] | CLIPConfig | None = None,
    activation: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Read a checkpoint of any layout. `tinyclip.load` says what the arguments mean."""
    source = folders.find(Path(path))
    file = source.weights
    layout, state = to_canonical(file, read_tensors(file))
    stated, stated_by = source.config, source.config_file
    if stated is None and model is not None:
        stated, stated_by = get_config(model), Path("model=")
    elif model is not None and get_config(model) != stated:
        raise CheckpointError(
            source.config_file, "is not the config that model= (--model, --teacher-model) gives"
        )
    if stated is None:
        config = infer_config(file, state, activation=_assume(file, layout, activation))
    else:
        check_activation(str(stated_by), stated, activation)
        config = infer_config(file, state, like=stated)
        if layout == "openai" and config.activation != "quick_gelu":
            raise CheckpointError(
                stated_by, f"says {config.activation}, but {file} is OpenAI's: quick_gelu"
            )
        check_agreement(file, stated_by, config, stated)
    check_state(file, state, config)
    if image_size is not None and image_size != config.vision.image_size:
        grid = config.vision.grid
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        key, mode = "visual.positional_embedding", positions or _POSITIONS.get(layout, "open_clip")
        state[key] = resize_positions(state[key], config.vision.grid, mode, of=grid)
    built = _build(config, state, dtype)
    preprocess = source.preprocess or Preprocess(config.vision.image_size)
    preprocess = replace(preprocess, size=config.vision.image_size)
    return Loaded(built, preprocess, source, layout)


def _assume(file: Path, layout: str, activation: str | None) -> str:
    """The activation of weights that come without a config."""
    if layout == "openai":
        if activation not in (None, "quick_gelu"):
            raise CheckpointError(
                file, f"is OpenAI's, whose activation is 'quick_gelu', not {activation!r}"
            )
        return "quick_gelu"
    if activation is None and layout != "microsoft":
        _LOG.warning(
            "%s does not say its activation; gelu is taken. Weights that were trained with OpenAI's"
            " quick_gelu give wrong features then: give activation= or model="
            " (--activation of convert and eval, --model of convert, --teacher-model of distill)",
            file,
        )
    return activation or "gelu"


def _build(config: CLIPConfig, state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> CLIP:
    """The model around the state's own tensors: in their one dtype, or the widest of several."""
    if dtype is None:
        dtype = state["logit_scale"].dtype
        for value in state.values():
            dtype = torch.promote_types(dtype, value.dtype)
    nonscalar = state["logit_scale"].dim() == 1
    with torch.device("meta"):
        built = CLIP(config, nonscalar_logit_scale=nonscalar)
    owned = {
        key: torch.empty(value.shape, dtype=dtype, device="cpu").copy_(value.detach())
        for key, value in state.items()
    }
    built.load_state_dict(owned, assign=True)
    return built.eval()


def save(
    model: CLIP,
    folder: str | Path,
    format: str = "tinyclip",
    *,
    preprocess: Preprocess | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model as a folder that its readers know; `tinyclip.load` reads them all.

    Args:
        model: any dtype; values are never rounded.
        folder: made if need be; files of the same names are replaced.
        format: ``"tinyclip"`` (model.safetensors, tinyclip.json) · ``"open_clip"``
            (open_clip_model.safetensors, open_clip_config.json) · ``"hf"`` (a CLIPModel folder) ·
            ``"microsoft"`` (model.pt in the names of the published TinyCLIP checkpoints, and
            tinyclip.json, which its own code does not need).
        preprocess: written beside the weights; OpenAI's by default.
        tokenizer: its vocabulary is written too, as vocab.json and merges.txt.

    Raises:
        ValueError: the format is not known, or cannot hold an irregular (pruned) tower or relu.
    """
    if format not in FORMATS:
        raise ValueError(f"save: format must be one of {FORMATS}, got {format!r}")
    config, folder = model.config, Path(folder)
    if format in ("open_clip", "hf"):
        _check_holds(config, format)
    preprocess = preprocess or Preprocess(config.vision.image_size)
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if format != "tinyclip":
        state["logit_scale"] = state["logit_scale"].reshape(())
    layout = "open_clip" if format == "tinyclip" else format
    name, weights = file_names(format)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / weights, from_canonical(state, layout))
    if format == "hf":
        dtype = str(model.logit_scale.dtype).removeprefix("torch.")
        write_json(folder / name, {**folders.config_to_hf(config), "dtype": dtype})
        write_json(folder / "preprocessor_config.json", preprocess.to_hf())
    else:
        own = preprocess.to_dict()
        del own["size"]  # the model's
        write_json(folder / name, {"model_cfg": config.to_dict(), "preprocess_cfg": own})
    if tokenizer is not None:
        tokenizer.save(folder)
        if format == "hf":
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"})


def file_names(format: str) -> tuple[str, str]:
    """Of a format's config and weights."""
    name = {"hf": "config.json", "open_clip": "open_clip_config.json"}.get(format, "tinyclip.json")
    return name, folders.WEIGHTS[name][1 if format == "microsoft" else 0]


def _check_holds(config: CLIPConfig, format: str) -> None:
    for name, tower in (("vision", config.vision), ("text", config.text)):
        if not tower.layers or not config.uniform:
            raise ValueError(
                f"save: format={format!r} holds uniform towers only, and the model's {name} layers"
                f" are {tower.layers} of width {tower.width}; use 'tinyclip' or 'microsoft'"
            )
    if format == "hf" and isinstance(config.vision.image_size, tuple):
        raise ValueError(
            f"save: format='hf' holds square images only, and the model's are"
            f" {config.vision.image_size}; use another format"
        )
    if format == "open_clip" and config.activation == "relu":
        raise ValueError("save: format='open_clip' has no relu; use 'tinyclip' or 'hf'")
