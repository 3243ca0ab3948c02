"""Where CLIP's vocabulary is: a path, an installed open_clip, or the hub."""

import re
from importlib.util import find_spec
from pathlib import Path

from tinyclip.models import Tokenizer, get_config, list_models

_PUBLISHED = "bpe_simple_vocab_16e6.txt.gz"
_HUB_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def open_clip_vocabulary() -> Path | None:
    """The vocabulary file of an installed open_clip, found without importing it."""
    try:
        spec = find_spec("open_clip")
    except (ImportError, ValueError):  # an import hook, or a stand-in module, without a spec
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, _PUBLISHED)).is_file():
            return file
    return None


def get_tokenizer(source: str | Path | None = None, context_length: int | None = None) -> Tokenizer:
    """CLIP's tokenizer.

    Args:
        source: a file or folder that `Tokenizer.from_path` reads; or None or a name of
            `list_models`, for the vocabulary of an installed open_clip_torch; or the id of a
            repository on the Hugging Face hub, ``"owner/name"``.
        context_length: the length of a row; by default the named model's, else 77.

    Returns:
        A callable: captions -> (N, context_length) int64.

    Raises:
        FileNotFoundError: there is no vocabulary at `source`; the text says where to get one.
        ValueError: what is there is no CLIP vocabulary.
    """
    named = source if isinstance(source, str) and source in list_models() else None
    if context_length is None:
        context_length = get_config(named).text.context_length if named else 77
    if source is None or named:
        file = open_clip_vocabulary()
        if file is None:
            raise FileNotFoundError(
                "get_tokenizer: no vocabulary is on this machine: install open_clip_torch, or give"
                f" (--tokenizer) the path of tokenizer.json or {_PUBLISHED}, or the id of a model"
                " on the hub"
            )
        return Tokenizer.from_path(file, context_length)
    if Path(source).exists() or isinstance(source, Path) or source.startswith((".", "/", "~")):
        return Tokenizer.from_path(source, context_length)
    return from_hub(source, context_length)


def from_hub(name: str, context_length: int = 77) -> Tokenizer:
    """The tokenizer of a model on the hub, from there or from the cache.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has no vocabulary of that name.
        ImportError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"get_tokenizer: {name!r} is no path here, and the hub needs huggingface_hub"
        ) from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"get_tokenizer: {name!r} is no path here and no id on the hub")
    said = ""
    for files in _HUB_FILES:
        try:
            found = [Path(hf_hub_download(name, file)) for file in files]
        except Exception as error:  # it raises errors of its own, of requests and of the system
            said = said or str(error).strip().split("\n")[0]
        else:
            path = found[0] if len(found) == 1 else found[0].parent
            return Tokenizer.from_path(path, context_length)
    raise FileNotFoundError(f"get_tokenizer: {name!r} is no path here, and the hub says: {said}")
