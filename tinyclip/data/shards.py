"""webdataset's tar shards: ``key.jpg`` and ``key.txt`` or ``key.json``, read in place.

A shard's headers are read once, when it is opened; a sample is then two reads at known places, from
any process, in any order. Nothing is extracted, nothing unpickled and no command is run.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyclip.data.images import MOST_PIXELS, SUFFIXES, check_bytes, decode, need_pillow
from tinyclip.data.names import expand
from tinyclip.data.source import FIRST, BrokenSample, Sample, Source, Turn, caption
from tinyclip.data.strings import Strings
from tinyclip.data.tar import Member, TarError, members

_TEXTS = ("txt", "json")
# webdataset's rule: a key goes to the first dot of the name, with its folders.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_NOWHERE = (0,) * 5
_MOST_TEXT = 1 << 24
_MOST_OPEN = 32
_INDEXING_THREADS = 8  # a header is a short read: on a disk far away, waiting is all there is


class ShardError(ValueError):
    """Shards are missing, cut, damaged or empty; the text names them."""


class Shards(Source):
    """The samples of tar shards; a key's members may lie anywhere in its shard.

    Args:
        spec: paths, joined by ``::``; each may have brace lists (``{000..123}``, ``{a,b}``) and
            wild cards.
        json_key: where a ``.json`` has the caption, or a list of captions; a ``.txt`` goes first.
        most_pixels: larger pictures are broken.

    Raises:
        ShardError: a shard is missing, cut, damaged, or holds no sample.
        ValueError: the spec is a URL or a command, or its braces break a rule.
    """

    def __init__(self, spec: str, *, json_key: str = "caption", most_pixels: int = MOST_PIXELS):
        need_pillow()
        self.json_key, self.most_pixels = json_key, most_pixels
        with ThreadPoolExecutor(_INDEXING_THREADS) as threads:
            read = list(threads.map(_index, expand(spec)))
        if wrong := [shard for shard in read if isinstance(shard, str)]:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise ShardError(
                f"{len(wrong)} of {len(read)} shards cannot be read: {'; '.join(wrong[:5])}{more};"
                " remove them or write them again"
            )
        self.groups = tuple(len(shard.keys) for shard in read)
        self._shards = [(shard.path, shard.state) for shard in read]
        self._shard_of = np.repeat(np.arange(len(read), dtype=np.int32), self.groups)
        self._keys = Strings(chain.from_iterable(shard.keys for shard in read))
        self._places = np.concatenate([shard.places for shard in read])
        firsts = np.cumsum((0, *self.groups)).tolist()
        self._wrong = {
            first + index: reason
            for first, shard in zip(firsts, read, strict=False)
            for index, reason in shard.wrong.items()
        }
        self._open: dict[int, int] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._keys)

    def sample(self, index: int, turn: Turn = FIRST) -> Sample:
        """See `Source.sample`; the key begins with its shard's name."""
        number = int(self._shard_of[index])
        key = f"{Path(self._shards[number][0]).name}/{self._keys[index]}"
        if index in self._wrong:
            raise BrokenSample(key, self._wrong[index])
        image, image_size, text, text_size, is_json = self._places[index].tolist()
        check_bytes(image_size, key)
        if text_size > _MOST_TEXT:
            raise BrokenSample(key, f"has a caption of {text_size} bytes, over {_MOST_TEXT}")
        try:
            text, image = self._read(number, text, text_size), self._read(number, image, image_size)
        except OSError as error:
            raise BrokenSample(key, f"cannot be read: {error}") from error
        said = _captions(text, key, self.json_key if is_json else None)
        return Sample(key, decode(image, key, self.most_pixels), said)

    def listed(self) -> tuple[Strings | str, ...]:
        """See `Source.listed`: the shards' names and sizes, and the keys."""
        shards = (f"{Path(path).name} {size}" for path, (size, _) in self._shards)
        return *shards, self._keys

    def _read(self, number: int, offset: int, size: int) -> bytes:
        data = os.pread(self._file(number), size, offset)
        if len(data) < size:
            raise ShardError(f"{self._shards[number][0]}: was cut while it was in use")
        return data

    def _file(self, number: int) -> int:
        """A descriptor of this process's own, a few of which are kept."""
        if self._process != os.getpid():
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path, state = self._shards[number]
            self._open[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if _state(self._open[number]) != state:
                raise ShardError(f"{path}: has changed since it was opened")
        return self._open[number]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __del__(self):
        if self.__dict__.get("_process") == os.getpid():
            for file in self._open.values():
                os.close(file)


class _Shard(NamedTuple):
    path: str
    state: tuple[int, int]
    keys: list[str]
    places: (
        np.ndarray
    )  # (N, 5): offset and size of the picture, of the caption; whether that is json
    wrong: dict[int, str]


def _state(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _index(path: str) -> _Shard | str:
    """A shard's samples, or what is wrong with it."""
    found: dict[str, dict[str, list[Member]]] = {}
    try:
        # A pipe would keep us waiting for a writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            state = _state(file)
            for member in members(file):
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                if match and (suffix := match[2].lower()) in SUFFIXES + _TEXTS:
                    found.setdefault(match[1], {}).setdefault(suffix, []).append(member)
        finally:
            os.close(file)
    except TarError as error:
        return f"{path}: {error}"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    if not found:
        return f"{path}: holds no sample: no .{', .'.join(SUFFIXES + _TEXTS)}"
    keys, places, wrong = [], [], {}
    for key, parts in found.items():
        place, reason = _place(parts)
        # A member that is there n times was n samples' once; which is whose cannot be known.
        for _ in range(max(map(len, parts.values()))):
            if reason:
                wrong[len(keys)] = reason
            keys.append(key)
            places.append(place)
    return _Shard(path, state, keys, np.array(places, dtype=np.int64), wrong)


def _place(parts: dict[str, list[Member]]) -> tuple[tuple[int, ...], str | None]:
    """Where a sample's picture and caption lie, and what is wrong with it."""
    for suffix, same in parts.items():
        if len(same) > 1:
            return _NOWHERE, f"its .{suffix} is there {len(same)} times"
    image = next((parts[suffix][0] for suffix in SUFFIXES if suffix in parts), None)
    text = next((parts[suffix][0] for suffix in _TEXTS if suffix in parts), None)
    if image is None or text is None:
        lacking, suffixes = ("picture", SUFFIXES) if image is None else ("caption", _TEXTS)
        return _NOWHERE, f"has no {lacking}: no .{', .'.join(suffixes)}"
    if not image.regular or not text.regular:
        return _NOWHERE, "is no regular file, but a link or a device"
    return (image.offset, image.size, text.offset, text.size, "txt" not in parts), None


def _captions(data: bytes, key: str, json_key: str | None) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenSample(key, "has a caption that is no UTF-8") from None
    if json_key is None:
        return (caption(text.strip(), key),)
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenSample(key, f"has a .json that is none: {error}") from None
    said = said.get(json_key) if isinstance(said, dict) else None
    said = [said] if isinstance(said, str) else said
    if not isinstance(said, list) or not said or not all(isinstance(s, str) for s in said):
        raise BrokenSample(key, f"has no text at {json_key!r} of its .json (--json-key)")
    return tuple(caption(s, key) for s in said)
