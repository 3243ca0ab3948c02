"""Pictures with captions: CSV tables, tar shards, folders and digit scenes, in a set order.

`open_data` opens a source, `Loader` reads batches of it. docs/data.md is the page for users.
"""

from tinyclip.data.broken import BadSamples, TooManyBroken
from tinyclip.data.images import RandomCrop
from tinyclip.data.loader import Loader
from tinyclip.data.opening import open_data
from tinyclip.data.source import (
    Batch,
    BrokenSample,
    Pair,
    Reader,
    Sample,
    Skipped,
    Source,
    Turn,
)

__all__ = [
    "BadSamples",
    "Batch",
    "BrokenSample",
    "Loader",
    "Pair",
    "RandomCrop",
    "Reader",
    "Sample",
    "Skipped",
    "Source",
    "TooManyBroken",
    "Turn",
    "open_data",
]
