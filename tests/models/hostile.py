"""Broken and hostile checkpoints: how each is made, and what its error has to say."""

import io
import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save, save_file

from tests.models import build
from tinyclip import models

CANARY = "TINYCLIP_TEST_CANARY"  # the environment variable that names the file code would make


class Case(NamedTuple):
    """A path to load, and what its error must match besides the name of the file."""

    path: Path
    rule: str


class Run:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.system, (f'touch "${CANARY}"',)


class Evaluate:
    def __reduce__(self):
        return eval, (f"open(__import__('os').environ['{CANARY}'], 'w')",)


def _safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _raw_safetensors(state: dict) -> Iterator[tuple[str, bytes, str]]:
    whole = save(state)
    sound = "safetensors"
    yield "empty", b"", sound
    yield "seven bytes", whole[:7], sound
    yield "length only", whole[:8], sound
    yield "half", whole[: len(whole) // 2], sound
    yield "one byte short", whole[:-1], sound
    yield "trailing bytes", whole + b"\0" * 64, sound
    yield "length beyond the file", _safetensors({}, length=1 << 20), sound
    yield "length of 200 MB", _safetensors({}, length=200 << 20), sound
    yield "length overflows", _safetensors({}, length=(1 << 64) - 1), sound
    yield "no JSON", _safetensors(b"\x80\x02}q\x00."), sound
    yield "no UTF-8", _safetensors(b'{"\xff\xfe": 1}'), sound
    yield "a list", _safetensors(b"[1, 2]"), sound
    yield "deep", _safetensors(b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"), sound
    yield "beyond the data", _safetensors({"a": _entry([4], 0, 16)}, b"\0" * 8), sound
    overlap = {"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}
    yield "overlapping", _safetensors(overlap, b"\0" * 12), sound
    gap = {"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}
    yield "gap", _safetensors(gap, b"\0" * 12), sound
    yield "backwards", _safetensors({"a": _entry([2], 8, 0)}, b"\0" * 8), sound
    yield "shape too large", _safetensors({"a": _entry([1 << 20], 0, 8)}, b"\0" * 8), sound
    yield "shape overflows", _safetensors({"a": _entry([1 << 62, 4], 0, 0)}), sound
    yield "negative shape", _safetensors({"a": _entry([-2], 0, 8)}, b"\0" * 8), sound
    yield "unknown dtype", _safetensors({"a": _entry([2], 0, 8, "F31")}, b"\0" * 8), sound
    yield "no dtype", _safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}), sound
    yield "empty but endless", _safetensors({"a": _entry([0, 1 << 40], 0, 0)}), "2.31"
    yield "a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", sound


def _archive(folder: Path, name: str, pickled: bytes, records: dict[str, bytes], **options) -> Path:
    path = folder / f"{name}.pt"
    with zipfile.ZipFile(path, "w", **options) as archive:
        for record, data in {"data.pkl": pickled, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{record}", data)
    return path


def _archives(folder: Path, state: dict) -> Iterator[Case]:
    def saved(name: str, value, rule: str, **options) -> Case:
        torch.save(value, folder / f"{name}.pt", **options)
        return Case(folder / f"{name}.pt", rule)

    none_run = "none of it was run"
    (folder / "pickle.pt").write_bytes(pickle.dumps(Run()))
    yield Case(folder / "pickle.pt", "1.6")
    yield saved("runs a command", {"state_dict": state, "x": Run()}, none_run)
    yield saved("evaluates", {**state, "x": Evaluate()}, none_run)
    yield saved("a whole module", torch.nn.Linear(2, 2), none_run)
    yield saved("a path", {"state_dict": state, "args": Path("x")}, none_run)
    yield Case(_archive(folder, "bare", pickle.dumps(Run(), 2), {}), none_run)
    yield saved("legacy", state, "1.6", _use_new_zipfile_serialization=False)
    whole = (folder / "runs a command.pt").read_bytes()
    for name, data in (
        ("half a zip", whole[: len(whole) // 2]),
        ("no end of a zip", whole[:-10]),
        ("a page", b"<!DOCTYPE html><html><body>404</body></html>"),
        ("nothing", b""),
    ):
        (folder / f"{name}.pt").write_bytes(data)
        yield Case(folder / f"{name}.pt", "damaged")
    yield Case(_archive(folder, "garbage", b"\x80\x02garbage", {}), "damaged|none of it")
    bomb = {"data/0": b"\0" * (256 << 20)}
    options = {"compression": zipfile.ZIP_DEFLATED}
    yield Case(_archive(folder, "bomb", pickle.dumps({}, 2), bomb, **options), "compressed")
    with zipfile.ZipFile(folder / "no pickle.pt", "w") as archive:
        archive.writestr("archive/data/0", b"\0" * 16)
    yield Case(folder / "no pickle.pt", "damaged")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pt")
    yield Case(folder / "script.pt", "TorchScript")

    yield saved("a list", [torch.zeros(2)], "state dict")
    yield saved("an empty dict", {}, "state dict")
    yield saved("numbered", {0: torch.zeros(2)}, "keys must be strings")
    yield saved("a state dict of None", {"state_dict": None, **state}, "'state_dict'.*float tensor")
    key, wide = "visual.proj", state["visual.proj"].shape
    for name, value, rule in (
        ("text for a tensor", "abc", f"{key}.*float tensor"),
        ("integers", torch.zeros(wide, dtype=torch.long), f"{key}.*float tensor"),
        ("complex", torch.zeros(wide, dtype=torch.complex64), f"{key}.*float tensor"),
        ("sparse", torch.eye(4).to_sparse(), f"{key}.*dense"),
        ("meta", torch.zeros(wide, device="meta"), f"{key}|damaged"),
        ("expanded", torch.zeros(1).expand(1 << 20, 1 << 20), f"{key}.*smaller block"),
    ):
        yield saved(name, {**state, key: value}, rule)
    yield _shortened(folder, state)
    yield from _lies(folder)


def _shortened(folder: Path, state: dict) -> Case:
    """An archive whose largest storage is shorter than its tensor."""
    torch.save(state, folder / "whole.pth")
    with (
        zipfile.ZipFile(folder / "whole.pth") as whole,
        zipfile.ZipFile(folder / "shortened.pt", "w") as short,
    ):
        largest = max(whole.infolist(), key=lambda record: record.file_size).filename
        for record in whole.infolist():
            data = whole.read(record)
            short.writestr(record.filename, data[:64] if record.filename == largest else data)
    return Case(folder / "shortened.pt", "damaged")


class _Memory:
    """Stands for a tensor's storage in a pickle."""


class _Lie:
    """Unpickling this rebuilds a tensor of a shape that its storage may not hold."""

    def __init__(self, shape: tuple[int, ...], offset: int = 0):
        self.shape, self.offset = shape, offset

    def __reduce__(self):
        stride = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        arguments = (_Memory(), self.offset, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _lies(folder: Path) -> Iterator[Case]:
    """Archives of one record of 64 bytes, of which the pickle claims more."""
    for name, claimed, lie in (
        ("a shape beyond its memory", 16, _Lie((1 << 28, 128))),
        ("an offset beyond its memory", 16, _Lie((4,), offset=1 << 20)),
        ("memory beyond the file", 1 << 30, _Lie((1 << 30,))),
        ("memory beyond its record", 40, _Lie((40,))),
        ("memory of an endless shape", 1 << 62, _Lie((1 << 62,))),
        ("a negative shape", 16, _Lie((-4,))),
    ):

        class Pickler(pickle.Pickler):
            def persistent_id(self, value, claimed=claimed):
                if isinstance(value, _Memory):
                    return ("storage", torch.FloatStorage, "0", "cpu", claimed)
                return None

        buffer = io.BytesIO()
        Pickler(buffer, 2).dump({"visual.proj": lie})
        yield Case(_archive(folder, name, buffer.getvalue(), {"data/0": b"\0" * 64}), "damaged")


def _states(state: dict) -> Iterator[tuple[str, dict, str]]:
    def changed(**changes):
        return {k: v for k, v in {**state, **changes}.items() if v is not None}

    block = "visual.transformer.resblocks."
    for key in ("visual.conv1.weight", "visual.ln_post.bias", "logit_scale", "text_projection"):
        yield f"without {key}", changed(**{key: None}), f"'{key}': is missing"
    key = f"{block}1.attn.out_proj.bias"
    yield "without a bias", changed(**{key: None}), f"'{key}': is missing"
    yield "with more", changed(**{"visual.extra": torch.zeros(2)}), "'visual.extra': is no param"
    key = f"{block}0.mlp.c_proj.weight"
    yield "transposed", changed(**{key: state[key].T.contiguous()}), rf"'{key}'.*shape \(128, 512\)"
    key = "visual.positional_embedding"
    yield "no grid", changed(**{key: torch.zeros(12, 128)}), f"'{key}'.*square grid"
    yield "flat patches", changed(**{"visual.conv1.weight": torch.zeros(8)}), "4 dimensions"
    yield "two scales", changed(logit_scale=torch.zeros(2)), "'logit_scale'.*shape"
    key = "token_embedding.weight"
    yield "no words", changed(**{key: torch.zeros(0, 128)}), f"'{key}'.*empty"
    yield (
        "no blocks",
        {k: v for k, v in state.items() if block not in k},
        "resblocks.0': is missing",
    )
    key = f"{block}999999999.ln_1.weight"
    yield "a billion blocks", changed(**{key: torch.zeros(128)}), "numbered below 512"
    key = f"{block}{'9' * 40}.ln_1.weight"
    yield "endless blocks", changed(**{key: torch.zeros(128)}), "numbered below 512"
    key = f"{block}0.attn.in_proj_weight"
    yield "odd heads", changed(**{key: torch.zeros(3 * 65, 128)}), f"'{key}'.*3 x heads x 64"
    yield "a ResNet", {"visual.layer1.0.conv1.weight": torch.zeros(2)}, "ResNet"
    yield "another model", {"model.layers.0.weight": torch.zeros(2)}, "layout is none of"
    aliases = build.microsoft(state)
    aliases["image_encoder_without_ddp.visual.proj"] = torch.ones(3)
    yield "two aliases", aliases, "differs from another"

    hf = models.from_canonical(state, "hf")
    start = "vision_model.encoder.layers.0.self_attn."
    yield "no keys", {k: v for k, v in hf.items() if k != start + "k_proj.weight"}, "k_proj"
    yield "odd keys", {**hf, start + "k_proj.weight": torch.zeros(64, 128)}, "one shape"
    yield (
        "more keys",
        {**hf, start + "r_proj.weight": torch.zeros(64, 128)},
        "no key of a CLIPModel",
    )


def _configs(folder: Path, model: models.CLIP) -> Iterator[Case]:
    def broken(kind: str, name: str, rule: str, change: Callable[[dict], object]) -> Case:
        path = folder / f"{kind} {name}"
        models.save(model, path, kind)
        file = path / {"hf": "config.json", "open_clip": "open_clip_config.json"}[kind]
        data = json.loads(file.read_text())
        result = change(data)
        if result is None or isinstance(result, bytes):
            file.write_bytes(result or json.dumps(data).encode())
        return Case(path, rule)

    def vision(**values):
        return lambda data: data["model_cfg"]["vision_cfg"].update(values)

    def hf(section, **values):
        return lambda data: data[section].update(values)

    agree = "has .* says"
    yield broken("hf", "no JSON", "not JSON", lambda data: b"{'a': 1}")
    yield broken("hf", "a list", "JSON object", lambda data: b"[1]")
    yield broken("hf", "deep", "not JSON", lambda data: b'{"a":' + b"[" * 10**6)
    yield broken("hf", "long", "at most", lambda data: b" " * (17 << 20) + b"{}")
    yield broken("hf", "another type", "model_type", lambda data: data.update(model_type="siglip"))
    yield broken("hf", "no heads", "num_attention_heads", hf("text_config", num_attention_heads=0))
    yield broken("hf", "two acts", "hidden_act", hf("text_config", hidden_act="relu"))
    yield broken("hf", "odd end", "eos_token_id", hf("text_config", eos_token_id=7))
    yield broken("hf", "huge", agree, hf("vision_config", intermediate_size=10**12))
    yield broken("hf", "a billion", "at most 512", hf("vision_config", num_hidden_layers=10**9))
    yield broken("open_clip", "a billion", "at most 512", vision(layers=10**9))
    yield broken("open_clip", "deeper", agree, vision(layers=4))
    yield broken("open_clip", "wider", agree, vision(width=1 << 40))
    yield broken("open_clip", "timm", "timm_model_name", vision(timm_model_name="vit"))
    yield broken("open_clip", "typo", "did you mean 'width'", vision(widht=128))
    act = broken("open_clip", "act", "quick_gelu", lambda d: d["model_cfg"].update(quick_gelu="y"))
    yield act
    yield broken("open_clip", "std", "std", lambda d: d["preprocess_cfg"].update(std=[0, 1, 1]))
    yield broken(
        "open_clip", "no text", "text_cfg", lambda d: d["model_cfg"].pop("text_cfg") and None
    )


def make(folder: Path) -> dict[str, Case]:
    """Write every case below the folder."""
    model = build.model(build.json_config())
    state, cases = model.state_dict(), {}
    for name, data, rule in _raw_safetensors(state):
        path = folder / f"{name}.safetensors"
        path.write_bytes(data)
        cases[f"safetensors: {name}"] = Case(path, rule)
    for case in _archives(folder, state):
        cases[f"archive: {case.path.stem}"] = case
    for name, changed, rule in _states(state):
        path = folder / f"{name.replace('/', ' ')}.safetensors"
        changed = {key: value.clone().contiguous() for key, value in changed.items()}
        save_file(changed, path)
        cases[f"state: {name}"] = Case(path, rule)
    for case in _configs(folder, model):
        cases[f"config: {case.path.name}"] = case
    (folder / "nothing here").mkdir()
    cases["an empty folder"] = Case(folder / "nothing here", "tinyclip.json")
    (folder / "weights.npz").write_bytes(b"PK")
    cases["another suffix"] = Case(folder / "weights.npz", "must be one of")
    return cases
