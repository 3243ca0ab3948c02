"""Scanned-digit scenes: real handwriting, two digits in colour side by side, and what they show.

The scans are scikit-learn's bundled 8 x 8 ones (1,797 handwritten digits of the UCI repository,
Alpaydin & Kaynak), so that nothing is downloaded. A scan is in one split only: what a model reads
on the test scenes it has never seen a stroke of.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyclip.data import draws
from tinyclip.data.source import FIRST, Batch, Pair, Reader, Sample, Source, Turn, cut, distinct

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIZE = (16, 32)  # height, width
PREPROCESS = {"size": IMAGE_SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONTEXT_LENGTH = 16  # a caption has 10 tokens
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# scans and scenes of a split; training scenes are new each epoch
SPLITS = {"train": (1200, 25_600), "validation": (200, 1_000), "test": (397, 4_000)}


@lru_cache(maxsize=1)
def captions() -> tuple[str, ...]:
    """The 1,600 captions; caption ((lc · 10 + ld) · 4 + rc) · 10 + rd has the left digit ld in
    colour lc and the right digit rd in colour rc."""
    things = [f"a {colour} {digit}" for colour, digit in product(COLOURS, DIGITS)]
    return tuple(f"{left} left of {right}" for left, right in product(things, things))


@lru_cache(maxsize=1)
def vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """A CLIP vocabulary in which every word of the captions is one token.

    Byte-pair encoding's own training on these words: the most frequent pair of neighbours is
    merged until no word is in pieces, so that encoding by the merges ends there, too.

    Returns:
        token -> id and the merges, what `models.Tokenizer` takes. As in OpenAI's: the 256 bytes,
        the same at the end of a word, the merges, start and end of text.
    """
    texts = " ".join(captions()).split()
    words = {word: (*word[:-1], word[-1] + "</w>") for word in sorted(set(texts))}
    merges = []
    while pairs := [pair for parts in words.values() for pair in pairwise(parts)]:
        merges.append(max(sorted(set(pairs)), key=pairs.count))
        words = {word: _merged(parts, merges[-1]) for word, parts in words.items()}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, tuple(merges)


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 16, 16) uint8, each pixel of a scan as 2 x 2, and the digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digit scenes need scikit-learn: pip install 'tinyclip[train]'"
        ) from error
    scans = load_digits()
    grey = np.rint(scans.images * (255 / 16)).astype(np.uint8)
    return grey.repeat(2, axis=1).repeat(2, axis=2), scans.target.astype(np.int64)


@lru_cache(maxsize=3)
def _split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """A split's scans in every colour, (N, 4, 3, 16, 16) uint8, and their digits."""
    if split not in SPLITS:
        raise ValueError(f"digits: split must be one of {tuple(SPLITS)}, got {split!r}")
    grey, digits = _scans()
    counts = [count for count, _ in SPLITS.values()]
    place = list(SPLITS).index(split)
    chosen = np.split(draws.permutation(len(grey), draws.SPLIT), np.cumsum(counts))[place]
    colours = np.array(list(COLOURS.values()), dtype=np.uint8)
    return grey[chosen][:, None, None] * colours[None, :, :, None, None], digits[chosen]


class Scenes(NamedTuple):
    """Which scans, in which colours, of N scenes; caption: (N,) int64 into `captions()`."""

    scans: np.ndarray  # (N, 2), left and right, into the split's scans
    colours: np.ndarray  # (N, 2)
    caption: np.ndarray


def scenes(split: str, indices: Sequence[int] | np.ndarray, turn: Turn = FIRST) -> Scenes:
    """Scenes by number: those of validation and test are fixed, of training fresh each turn."""
    _, digits = _split(split)
    turn = turn if split == "train" else FIRST
    index = np.asarray(indices, dtype=np.int64)[:, None]
    where = (draws.SCENE, list(SPLITS).index(split), *turn, index)
    scans = draws.below(len(digits), *where, np.arange(2))
    colours = draws.below(len(COLOURS), *where, np.arange(2, 4))
    things = colours * len(DIGITS) + digits[scans]
    return Scenes(scans, colours, things[:, 0] * len(COLOURS) * len(DIGITS) + things[:, 1])


def render(split: str, drawn: Scenes) -> np.ndarray:
    """Pictures of scenes, (N, 3, 16, 32) uint8."""
    table, _ = _split(split)
    halves = table[drawn.scans, drawn.colours]  # (N, 2, 3, 16, 16)
    return np.concatenate((halves[:, 0], halves[:, 1]), axis=-1)


