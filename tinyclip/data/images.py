"""Picture files that somebody else made: decoded to upright RGB, or refused with the reason.

JPEG, PNG and WebP, known by their content and not by their name. The size is read off the header
before a pixel is decoded. What decodes is converted as a viewer would show it:

    alpha, a transparent palette or colour      laid over white
    16-bit grey                                 scaled to 8 bits, rounded
    CMYK, YCbCr, grey, 1 bit, palette           Pillow's conversion
    several frames                              the first
    EXIF orientation                            turned upright
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tinyclip.data import draws
from tinyclip.data.source import BrokenSample

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MOST_PIXELS = 25_000_000
# A strip of one pixel by millions grows by the square when its short side is resized to 224.
MOST_ELONGATED = 200
_MOST_BYTES = 1 << 28


def need_pillow() -> None:
    """Raise a sentence that says what to install."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'tinyclip[train]'") from error


def decode(data: bytes | BinaryIO, key: str, most_pixels: int = MOST_PIXELS) -> "Image":
    """A picture as RGB.

    Args:
        data: a file's content, or the open file.
        key: what the sample is called.
        most_pixels: larger pictures are broken; they are not decoded.

    Raises:
        BrokenSample: it is no JPEG, PNG or WebP, damaged, cut off or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow's own limit is above ours; its warnings about metadata change no pixel.
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
            _check_size(image.size, key, most_pixels)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (BrokenSample, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BrokenSample(key, f"is no {', '.join(FORMATS)} file") from None
    except Exception as error:  # a decoder fails on damaged bytes with whatever they lead to
        raise BrokenSample(key, f"cannot be decoded: {error or type(error).__name__}") from error


def read_image(path: str | Path, key: str, most_pixels: int = MOST_PIXELS) -> "Image":
    """Decode a file.

    Raises:
        BrokenSample: as `decode`; also if there is no such regular file or it cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise BrokenSample(key, "is no regular file")
        check_bytes(status.st_size, key)
        with path.open("rb") as opened:
            return decode(opened, key, most_pixels)
    except FileNotFoundError:
        raise BrokenSample(key, "there is no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, BrokenSample):
            raise
        raise BrokenSample(key, f"cannot be read: {error}") from error


def check_bytes(size: int, key: str) -> None:
    """Refuse what is empty, or far too large to be read at once."""
    if size == 0:
        raise BrokenSample(key, "is empty, 0 bytes")
    if size > _MOST_BYTES:
        raise BrokenSample(key, f"has {size} bytes, more than {_MOST_BYTES}")


def _check_size(size: tuple[int, int], key: str, most_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BrokenSample(key, f"has no pixels, {width} x {height}")
    if width * height > most_pixels:
        raise BrokenSample(key, f"has {width} x {height} pixels, more than {most_pixels}")
    if max(size) > MOST_ELONGATED * min(size):
        raise BrokenSample(key, f"has {width} x {height} pixels, beyond 1:{MOST_ELONGATED}")


def _rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class RandomCrop:
    """Take a random box and resize it to the model's size: open_clip's augmentation.

    The box has a share of the area drawn from `scale` and a width to height drawn from `ratio`,
    evenly in its logarithm; of ten that are drawn the first that fits is taken, else the whole
    picture, cropped to the nearest ratio.

    Args:
        scale: share of the picture's area, from and to, within (0, 1].
        ratio: width / height, from and to.

    Raises:
        ValueError: a range is not an ascending pair of positive numbers; the text names it.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
                raise ValueError(
                    f"RandomCrop: {name} must be an ascending pair within (0, {most:g}], got"
                    f" {value!r}"
                )

    def __call__(
        self, image: "Image", preprocess: Callable[..., Any], where: Sequence[int]
    ) -> "Image":
        """A picture of the size that `preprocess.size` names (a side, or height and width).

        Args:
            where: what the draw depends on, such as (seed, epoch, index).

        Raises:
            TypeError: the preprocess does not name its size.
        """
        size = getattr(preprocess, "size", None)
        if size is None:
            raise TypeError(
                "RandomCrop: the preprocess must have a size, such as models.Preprocess, got"
                f" {type(preprocess).__name__}"
            )
        height, width = (size, size) if isinstance(size, int) else size
        resample = {"bilinear": 2, "bicubic": 3}[getattr(preprocess, "interpolation", "bicubic")]
        return image.crop(self.box(*image.size, where)).resize((width, height), resample)

    def box(self, width: int, height: int, where: Sequence[int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the box drawn in a picture of this size."""
        low, high = map(math.log, self.ratio)
        for area, ratio, x, y in draws.uniform(draws.CROP, *where, np.arange(40)).reshape(10, 4):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * area)
            ratio = math.exp(low + (high - low) * ratio)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
