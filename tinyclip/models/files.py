"""Reading and writing weight files that somebody else may have made.

Nothing in a file is executed, and no more memory is taken than the file is long: safetensors
checks its own ranges, and of PyTorch's archives only plain, stored ones are read, by its
restricted unpickler.
"""

import argparse
import json
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS = (".safetensors",)
ARCHIVES = (".pt", ".pth", ".bin")
_LARGEST_DIMENSION = 2**31
_LARGEST_JSON = 1 << 24


class CheckpointError(ValueError):
    """A checkpoint breaks a rule; the text names the file, the key and the rule."""

    def __init__(self, file: Path | str, rule: str, key: str | None = None):
        where = f"{file}: " if key is None else f"{file}: key {key!r}: "
        super().__init__(where + rule)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is no JSON object, or far too large for a config.
    """
    size = file.stat().st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(
            file, f"a JSON file here is at most {_LARGEST_JSON} bytes, not {size}"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(file, f"must hold a JSON object, got {type(data).__name__}")
    return data


def read_tensors(file: Path) -> dict[str, Any]:
    """The state dict in a weight file: every value that is a tensor is dense and on the CPU.

    ``*.index.json`` (Hugging Face's shards) reads the files beside it that it names.

    Raises:
        CheckpointError: the file is damaged, hostile, or of a kind that is not read.
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix in SAFETENSORS:
        state = _read_safetensors(file)
    elif file.suffix in ARCHIVES:
        records = _record_sizes(file)
        state = _unwrap(file, _read_archive(file))
        _check_records(file, state, records)
    else:
        raise CheckpointError(
            file, f"must be one of {', '.join(SAFETENSORS + ARCHIVES)}, got {file.suffix!r}"
        )
    for key, value in state.items():
        _check_tensor(file, key, value)
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    _need_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(file, f"is not a sound safetensors file: {error}") from error


def _need_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise ImportError("checkpoints need the safetensors package: pip install safetensors")


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(index, "must map keys to file names under 'weight_map'")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if shard.name != name or name.endswith(".json"):
            raise CheckpointError(index, f"a shard lies beside its index, got {name!r}")
        for key, value in read_tensors(shard).items():
            if weight_map.get(key) != name:
                raise CheckpointError(shard, "is not said to be in this shard", key)
            state[key] = value
    for key in weight_map:
        if key not in state:
            raise CheckpointError(index, f"is not in {weight_map[key]}, where it should be", key)
    return state


def _read_archive(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            file, f"holds more than tensors and plain values, and none of it was run ({first})"
        ) from error
    except Exception as error:  # the unpickler fails on damaged bytes with whatever they lead to
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            file, f"is damaged or no checkpoint ({type(error).__name__}: {first})"
        ) from error


def _record_sizes(file: Path) -> Counter[int]:
    """How long the records with data are, in what torch.save writes: a zip that stores them.

    Raises:
        CheckpointError: the file is something else.
    """
    records = _records(file)
    names = {record.filename.split("/", 1)[-1] for record in records}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            file,
            "is a TorchScript archive, which holds code; if you trust it, torch.save("
            "torch.jit.load(file, map_location='cpu').state_dict(), 'weights.pt') makes a file"
            " that can be read here",
        )
    stored = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or (
        stored > file.stat().st_size
    ):
        raise CheckpointError(file, "has compressed records, which torch.save does not write")
    return Counter(record.file_size for record in records if "/data/" in record.filename)


def _records(file: Path) -> list[zipfile.ZipInfo]:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(file, f"is a damaged zip: {error}") from error
    raise CheckpointError(
        file,
        "is damaged, or older than torch 1.6, whose format states sizes that cannot be checked;"
        " load it with PyTorch if you trust it, and save it again",
    )


def _check_records(file: Path, state: Mapping[str, Any], records: Counter[int]) -> None:
    """Raise where a tensor's memory is no record: torch maps what the pickle claims, unchecked."""
    seen = set()
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            continue
        memory = value.untyped_storage()
        if memory.nbytes() and memory.data_ptr() not in seen:
            seen.add(memory.data_ptr())
            records[memory.nbytes()] -= 1
            if records[memory.nbytes()] < 0:
                raise CheckpointError(
                    file, f"is damaged: no record has the {memory.nbytes()} bytes", key
                )


def _unwrap(file: Path, loaded: Any) -> dict[str, Any]:
    """The state dict itself: a training checkpoint has it under ``state_dict`` or ``model``."""
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(file, f"must hold a state dict, got {type(loaded).__name__}")
    for key in loaded:
        if not isinstance(key, str):
            raise CheckpointError(file, f"keys must be strings, got {type(key).__name__}")
    return dict(loaded)


def _check_tensor(file: Path, key: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        return  # unknown keys are refused by name, whatever they hold
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise CheckpointError(file, f"must be a dense tensor, got {value.layout}", key)
    if any(size >= _LARGEST_DIMENSION for size in value.shape):
        raise CheckpointError(file, f"has a dimension beyond 2^31: {tuple(value.shape)}", key)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            file, f"claims the shape {tuple(value.shape)} for a smaller block of memory", key
        )


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write through a second name, so that a file of the right name is always whole."""
    part = file.with_name(file.name + ".part")
    try:
        part.touch()  # with the mode that the umask gives, which not every writer does
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)
        os.replace(part, file)
    except OSError as error:
        if error.filename is None:  # a full disk names no file
            raise OSError(error.errno, f"{file} could not be written: {error.strerror}") from error
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write an object, such that the file is never half written."""
    text = json.dumps(data, indent=2) + "\n"
    _replace(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict: safetensors, or PyTorch's archive with it under ``state_dict``."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    if file.suffix in SAFETENSORS:
        _need_safetensors()
        from safetensors.torch import save_file

        _replace(file, lambda part: save_file(state, part, metadata={"format": "pt"}))
    else:
        _replace(file, lambda part: torch.save({"state_dict": state}, part))
