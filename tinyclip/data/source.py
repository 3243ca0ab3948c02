"""What a data set is, and what a batch of it is.

A source knows its samples by index and holds no position: which index comes when is the loader's
business. B samples of a batch, (H, W) an image's pixels, L tokens of the batch's longest caption.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tinyclip.data import draws
from tinyclip.data.strings import Strings

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_NAME = 200


class Pair(NamedTuple):
    """A batch as one model reads it."""

    image: Tensor  # (B, 3, H, W) float32
    text: Tensor  # (B, L) int64


class Skipped(NamedTuple):
    """A sample that could not be read, and why; both fit into a line of a log."""

    key: str
    reason: str


class Batch(NamedTuple):
    """B good samples of a batch, and those that were skipped; B may be 0.

    ``pairs[0]`` is what the first reader made of them, ``pairs[-1]`` what the last one did: one
    entry when all read alike.
    """

    pairs: tuple[Pair, ...]
    keys: tuple[str, ...]
    skipped: tuple[Skipped, ...]


class Sample(NamedTuple):
    """A picture and its captions, of which training takes one."""

    key: str
    image: "Image"
    captions: tuple[str, ...]


class Turn(NamedTuple):
    """The seed of a run and its epoch: what varies from one pass over the data to the next."""

    seed: int = 0
    epoch: int = 0


FIRST = Turn()


@dataclass(frozen=True)
class Reader:
    """How one model reads a sample; readers that are equal share their tensors.

    Args:
        preprocess: a PIL image -> (3, H, W) float32, such as `models.Preprocess`.
        tokenizer: a list of N captions -> (N, context length) int64, padded with 0.
    """

    preprocess: Callable[["Image"], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


class BrokenSample(ValueError):
    """A sample that cannot be read: it is named, counted and skipped."""

    def __init__(self, key: str, reason: str):
        self.key, self.reason = printable(key), printable(reason)
        super().__init__(self.key, self.reason)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class Source:
    """Samples by index. A subclass has `__len__` and `sample`."""

    # Sizes of the runs of samples that are read fastest one after another (the shards), or ().
    groups: tuple[int, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def listed(self) -> tuple[Strings | str, ...]:
        """How the samples are listed, which is the same wherever they lie: names, keys, captions;
        nothing that a picture would be read for."""
        return ()

    def fingerprint(self) -> str:
        """What tells these samples from others: SHA-256 of what is listed."""
        digest = hashlib.sha256(f"{type(self).__name__} {len(self)}\0".encode())
        for part in self.listed():
            if isinstance(part, Strings):
                part.hash_into(digest)
            else:
                digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def sample(self, index: int, turn: Turn = FIRST) -> Sample:
        """The sample of an index from 0 to len - 1.

        Args:
            turn: looked at by sources that make new samples each epoch.

        Raises:
            BrokenSample: it cannot be read; the text says why.
        """
        raise NotImplementedError

    def batch(
        self,
        indices: Sequence[int],
        readers: Sequence[Reader],
        turn: Turn = FIRST,
        augment: Callable[..., "Image"] | None = None,
    ) -> Batch:
        """Read samples, each model in its own way; broken ones are left out and listed.

        Args:
            indices: which, in this order.
            readers: at least one; equal ones share a `Pair`.
            turn: what the choice of a caption, augmentation and fresh samples depend on, besides
                the index.
            augment: called with (image, preprocess, key of the draw), such as `RandomCrop`; all
                readers see the same crop.
        """
        readers = distinct(readers)
        preprocesses = _unique(reader.preprocess for reader in readers)
        images: list[list[Tensor]] = [[] for _ in preprocesses]
        keys, captions, skipped = [], [], []
        for index in map(int, indices):
            try:
                sample = self.sample(index, turn)
            except BrokenSample as broken:
                skipped.append(Skipped(broken.key, broken.reason))
                continue
            for column, preprocess in zip(images, preprocesses, strict=True):
                image = sample.image
                if augment is not None:
                    image = augment(image, preprocess, (*turn, index))
                column.append(preprocess(image))
            choice = draws.below(len(sample.captions), draws.CAPTION, *turn, index)
            keys.append(printable(sample.key))
            captions.append(sample.captions[int(choice)])
        stacked = [
            torch.stack(column) if column else _no_images(preprocess)
            for column, preprocess in zip(images, preprocesses, strict=True)
        ]
        tokenizers = _unique(reader.tokenizer for reader in readers)
        texts = [tokenize(tokenizer, captions) for tokenizer in tokenizers]
        pairs = tuple(
            Pair(
                stacked[_place(preprocesses, reader.preprocess)],
                texts[_place(tokenizers, reader.tokenizer)],
            )
            for reader in readers
        )
        return Batch(pairs, tuple(keys), tuple(skipped))


def tokenize(tokenizer: Callable[[list[str]], Tensor], captions: list[str]) -> Tensor:
    """(N, L) int64, cut to the longest caption; N may be 0."""
    return cut(tokenizer(captions or [""]))[: len(captions)]


def cut(text: Tensor) -> Tensor:
    """Drop the columns after the last token of the longest caption: exact for causal towers."""
    used = (text != 0).any(dim=0).nonzero()
    return text[:, : int(used[-1]) + 1 if len(used) else 1].contiguous()


def distinct(readers: Sequence[Reader]) -> list[Reader]:
    """The readers, or one of them when all are equal."""
    if not readers:
        raise ValueError("readers must hold at least one Reader, got none")
    for reader in readers:
        if not isinstance(reader, Reader):
            raise TypeError(f"readers must be Readers, got {type(reader).__name__}")
    return [readers[0]] if all(reader == readers[0] for reader in readers) else list(readers)


def _unique(values) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


_place = list.index


def _no_images(preprocess: Callable[["Image"], Tensor]) -> Tensor:
    """(0, 3, H, W), of the size that a picture would have had."""
    from PIL import Image

    return preprocess(Image.new("RGB", (8, 8))).unsqueeze(0)[:0]


def caption(text: str, key: str) -> str:
    """A caption that can be read.

    Raises:
        BrokenSample: it is blank, or bytes that are no UTF-8 (surrogate escapes).
    """
    if not text or text.isspace():
        raise BrokenSample(key, "has an empty caption")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BrokenSample(key, "has a caption that is no UTF-8") from None
    return text


def printable(text: str) -> str:
    """A name for a log: at most 200 characters of one line, what does not print spelled out."""
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
