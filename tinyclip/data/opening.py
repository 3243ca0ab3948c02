"""From what a user types to a source."""

import glob
from pathlib import Path
from urllib.parse import parse_qsl

from tinyclip.data.digits import DigitScenes
from tinyclip.data.folders import ClassFolders
from tinyclip.data.images import MOST_PIXELS
from tinyclip.data.shards import Shards
from tinyclip.data.source import Source
from tinyclip.data.tables import Table

KINDS = ("auto", "csv", "webdataset", "folder", "digits")
_DIGIT_OPTIONS = {"noise": float, "count": int}


def open_data(
    spec: str,
    *,
    kind: str = "auto",
    separator: str | None = None,
    image_key: str = "filepath",
    caption_key: str = "title",
    quoted: bool = True,
    json_key: str = "caption",
    most_pixels: int = MOST_PIXELS,
) -> Source:
    """Open a data set.

    ====================================  =========================================================
    spec                                  what it is
    ====================================  =========================================================
    ``pairs.csv``, ``pairs.tsv``          a table of paths and captions: `tables.Table`
    ``shards/{000..123}.tar``, joined by  webdataset's shards: `shards.Shards`; a folder that holds
    ``::``, wild cards, a folder of them  some stands for all of them
    ``folder``                            one sub-folder a class: `folders.ClassFolders`
    ``digits:train?noise=0.3``            the scanned digits: `digits.DigitScenes`; also
                                          ``digits:validation``, ``digits:test``, ``count=``
    ====================================  =========================================================

    Args:
        spec: see above.
        kind: one of "auto" (by the table), "csv", "webdataset", "folder", "digits".
        separator, image_key, caption_key, quoted: of a table.
        json_key: of shards.
        most_pixels: larger pictures are broken samples.

    Raises:
        FileNotFoundError, ValueError: there is nothing to read, or it breaks a rule; the text
            names it.
        ImportError: a package is not installed; the text names the extra.
    """
    if kind not in KINDS:
        raise ValueError(f"open_data: kind (--dataset-type) must be one of {KINDS}, got {kind!r}")
    if not isinstance(most_pixels, int) or most_pixels < 1:
        raise ValueError(f"open_data: most_pixels must be a positive integer, got {most_pixels!r}")
    spec = str(spec)
    if not spec:
        raise ValueError("open_data: spec must name a data set, got ''")
    kind = _kind(spec) if kind == "auto" else kind
    if kind == "digits":
        return _digits(spec)
    if kind == "webdataset":
        spec = f"{glob.escape(spec)}/*.tar" if Path(spec).is_dir() else spec
        return Shards(spec, json_key=json_key, most_pixels=most_pixels)
    if kind == "folder":
        return ClassFolders(spec, most_pixels=most_pixels)
    return Table(
        spec,
        separator=separator,
        image_key=image_key,
        caption_key=caption_key,
        quoted=quoted,
        most_pixels=most_pixels,
    )


def _kind(spec: str) -> str:
    path = Path(spec)
    if spec.partition("?")[0].partition(":")[0] == "digits" and not path.exists():
        return "digits"
    if path.is_dir():
        return "webdataset" if next(path.glob("*.tar"), None) else "folder"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if ".tar" in spec or "::" in spec or "://" in spec:
        return "webdataset"
    if not path.exists():
        raise FileNotFoundError(f"open_data: {spec!r}: no such file or folder")
    raise ValueError(
        f"open_data: {spec!r} must be a .csv, a .tsv, .tar shards, a folder or"
        f" 'digits:train', or kind (--dataset-type) must say which of"
        f" {', '.join(KINDS[1:])} it is"
    )


def _digits(spec: str) -> DigitScenes:
    name, mark, options = spec.partition("?")
    split = name.partition(":")[2] or "train"
    try:
        given = dict(parse_qsl(options, keep_blank_values=True, strict_parsing=bool(mark)))
        return DigitScenes(split, **{key: _DIGIT_OPTIONS[key](v) for key, v in given.items()})
    except KeyError as error:
        raise ValueError(
            f"open_data: {spec!r}: its options are {', '.join(_DIGIT_OPTIONS)}, not {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"open_data: {spec!r}: {error}") from None
