"""Malformed calls of the extension's passes over rows, each a good call with one thing wrong that
can be seen without dereferencing an address; run as a process of its own.

    python [-O] -m tests.ops.malformed_rows

A line is printed for each that raises no TypeError, nor a ValueError that names the argument.
"""

import itertools

import torch

from tests.support.extension import try_all

ROWS, WIDTH = 6, 9
BIG = (2**61, 2**62, 2**63 - 1)
NOT_INTS = (1.5, "1", [1], torch.ones(1), object())
# What a call writes; ranges that are only read may overlap.
WRITTEN = {"y", "out", "mean", "rstd", "dx", "dweight", "dbias", "dhidden", "hidden", "dgate"}
# Which of its arguments may be None.
OPTIONAL = {"residual", "weight", "bias", "kept", "dtotal", "dx", "dweight", "dbias", "gate"}
OPTIONAL |= {"dgate"}


class Memory:
    """Buffers, and the names of the arguments that they are for."""

    def __init__(self):
        self.names, self.tensors = set(), []

    def at(self, name: str, *shape: int, dtype=torch.float32) -> int:
        self.names.add(name)
        self.tensors.append(torch.ones(shape, dtype=dtype))
        return self.tensors[-1].data_ptr()


def good_calls(memory: Memory) -> dict[str, dict]:
    """The arguments of a call that works, for each function."""

    def full(name):
        return memory.at(name, ROWS, WIDTH)

    def vector(name, size=WIDTH):
        return memory.at(name, size)

    start = {"dtype": "float32", "shape": (ROWS, WIDTH)}
    end = {"threads": 1, "isa": "best"}
    kept = memory.at("kept", WIDTH, dtype=torch.bool)
    statistics = {"mean": vector("mean", ROWS), "rstd": vector("rstd", ROWS)}
    return {
        "layer_norm_forward": {
            **start,
            "x": (full("x"), WIDTH),
            "residual": (full("residual"), WIDTH),
            "weight": vector("weight"),
            "bias": vector("bias"),
            "kept": kept,
            "eps": 1e-5,
            "y": full("y"),
            "total": full("total"),
            **statistics,
            **end,
        },
        "layer_norm_backward": {
            **start,
            "dy": (full("dy"), WIDTH),
            "dtotal": (full("dtotal"), WIDTH),
            "total": (full("total"), WIDTH),
            "weight": vector("weight"),
            "kept": kept,
            **statistics,
            "dx": full("dx"),
            "dweight": vector("dweight"),
            "dbias": vector("dbias"),
            **end,
        },
        "activation_forward": {
            **start,
            "kind": "gelu",
            "pre": full("pre"),
            "gate": vector("gate"),
            "hidden": full("hidden"),
            **end,
        },
        "activation_backward": {
            **start,
            "kind": "gelu",
            "pre": full("pre"),
            "gate": vector("gate"),
            "dhidden": full("dhidden"),
            "hidden": full("hidden"),
            "dbias": vector("dbias"),
            "dgate": vector("dgate"),
            **end,
        },
    }


def faults(function: str, arguments: dict, memory: Memory):
    """(what, changed arguments): the call with one thing wrong."""
    for name, value in arguments.items():
        missing = (
            ()
            if name in OPTIONAL or (function, name) == ("activation_backward", "hidden")
            else (None,)
        )
        if isinstance(value, str):
            for wrong in ("", "float16", "GELU", "avx", None, 3, torch.float32, b"gelu\0"):
                yield name, {name: wrong}
        elif name == "shape":
            for k in range(2):
                for wrong in (0, -1, -(2**63), 2**63, 2**200, *BIG, None, *NOT_INTS):
                    yield name, {name: (*value[:k], wrong, *value[k + 1 :])}
            for wrong in (value[:-1], (*value, 0), (), None, 7, "shape"):
                yield name, {name: wrong}
        elif isinstance(value, tuple):
            for wrong in (
                0,
                value[0] + 1,
                value[0] + 2,
                -value[0],
                2**64,
                2**64 - 4,
                None,
                *NOT_INTS,
            ):
                yield name, {name: (wrong, value[1])}
            for wrong in (-1, WIDTH - 1, 0, -(2**63), 2**63, *BIG, None, *NOT_INTS):
                yield name, {name: (value[0], wrong)}
            for wrong in ((value[0],), (*value, 0), 5, "x", *missing):
                yield name, {name: wrong}
        elif name == "threads":
            for wrong in (0, -1, 4097, 2**31, 2**63, None, *NOT_INTS):
                yield name, {name: wrong}
        elif name == "eps":
            for wrong in (-1e-9, float("nan"), -float("inf"), None, "0", [0.5]):
                yield name, {name: wrong}
        else:
            odd = () if name == "kept" else (value + 1, value + 2)
            for wrong in (0, *odd, -value, 2**64, 2**64 - 4, *missing, *NOT_INTS):
                yield name, {name: wrong}
    if function == "layer_norm_forward":
        yield "total", {"residual": None}
        yield "total", {"total": None}
    if function == "activation_backward":
        yield "dgate", {"gate": None}
    ranges = [name for name in arguments if name in memory.names]
    for one, other in itertools.permutations(ranges, 2):
        written = WRITTEN | ({"total"} if function == "layer_norm_forward" else set())
        written -= {"mean", "rstd"} if function == "layer_norm_backward" else set()
        if {one, other} & written:
            target = arguments[other]
            target = target[0] if isinstance(target, tuple) else target
            yield one, {one: (target, WIDTH) if isinstance(arguments[one], tuple) else target}


def main() -> None:
    memory = Memory()
    calls = good_calls(memory)
    try_all((name, good, [*faults(name, good, memory)]) for name, good in calls.items())


if __name__ == "__main__":
    main()
