"""A checkpoint to a model that can be used: weights, preprocessing and tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinyclip.integrations.vocabulary import from_hub, get_tokenizer
from tinyclip.models import CLIP, CLIPConfig, Preprocess, Tokenizer, load_model
from tinyclip.models.folders import Source


class NoTokenizer(NamedTuple):
    """Stands in for a tokenizer whose vocabulary was not found: says so when it is called."""

    reason: str

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise FileNotFoundError(self.reason)


def load(
    path: str | Path,
    *,
    model: str | Mapping[str, Any] | CLIPConfig | None = None,
    activation: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[CLIP, Preprocess, Tokenizer | NoTokenizer]:
    """Load a checkpoint of any published layout; nothing in it is executed.

    Args:
        path: a folder of this package, of open_clip or of Hugging Face's ``CLIPModel``, or a file
            (.safetensors, .pt, .pth, .bin) in the names of open_clip, OpenAI or TinyCLIP. Of a
            file without a config beside it every size is read off the shapes, layer by layer.
        model: the config of a file that has none: a name of `list_models`, a dict, a config.
        activation: of the MLPs, for a file that has no config; otherwise it must be the config's.
            Without it, OpenAI's files are quick_gelu and others gelu, with a warning where the
            layout does not settle it.
        image_size: another input size, a side or (height, width): the position embeddings are
            interpolated.
        positions: how: ``"open_clip"``, ``"hf"`` or ``"tinyclip"``; by default as the layout's
            own code does.
        dtype: of the parameters; by default the file's, the widest where it has several.

    Returns:
        (model, preprocess, tokenizer): the model in eval mode on the CPU; PIL image ->
        (3, height, width); captions -> (N, 77). Where no vocabulary is found the tokenizer raises
        when it is called.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError (a ValueError): a key is missing, unexpected or of a wrong shape, the
            layout is unknown, or the file is damaged or hostile; the text names file, key, rule.
    """
    loaded = load_model(
        path,
        model=model,
        activation=activation,
        image_size=image_size,
        positions=positions,
        dtype=dtype,
    )
    tokenizer = _tokenizer(loaded.source, loaded.model)
    return loaded.model, loaded.preprocess, tokenizer


def _tokenizer(source: Source, model: CLIP) -> Tokenizer | NoTokenizer:
    """The vocabulary beside the weights, or the one that the config names, or open_clip's."""
    length = model.context_length
    here = source.folder is not None and any(
        (source.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
    )
    try:
        if here:
            tokenizer = Tokenizer.from_path(source.folder, length)
        elif source.tokenizer is not None:
            tokenizer = from_hub(source.tokenizer, length)
        else:
            tokenizer = get_tokenizer(None, length)
    except (FileNotFoundError, ImportError) as error:
        return NoTokenizer(str(error))
    if tokenizer.vocab_size != model.vocab_size:
        return NoTokenizer(
            f"the model's vocabulary has {model.vocab_size} tokens, the one found here"
            f" {tokenizer.vocab_size}: give the model's own, with --tokenizer (of a teacher"
            " --teacher-tokenizer), in Python to tinyclip.get_tokenizer"
        )
    return tokenizer
