"""The members of a tar file, by its headers alone; payloads are skipped, nothing is extracted.

Python's tarfile ends without a word at a header that is cut or damaged: whatever follows is lost.
Here an archive is whole, or it is an error: every header's checksum is right, every payload lies in
the file, the end marker is there, and nothing comes after it. ustar, GNU and pax long names and
sizes are read, which is what tar, tarfile and webdataset write.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_NO_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = _EXTENSIONS = (b"L", b"K", b"x", b"g")
_LONGEST_EXTENSION = 1 << 16
_LONGEST_NAME = 4096


class TarError(ValueError):
    """A tar file is cut, damaged or of a kind that is not read."""


class Member(NamedTuple):
    """A file in an archive; its payload is `size` bytes at `offset`."""

    name: str  # what is no UTF-8 is in surrogate escapes
    offset: int
    size: int
    regular: bool  # links, devices, folders and sparse files are not


def members(file: int) -> Iterator[Member]:
    """The members of an open tar file (a descriptor that can be read anywhere).

    Raises:
        TarError: at the first thing that is wrong, with its place in the file.
    """
    length = os.fstat(file).st_size
    if length == 0:
        raise TarError("is empty, 0 bytes")
    place, extended = 0, {}
    while True:
        header = os.pread(file, _BLOCK, place)
        if len(header) < _BLOCK:
            raise TarError(f"is cut: it ends at byte {length}, before the end of the archive")
        if header == bytes(_BLOCK):
            return _check_end(file, place)
        kind, size = header[156:157], _size(header, place)
        if kind in _NO_PAYLOAD:
            size = 0
        elif kind not in _EXTENSIONS:
            size = int(extended.get("size", size))
        start, end = place + _BLOCK, place + _BLOCK + size
        if end > length:
            raise TarError(
                f"is cut: it ends at byte {length}, and the member at byte {place} at byte {end}"
            )
        place = start + -(-size // _BLOCK) * _BLOCK
        if kind in _EXTENSIONS:
            if size > _LONGEST_EXTENSION:
                raise TarError(f"has an extended header of {size} bytes at byte {start}")
            data = os.pread(file, size, start)
            if kind == _LONG_NAME:
                extended["path"] = _text(data)
            elif kind == _PAX:
                extended.update(_pax(data, start))
            continue
        name = extended.get("path") or _name(header)
        if len(name) > _LONGEST_NAME:
            raise TarError(f"has a name of {len(name)} characters at byte {start}")
        sparse = any(key.startswith("GNU.sparse") for key in extended)
        yield Member(name, start, size, kind in _REGULAR and not sparse)
        extended = {}


def _size(header: bytes, place: int) -> int:
    """The size that a header states, once its checksum is found right."""
    try:
        stated = _number(header[148:156])
        total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        # Old programs summed the bytes as signed ones.
        if stated != total and stated != total - 256 * sum(b > 127 for b in header):
            raise ValueError
        return _number(header[124:136])
    except ValueError:
        raise TarError(f"is damaged, or no tar: no header at byte {place}") from None


def _number(field: bytes) -> int:
    """Octal digits, or 256-based after a first byte of 128."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError
    return int(digits, 8)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    # GNU's own format has times where ustar has the prefix.
    return f"{prefix}/{name}" if header[257:263] == b"ustar\0" and prefix else name


def _pax(data: bytes, start: int) -> dict[str, str]:
    """Records of the form ``length key=value\\n``."""
    found = {}
    while data:
        digits, blank, _ = data[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : max(0, length - 1)].partition(b"=")
        whole = blank and equals and data[length - 1 : length] == b"\n"
        if not whole or (key == b"size" and not (value.isdigit() and len(value) < 19)):
            raise TarError(f"is damaged: an extended header at byte {start} cannot be read")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found


def _check_end(file: int, place: int) -> None:
    while data := os.pread(file, 1 << 20, place):
        if data.strip(b"\0"):
            raise TarError(
                f"goes on after the end of its archive at byte {place}: archives that were put"
                " together with cat are read as one file each"
            )
        place += len(data)
