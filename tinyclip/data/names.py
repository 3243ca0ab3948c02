"""The shards that a user's words name: brace lists, wild cards, several joined by ``::``."""

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product

_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS = 1_000_000


def expand(spec: str) -> list[str]:
    """The paths that a spec names, in its order, those of a wild card sorted.

    Raises:
        ValueError: a part is a URL or a command, or its braces break a rule.
        FileNotFoundError: a wild card matches nothing.
    """
    paths: list[str] = []
    for part in spec.split("::"):
        scheme = re.match(r"(pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://)", part)
        if scheme or not part.strip():
            what = f"{scheme[1]!r} is read by no one here" if scheme else "is empty"
            raise ValueError(
                f"shards: {part!r}: {what}: shards are files of this machine, joined by '::'"
            )
        for path in _braces(part):
            if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
                raise ValueError(
                    f"shards: {path!r} is compressed, and samples are read in place: decompress it"
                )
            wild = glob.has_magic(path) and not os.path.exists(path)
            matches = sorted(glob.glob(path)) if wild else [path]
            if not matches:
                raise FileNotFoundError(f"shards: no file matches {path!r}")
            paths += matches
    return paths


def _braces(part: str) -> Iterator[str]:
    pieces = _BRACES.split(part)
    fixed, lists = pieces[::2], [_alternatives(part, inside) for inside in pieces[1::2]]
    if any("{" in piece or "}" in piece for piece in fixed):
        raise ValueError(f"shards: {part!r}: braces must match, and not lie within each other")
    if math.prod(len(values) for values in lists) > _MOST_SHARDS:
        raise ValueError(f"shards: {part!r} names more than {_MOST_SHARDS} shards")
    for chosen in product(*lists):
        yield "".join(a + b for a, b in zip(fixed, (*chosen, ""), strict=True))


def _alternatives(part: str, inside: str) -> Sequence[str]:
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if span is None:
        if ".." in inside or "," not in inside:
            raise ValueError(
                f"shards: {part!r}: braces must hold a range of numbers such as 000..123, or a"
                f" list with commas, not {inside!r}"
            )
        return inside.split(",")
    first, last = int(span[1]), int(span[2])
    if not first <= last < first + _MOST_SHARDS:
        raise ValueError(
            f"shards: {part!r}: a range must ascend, by fewer than {_MOST_SHARDS}, not {inside!r}"
        )
    width = len(span[1]) if span[1].startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