class DigitScenes(Source):
    """The scenes of a split.

    Args:
        split: "train", "validation" or "test".
        count: scenes, of an epoch when training; 25,600, 1,000 and 4,000 by default.
        noise: the fraction of training captions that are replaced by a wrong one.

    Raises:
        ValueError: an argument breaks a rule; the text names it.
    """

    def __init__(self, split: str = "train", *, count: int | None = None, noise: float = 0.0):
        if split not in SPLITS:
            raise ValueError(f"digits: split must be one of {tuple(SPLITS)}, got {split!r}")
        count = SPLITS[split][1] if count is None else count
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"digits: count must be a positive integer, got {count!r}")
        if not 0 <= noise <= 1:
            raise ValueError(f"digits: noise must be from 0 to 1, got {noise!r}")
        if noise and split != "train":
            raise ValueError(f"digits: noise is for the training captions, not for {split!r}")
        _split(
            split
        )  # scikit-learn is missed here, and the scans are read before any worker starts
        self.split, self.count, self.noise = split, count, noise
        self._readers: list[tuple[Reader, tuple[bool, Tensor]]] = []

    def __len__(self) -> int:
        return self.count

    def listed(self) -> tuple[str, ...]:
        """See `Source.listed`."""
        return (repr(self),)

    @property
    def classes(self) -> tuple[str, ...]:
        """All captions: zero-shot classification chooses among them."""
        return captions()

    @property
    def labels(self) -> np.ndarray:
        """(len,) int64: what each scene shows, its place in `classes`."""
        return scenes(self.split, np.arange(self.count)).caption

    def sample(self, index: int, turn: Turn = FIRST) -> Sample:
        """The scene of an index as a PIL image."""
        if not 0 <= index < self.count:
            raise IndexError(f"digits: index must be from 0 to {self.count - 1}, got {index}")
        drawn = scenes(self.split, [index], turn)
        said = self._said(drawn.caption, np.array([index]), turn)[0]
        picture = _picture(render(self.split, drawn)[0])
        return Sample(self._key(index), picture, (captions()[said],))

    def batch(
        self,
        indices: Sequence[int],
        readers: Sequence[Reader],
        turn: Turn = FIRST,
        augment=None,
    ) -> Batch:
        """As `Source.batch`, all scenes at once where the preprocess only normalises."""
        readers = distinct(readers)
        if augment is not None or not all(map(self._reads_plainly, readers)):
            return super().batch(indices, readers, turn, augment)
        index = np.asarray(indices, dtype=np.int64)
        drawn = scenes(self.split, index, turn)
        pixels = render(self.split, drawn)
        said = torch.from_numpy(self._said(drawn.caption, index, turn))
        pairs = []
        for reader in readers:
            text = self._known(reader)[1][said]
            pairs.append(Pair(_normalised(pixels, reader.preprocess), cut(text)))
        return Batch(tuple(pairs), tuple(map(self._key, index.tolist())), ())

    def _key(self, index: int) -> str:
        return f"digits:{self.split}/{index}"

    def _said(self, true: np.ndarray, index: np.ndarray, turn: Turn) -> np.ndarray:
        """The captions that training reads: with noise, some are another scene's."""
        if not self.noise:
            return true
        wrong = draws.uniform(draws.NOISE, *turn, index, 0) < self.noise
        other = 1 + draws.below(len(captions()) - 1, draws.NOISE, *turn, index, 1)
        return np.where(wrong, (true + other) % len(captions()), true)

    def _reads_plainly(self, reader: Reader) -> bool:
        return self._known(reader)[0]

    def _known(self, reader: Reader) -> tuple[bool, Tensor]:
        """What is found out once for a reader: whether its preprocess only normalises, and all
        captions' tokens."""
        for known, found in self._readers:
            if known == reader:
                return found
        tokens = reader.tokenizer(list(captions()))
        self._readers.append((reader, (_only_normalises(reader.preprocess), tokens)))
        return self._readers[-1][1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_readers": []}

    def __repr__(self) -> str:
        return f"DigitScenes({self.split!r}, count={self.count}, noise={self.noise})"


def _normalised(pixels: np.ndarray, preprocess: Callable) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def _only_normalises(preprocess: Callable) -> bool:
    """Whether a preprocess does to a scene what its mean and std say, and no more: it is tried."""
    if getattr(preprocess, "size", None) != IMAGE_SIZE or not hasattr(preprocess, "std"):
        return False
    pixels = render("validation", scenes("validation", [0]))
    return torch.equal(preprocess(_picture(pixels[0])), _normalised(pixels, preprocess)[0])


def _picture(pixels: np.ndarray) -> "Image":
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
