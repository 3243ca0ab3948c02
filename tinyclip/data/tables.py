"""CSV and TSV tables: one row a picture's path and its caption."""

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from tinyclip.data.images import MOST_PIXELS, need_pillow, read_image
from tinyclip.data.source import FIRST, BrokenSample, Sample, Source, Turn, caption
from tinyclip.data.strings import Strings

_SEPARATORS = ("\t", ",", ";")
_SPELLED = {"\\t": "\t", "tab": "\t", "comma": ","}
# What a row that cannot be used has in place of a path: no file is called so.
_BROKEN = "\0"


class Table(Source):
    """The rows of a CSV or TSV file, UTF-8 with or without its mark.

    A row is a sample, or a broken one: with too few or too many columns, an empty or undecodable
    caption, or a picture that cannot be read. Lines that are blank are no rows.

    Args:
        path: the file; its first row names the columns.
        separator: between columns (``"\\t"`` may be spelled out); without it, the one of tab, comma
            and semicolon that gives the first row both columns.
        image_key, caption_key: the columns of the paths, relative to the file's folder, and of the
            captions.
        quoted: whether a field may stand in double quotes; without it a quote is a character.
        most_pixels: larger pictures are broken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or quotes do not match; the text names it and the line.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        separator: str | None = None,
        image_key: str = "filepath",
        caption_key: str = "title",
        quoted: bool = True,
        most_pixels: int = MOST_PIXELS,
    ):
        need_pillow()
        self.path, self.most_pixels = Path(path), most_pixels
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            separator = self._separator(opened.readline(), separator, (image_key, caption_key))
            opened.seek(0)
            self._images, self._captions = Strings(), Strings()
            for image, said in self._rows(opened, separator, quoted, (image_key, caption_key)):
                self._images.append(image)
                self._captions.append(said)

    def __len__(self) -> int:
        return len(self._images)

    def sample(self, index: int, turn: Turn = FIRST) -> Sample:
        """See `Source.sample`."""
        name, said = self._images[index], self._captions[index]
        if name == _BROKEN:
            raise BrokenSample(f"{self.path.name} sample {index}", said)
        said = caption(said, name)
        return Sample(name, read_image(self.path.parent / name, name, self.most_pixels), (said,))

    def listed(self) -> tuple[Strings, ...]:
        """See `Source.listed`."""
        return self._images, self._captions

    def _separator(self, header: str, given: str | None, keys: tuple[str, str]) -> str:
        if "\0" in header or header.startswith("\udcff\udcfe"):
            raise ValueError(f"{self.path}: must be UTF-8; its first line looks like UTF-16")
        if given is not None:
            given = _SPELLED.get(given, given)
            if len(given) != 1:
                raise ValueError(
                    f"{self.path}: separator must be one character (--csv-separator), got {given!r}"
                )
            return given
        split = {s: next(csv.reader(StringIO(header), delimiter=s), []) for s in _SEPARATORS}
        for separator, columns in split.items():
            if set(keys) <= set(columns):
                return separator
        return max(_SEPARATORS, key=lambda separator: len(split[separator]))

    def _rows(
        self, opened, separator: str, quoted: bool, keys: tuple[str, str]
    ) -> Iterator[tuple[str, str]]:
        """Path and caption of each row, or the mark of a broken one and what is wrong."""
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        before = csv.field_size_limit(1 << 30)  # a caption of a million characters is only long
        rows = csv.reader(opened, delimiter=separator, quoting=quoting, strict=True)
        try:
            header = next(rows, [])
            image, said = self._places(header, keys)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    yield _BROKEN, f"line {rows.line_num} has {len(row)} columns, not {len(header)}"
                elif not row[image] or "\0" in row[image]:
                    yield _BROKEN, f"line {rows.line_num} names no picture in {keys[0]!r}"
                else:
                    yield row[image], row[said]
        except csv.Error as error:
            raise ValueError(
                f"{self.path}: line {rows.line_num}: {error}; if its quotes are not meant to"
                " enclose fields, give --csv-unquoted (in Python quoted=False)"
            ) from error
        finally:
            csv.field_size_limit(before)

    def _places(self, header: list[str], keys: tuple[str, str]) -> list[int]:
        shown = ", ".join(repr(name[:100]) for name in header) or "none"
        named = ("image_key, --csv-img-key", "caption_key, --csv-caption-key")
        for name, key in zip(named, keys, strict=True):
            if header.count(key) != 1:
                times = "no" if key not in header else "more than one"
                raise ValueError(
                    f"{self.path}: has {times} column {key!r} ({name}); its columns are {shown}"
                )
        return [header.index(key) for key in keys]
