"""Malformed calls of the compiled engine, each in its own words; run as a process of its own.

    python [-O] -m tests.contrastive.malformed

Every call is a good one with one thing wrong that can be seen without dereferencing an address. A
line is printed for each that raises no TypeError, nor a ValueError that names the argument.
"""

import itertools

import torch

from tests.support.extension import try_all

M, N, OFFSET = 6, 9, 2
BIG = (2**31 + 1, 2**61, 2**62, 2**63 - 1)
# What each function writes; ranges that are only read may overlap.
WRITTEN = {
    "contrastive_stats": {"rows", "columns", "positive", "workspace"},
    "contrastive_grads": {"logits", "dscale", "workspace"},
    "contrastive_whole": {"logits", "loss", "dscale", "workspace"},
    "contrastive_workspace": set(),
}
NOT_INTS = (None, 1.5, "1", [1], torch.ones(1), object())


class Memory:
    """Buffers that a good call may read and write."""

    def __init__(self):
        self.tensors = {
            "logits": torch.randn(M, N),
            "teacher": torch.randn(M, N),
            "rows": torch.ones(5, M),
            "columns": torch.ones(5, N),
            "positive": torch.zeros(M),
            "row_weight": torch.ones(M),
            "column_weight": torch.ones(N),
            "dscale": torch.zeros(1, dtype=torch.float64),
            "loss": torch.zeros(1),
            "square_dscale": torch.zeros(1),
            "workspace": torch.empty(1 << 16, dtype=torch.uint8),
        }

    def __getitem__(self, name: str) -> int:
        return self.tensors[name].data_ptr()


def good_calls(at: Memory) -> dict[str, dict]:
    """The arguments of a call that works, for each function."""
    shared = {
        "dtype": "float32",
        "shape": (M, N, OFFSET),
        "tile": (0, 0, M, N),
        "logits": (at["logits"], N),
        "scale": 2.0,
        "teacher": (at["teacher"], N, 3.0),
        "rows": at["rows"],
        "columns": at["columns"],
        "workspace": (at["workspace"], 1 << 16),
        "threads": 1,
        "isa": "best",
    }
    weights = {
        "row_weight": (at["row_weight"], 1),
        "column_weight": (at["column_weight"], 1),
        "dscale": at["dscale"],
        "alpha": 0.5,
    }
    whole = {name: shared[name] for name in shared if name not in ("shape", "rows", "columns")}
    whole |= {"tile": (0, 0, M, M), "alpha": 0.5, "loss": at["loss"]}
    return {
        "contrastive_stats": {**shared, "positive": at["positive"]},
        "contrastive_grads": {**shared, **weights},
        "contrastive_whole": {**whole, "dscale": at["square_dscale"]},
        "contrastive_workspace": {"dtype": "float32", "height": M, "width": N},
    }


def _address_faults(good: int):
    """Of a bare address, or of the first item of a tuple."""
    yield from (0, good + 1, good + 2, -good, 2**64, 2**64 - 4, *NOT_INTS)


def _number_faults(values):
    yield from (-1, -(2**63), 2**63, 2**200, *values, *NOT_INTS)


def faults(function: str, arguments: dict, at: Memory):
    """(what, changed arguments): the call with one thing wrong."""
    for name, value in arguments.items():
        if name in ("dtype", "isa"):
            for wrong in ("", "float16", "FLOAT32", "avx", None, 3, torch.float32, b"float32\0"):
                yield name, {name: wrong}
        elif name in ("shape", "tile"):
            for k in range(len(value)):
                # That many columns would be fine, were there memory: no address tells.
                believable = name == "shape" and k == 1
                for wrong in _number_faults(BIG[1:] if believable else BIG):
                    yield f"{name}[{k}]", {name: (*value[:k], wrong, *value[k + 1 :])}
            for wrong in (value[:-1], (*value, 0), (), None, 7, "shape"):
                yield name, {name: wrong}
        elif isinstance(value, tuple):
            for wrong in _address_faults(value[0]):
                yield f"{name}.address", {name: (wrong, *value[1:])}
            strides = (N - 4,) if name in ("logits", "teacher") else (2, 3)
            strides = (16,) if name == "workspace" else strides
            for wrong in _number_faults(strides if name == "workspace" else (*strides, *BIG[1:])):
                yield f"{name}.size", {name: (value[0], wrong, *value[2:])}
            for wrong in ((value[0],), (*value, 0), 5, "x"):
                yield name, {name: wrong}
        elif name == "threads":
            for wrong in (0, -1, 4097, 2**31, 2**63, *NOT_INTS):
                yield name, {name: wrong}
        elif name == "alpha":
            for wrong in (-0.1, 1.5, float("nan"), float("inf"), None, "0", [0.5]):
                yield name, {name: wrong}
            yield "alpha without a teacher", {"teacher": None}
        elif name == "scale":
            for wrong in (None, "2", [2.0], object()):
                yield name, {name: wrong}
        elif name in ("height", "width"):
            for wrong in _number_faults(BIG[1:]):
                yield name, {name: wrong}
        else:
            for wrong in _address_faults(value):
                yield name, {name: wrong}
    ranges = [name for name in arguments if name in at.tensors]
    for one, other in itertools.permutations(ranges, 2):
        if {one, other} & WRITTEN[function]:
            target = arguments[other]
            target = target[0] if isinstance(target, tuple) else target
            rest = arguments[one][1:] if isinstance(arguments[one], tuple) else None
            yield f"{one} over {other}", {one: target if rest is None else (target, *rest)}


def main() -> None:
    at = Memory()
    try_all((name, good, [*faults(name, good, at)]) for name, good in good_calls(at).items())


if __name__ == "__main__":
    main()
