"""What `make gpu` compiles, counted without a GPU: a kernel costs its ten minutes a second or so.

Launches are caught before they happen; what they would be specialised on (Triton's rules: the
constants, the types, whether a pointer or a number is a multiple of 16, or a number 1) is counted.
"""

import re
from collections import Counter
from importlib import import_module

import pytest
import torch

from bench.gpu import sanitized
from tests.gpu.problems import (
    ALPHAS,
    BATCHES,
    DTYPES,
    EMBEDDINGS,
    IMPLEMENTED,
    LENGTHS,
    NORM_WIDTHS,
    ROWS,
    SHAPES,
    WIDTHS,
    problems,
    served_by,
)
from tests.support.attention import DIMS
from tests.support.draw import LAYOUTS, REGIMES
from tinyclip.ops._dispatch import Cannot
from tinyclip.ops.gelu_mlp import ACTIVATIONS

launch = pytest.importorskip("tinyclip.triton_kernels.launch")


def specialised(call) -> tuple:
    """What Triton compiles one kernel for, and not another."""
    key = [call.kernel.fn.__name__, tuple(sorted(call.options.items()))]
    for parameter in call.kernel.params:
        value = call.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            value = ("pointer", value.dtype, value.data_ptr() % 16 == 0)
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1):
            value = ("constant", value)
        elif isinstance(value, int):
            value = ("int", -(2**31) <= value < 2**31, value % 16 == 0)
        else:
            value = ("float",)
        key.append(value)
    return tuple(key)


@pytest.fixture
def compiled(monkeypatch):
    """The specialisations that were launched, on tensors of a CPU that Triton is said to serve."""
    found = set()
    monkeypatch.setattr(launch.Launch, "run", lambda call, on: found.add(specialised(call)))

    def why_not(spec):
        return Cannot("no fp64 kernels") if spec.dtype == torch.float64 else None

    for op in ("attention", "gelu_mlp", "layer_norm", "contrastive"):
        monkeypatch.setattr(import_module(f"tinyclip.ops.{op}"), "triton_why_not", why_not)
    return found


# Two launches a shape, with a sign of the scale that differs by the regime, and each merge.
MOST = 100
OURS = [pair for pair in IMPLEMENTED if pair[1] not in ("torch", "cuda")]


@pytest.mark.parametrize(("op", "implementation"), OURS)
def test_the_rule_compiles_few_kernels(op, implementation, compiled):
    for dtype in DTYPES:
        # `large` alone draws a scale differently; what else a regime changes are values
        for problem in problems(op, dtype, implementation, "cpu", regimes=("normal", "large")):
            with served_by(implementation) as backend:
                problem.ours(backend)
    print(f"{op} {implementation}: {len(compiled)} kernels")
    assert SHAPES * len(DTYPES) < len(compiled) <= MOST


# The sizes that a label names, and the values that each has to take.
LISTED = {
    "attention": {"Lq": LENGTHS, "Lk": LENGTHS, "D": DIMS},
    "attention_qkv": {"Lq": LENGTHS, "D": DIMS},
    "gelu_mlp": {"C": WIDTHS, "F": WIDTHS, "O": WIDTHS},
    "layer_norm": {"C": NORM_WIDTHS},
    "contrastive_loss": {"M": BATCHES, "D": EMBEDDINGS, "Dt": EMBEDDINGS},
    "contrastive_passes": {"D": EMBEDDINGS, "Dt": EMBEDDINGS},
}


@pytest.mark.parametrize("op", LISTED)
def test_every_listed_value_is_drawn(op):
    drawn = [
        p for dtype in DTYPES for p in problems(op, dtype, "triton", "cpu", regimes=("normal",))
    ]
    assert len(drawn) * len(REGIMES) >= 300
    text = "\n".join(problem.label for problem in drawn)
    for name, values in LISTED[op].items():
        found = {int(value) for value in re.findall(rf"\b{name}(\d+)", text)}
        assert found == set(values), (name, set(values) - found)
    assert set(LAYOUTS) <= set(text.split())
    if op.startswith("contrastive"):
        assert {p.options["alpha"] for p in drawn} == set(ALPHAS)
        return
    if op == "gelu_mlp":
        assert set(ACTIVATIONS) <= set(text.split())
    if op in ("gelu_mlp", "layer_norm"):
        assert {p.tensors["x"].shape[-2] for p in drawn} == set(ROWS)
    if op.startswith("attention"):
        assert {p.options["causal"] for p in drawn} == {True, False}
    # each tensor that may be left out is, and is not; and is frozen, and is not
    for name in drawn[0].tensors:
        there = {p.tensors[name] is not None for p in drawn}
        always = name in ("q", "k", "v", "qkv", "x", "fc1_weight", "fc2_weight")
        assert there == ({True} if always else {True, False}), name
        assert {name in p.frozen for p in drawn} == {True, False}, name


def test_the_checkers_watch_about_forty_kernels(compiled, monkeypatch):
    for name in ("randn", "rand"):
        draw = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, device, draw=draw, **k: draw(*shape, **k))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launches = [n for name in sanitized.FAMILIES for n in sanitized.family(name)]
    kernels = Counter(key[0] for key in compiled)
    print(f"{sum(launches)} launches, {dict(kernels)}")
    assert len(kernels) == 11, "every kernel that we have"
    assert len(compiled) <= 46
