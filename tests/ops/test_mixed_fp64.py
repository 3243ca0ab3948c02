"""One fp64 tensor beside fp32 or 16 bit: `cuda` and `triton` refuse it, the others are right.

The device is simulated: the specs say CUDA, capability 9.0, and the tensors are on the CPU. So a
kernel that was chosen could not run; none may be.
"""

from importlib import import_module
from typing import Any

import pytest
import torch

import tinyclip
from tests.support.malformed import VALID
from tinyclip import ops
from tinyclip.ops import _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Arguments that may be fp64 beside others; q, k and v have one dtype, and x leads.
WIDENED = {
    "attention": ("head_gate",),
    "attention_qkv": ("head_gate",),
    "gelu_mlp": ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "hidden_gate"),
    "layer_norm": ("x", "weight", "bias", "residual"),
    "contrastive_loss": ("image", "text", "logit_scale", "teacher.0", "teacher.1", "teacher.2"),
    "contrastive_stats": ("a", "b", "scale", "teacher.0", "teacher.1", "teacher.2"),
    "contrastive_grads": (
        *("a", "b", "scale", "teacher.0", "teacher.1", "teacher.2"),
        *("row_weight", "col_weight"),
    ),
}
SCALES = ("scale", "logit_scale", "teacher.2")
ENGINES = {op: ("cuda", "triton") if op.startswith("contrastive") else ("triton",) for op in VALID}
CALLS = [
    pytest.param(backend, op, name, dtype, id=f"{backend}-{op}-{name}-{str(dtype)[6:]}")
    for op, names in WIDENED.items()
    for backend in ENGINES[op]
    for name in names
    for dtype in DTYPES
]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    for name in ("attention", "gelu_mlp", "layer_norm", "contrastive"):
        module = import_module(f"tinyclip.ops.{name}")
        make_spec = module.make_spec

        def made(*args, make_spec=make_spec, **kwargs):
            return make_spec(*args, **kwargs)._replace(device="cuda", capability=(9, 0))

        monkeypatch.setattr(module, "make_spec", made)
    monkeypatch.setattr(module, "_cuda_missing", lambda: None)  # the last: contrastive
    monkeypatch.setattr(_triton, "_INSTALLED", True)
    monkeypatch.setattr(_triton, "_INTERPRETED", False)


def call(op: str, dtype: torch.dtype, widened: str | None = None) -> dict[str, Any]:
    """The valid call with its tensors in `dtype`, scales and statistics in fp32, one in fp64."""

    def cast(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(cast(f"{name}.{i}", x) for i, x in enumerate(value)))
        if name in SCALES:
            value = torch.as_tensor(value, dtype=torch.float32)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value if name.startswith("stats") else value.to(dtype)
        return value.double() if name == widened else value

    keywords = {name: cast(name, value) for name, value in VALID[op].items()}
    if widened in ("a", "b") and "stats" in keywords:  # what contrastive_stats gives for these
        keywords["stats"] = ops.Stats(*(x.double() for x in keywords["stats"]))
    return keywords


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_there_are_many():
    assert len(CALLS) >= 40
    assert set(VALID) == set(WIDENED)


@pytest.mark.parametrize(("backend", "op", "name", "dtype"), CALLS)
def test_it_is_refused(backend, op, name, dtype):
    keywords = call(op, dtype, name)
    with (
        tinyclip.backend(backend),
        pytest.raises(tinyclip.BackendUnavailable, match=rf"^{op}: backend '{backend}'.*fp64"),
    ):
        getattr(ops, op)(**keywords)
    told = tinyclip.explain(op, **keywords)
    assert told.backend in ("torch", "cpu")
    states = {row[0]: row[1] for row in told.rows}
    assert {states[engine] for engine in ENGINES[op]} == {"cannot"}


@pytest.mark.parametrize("op", VALID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_it_they_serve(op, dtype):
    for backend in ENGINES[op]:
        with tinyclip.backend(backend):
            assert tinyclip.explain(op, **call(op, dtype)).backend == backend
    assert tinyclip.explain(op, **call(op, dtype)).backend == ENGINES[op][0]


@pytest.mark.parametrize("op", VALID)
def test_a_teacher_that_is_not_read_does_not_count(op):
    for name in WIDENED[op]:
        if name.startswith("teacher") and op != "contrastive_stats":
            keywords = {**call(op, torch.bfloat16, name), "alpha": 0.0}
            assert tinyclip.explain(op, **keywords).backend == "cuda"


# Where the op promises fp64 results; elsewhere the fp64 tensor is cast to what is beside it.
PROMISED = ("image", "text", "a", "b", "x", "residual")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in WIDENED for name in WIDENED[op]])
def test_auto_is_right(op, name):
    """What serves instead agrees with fp64, and in fp64 where the op promises that."""
    found = as_tuple(getattr(ops, op)(**call(op, torch.float32, name)))
    exact = call(op, torch.float64)
    if "stats" in exact:
        exact["stats"] = ops.Stats(*(x.double() for x in exact["stats"]))
    with tinyclip.backend("reference"):
        expected = as_tuple(getattr(ops, op)(**exact))
    if op != "contrastive_grads":  # whose results have the dtypes of a, b and scale
        assert found[0].dtype == (torch.float64 if name in PROMISED else torch.float32)
    for x, y in zip(found, expected, strict=True):
        precise = x.dtype == torch.float64 and name in PROMISED
        tolerance = 1e-12 if precise else 1e-5
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance)
