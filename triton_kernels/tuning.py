"""Tile sizes: tables that ship, and one that a machine may measure for itself.

The shipped table of an op is tables/<op>.json, keyed by architecture, bits and sizes; it decides
alone unless TINYCLIP_AUTOTUNE=1. Then the first call of a kind of problem times every candidate
that the table knows for the kind, and the winner is kept in the user's cache for later processes.
Tuning is opt-in because a race between timings gives the ranks of a job different sums: Megatron-LM
#6966 counted 13 of 22 entries on which eight GPUs disagreed.

A key is a NamedTuple with an `arch`, which says of its op's rows which ones fit it (`fits`), which
are worth timing (`related`), under what name a measurement is kept (`bucket`), and what a choice is
(`choice`, a NamedTuple of plain values).
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

AUTOTUNE = os.environ.get("TINYCLIP_AUTOTUNE") == "1"
_LENGTHS = (64, 80, 128, 208, 272, 592, 1024)  # buckets that CLIP's 50, 77, 197, 257, 577 fall in


# What a tile is answered with that this chip has no room for, or this compiler no way to make.
_REFUSED = ("out of resource", "PassManager::run failed")


class Tile(NamedTuple):
    """Tile of queries, tile of keys, warps a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Kind(NamedTuple):
    """What an attention tile is chosen by."""

    kind: str
    arch: int
    bits: int
    d: int
    length: int
    causal: bool

    op = "attention"
    choice = Tile

    def fits(self, row: dict) -> bool:
        """Whether a row of the table serves this kind."""
        return (
            self.related(row)
            and (row["length"] is None or self.length <= row["length"])
            and (row["causal"] is None or self.causal == row["causal"])
        )

    def related(self, row: dict) -> bool:
        """Whether the row's tile is worth timing for this kind."""
        return (row["kind"], row["bits"]) == (self.kind, self.bits) and self.d <= row["d"]

    def bucket(self) -> "Kind":
        """Lengths share a bucket, batches do not count."""
        length = next((most for most in _LENGTHS if self.length <= most), self.length)
        return self._replace(length=length)


def architecture(x: torch.Tensor) -> int:
    """The compute capability of x's device, times ten; off a GPU, as if it were sm_90."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    return 10 * major + minor


def kind_of(kind: str, q: torch.Tensor, length: int, causal: bool) -> Kind:
    """The kind of problem: "fwd" or "bwd", of queries (B, Lq, H, D) and the longer length."""
    return Kind(kind, architecture(q), q.dtype.itemsize * 8, q.shape[-1], length, causal)


@cache
def table(op: str = "attention") -> tuple[dict, ...]:
    """The rows of an op's shipped table."""
    text = Path(__file__).with_name("tables").joinpath(f"{op}.json").read_text()
    return tuple(json.loads(text)["rows"])


def serving(key: Any) -> dict:
    """The table's row for a key: of the newest architecture in it not newer than the device."""
    for arch in sorted({row["arch"] for row in table(key.op)}, reverse=True):
        if arch <= key.arch:
            for row in table(key.op):
                if row["arch"] == arch and key.fits(row):
                    return row
    raise ValueError(f"tuning: key must be covered by tables/{key.op}.json, got {key}")


@cache
def shipped(key: Any) -> Any:
    """The table's choice for a key."""
    return key.choice(*serving(key)["tile"])


def candidates(key: Any) -> tuple[Any, ...]:
    """Every choice that the table holds for related problems, the shipped one first."""
    related = [key.choice(*row["tile"]) for row in table(key.op) if key.related(row)]
    return tuple(dict.fromkeys([shipped(key), *related]))


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "none"
    return Path(base) / "tinyclip" / f"tiles-{name}.json"


_measured: dict[str, list] = {}


def _load() -> None:
    try:
        kept = json.loads(_cache_file().read_text())
        _measured.update({name: list(choice) for name, choice in kept.items()})
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


def choose(key: Any, milliseconds: Callable[[Any], float]) -> Any:
    """What to launch with; `milliseconds` times one choice, and is called only to tune."""
    if not AUTOTUNE:
        return shipped(key)
    if not _measured:
        _load()
    name = "-".join(str(value) for value in (key.op, *key.bucket()))
    if len(_measured.get(name, ())) != len(key.choice._fields):
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return shipped(key)  # nothing can be timed inside a CUDA graph
        timed = {}
        for choice in candidates(key):
            try:
                timed[choice] = milliseconds(choice)
            except RuntimeError as error:
                if not any(text in str(error) for text in _REFUSED):
                    raise
        _measured[name] = list(min(timed, key=timed.get))
        _keep()
    return key.choice(*_measured[name])
