"""Tile sizes: a table that ships, and one that a machine may measure for itself.

The shipped table is tables/attention.json, keyed by architecture, bits, head dim, length and
causal; it decides alone unless TINYCLIP_AUTOTUNE=1. Then the first call of a kind of problem times
every candidate that the table knows for the kind, and the winner is kept in the user's cache for
later processes. Tuning is opt-in because a race between timings gives the ranks of a job different
sums: Megatron-LM #6966 counted 13 of 22 entries on which eight GPUs disagreed.
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

AUTOTUNE = os.environ.get("TINYCLIP_AUTOTUNE") == "1"
_LENGTHS = (64, 80, 128, 208, 272, 592, 1024)  # buckets that CLIP's 50, 77, 197, 257, 577 fall in


class Tile(NamedTuple):
    """Tile of queries, tile of keys, warps a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Kind(NamedTuple):
    """What a tile is chosen by."""

    kind: str
    arch: int
    bits: int
    d: int
    length: int
    causal: bool


def kind_of(kind: str, q: torch.Tensor, length: int, causal: bool) -> Kind:
    """The kind of problem: "fwd" or "bwd", of queries (B, Lq, H, D) and the longer length."""
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return Kind(kind, 10 * major + minor, q.dtype.itemsize * 8, q.shape[-1], length, causal)


@cache
def table() -> tuple[dict, ...]:
    """The rows of the shipped table."""
    text = Path(__file__).with_name("tables").joinpath("attention.json").read_text()
    return tuple(json.loads(text)["rows"])


def _fits(row: dict, key: Kind, arch: int) -> bool:
    return (
        (row["kind"], row["arch"], row["bits"]) == (key.kind, arch, key.bits)
        and key.d <= row["d"]
        and (row["length"] is None or key.length <= row["length"])
        and (row["causal"] is None or key.causal == row["causal"])
    )


@cache
def shipped(key: Kind) -> Tile:
    """The table's tile: of the newest architecture in it that is not newer than the device."""
    for arch in sorted({row["arch"] for row in table()}, reverse=True):
        if arch <= key.arch:
            for row in table():
                if _fits(row, key, arch):
                    return Tile(*row["tile"])
    raise ValueError(f"tuning: key must be covered by tables/attention.json, got {key}")


def candidates(key: Kind) -> tuple[Tile, ...]:
    """Every tile that the table holds for such a kernel and head dim, the shipped one first."""
    rows = (row for row in table() if (row["kind"], row["bits"]) == (key.kind, key.bits))
    tiles = [Tile(*row["tile"]) for row in rows if key.d <= row["d"]]
    return tuple(dict.fromkeys([shipped(key), *tiles]))


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "none"
    return Path(base) / "tinyclip" / f"attention-{name}.json"


def _bucket(key: Kind) -> str:
    """The name a measurement is kept under: lengths share a bucket, batches do not count."""
    length = next((most for most in _LENGTHS if key.length <= most), key.length)
    return "-".join(str(value) for value in key._replace(length=length))


_measured: dict[str, Tile] = {}


def _load() -> None:
    try:
        kept = json.loads(_cache_file().read_text())
        _measured.update({name: Tile(*tile) for name, tile in kept.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return  # nothing kept, or nothing to be used: it is measured again


def _keep() -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(_measured, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return  # a cache that cannot be written costs a measurement in the next process


def choose(key: Kind, milliseconds: Callable[[Tile], float]) -> Tile:
    """The tile to launch with; `milliseconds` times one, and is called only to tune."""
    if not AUTOTUNE:
        return shipped(key)
    if not _measured:
        _load()
    name = _bucket(key)
    if name not in _measured:
        timed = {}
        for tile in candidates(key):
            try:
                timed[tile] = milliseconds(tile)
            except RuntimeError as error:
                if "out of resource" not in str(error):  # a tile this chip has no room for
                    raise
        _measured[name] = min(timed, key=timed.get)
        _keep()
    return _measured[name]
