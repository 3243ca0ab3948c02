"""Millions of strings in two blocks of memory, which worker processes share."""

from array import array
from collections.abc import Iterable
from typing import Any


class Strings:
    """A list of strings, about as large as their bytes.

    A list of Python's would be copied, page by page, into each worker that counts a reference. What
    is no UTF-8 (surrogate escapes, from a file) is kept as the bytes that it was.
    """

    def __init__(self, values: Iterable[str] = ()):
        self._bytes, self._ends = bytearray(), array("q", [0])
        for value in values:
            self.append(value)

    def append(self, value: str) -> None:
        """Add one at the end."""
        self._bytes += value.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def hash_into(self, digest: Any) -> None:
        """Update a digest of hashlib's with all of them."""
        digest.update(self._ends)
        digest.update(self._bytes)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"Strings: index must be from 0 to {len(self) - 1}, got {index}")
        start, end = self._ends[index : index + 2]
        return self._bytes[start:end].decode("utf-8", "surrogateescape")
