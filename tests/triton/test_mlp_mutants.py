"""Seeded bugs of the GELU-MLP and LayerNorm kernels, each noticed by the interpreter tier."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak
MLP, NORM = ("tests/triton/test_gelu_mlp.py",), ("tests/triton/test_layer_norm.py",)
FUSED, POINTWISE = "triton_kernels/gelu_mlp_fused.py", "triton_kernels/gelu_mlp_pointwise.py"
LAYER_NORM, ACTIVATIONS = "triton_kernels/layer_norm.py", "triton_kernels/activations.py"

MUTANTS = (
    Mutant(
        "the tanh form's slope without the cubic's",
        ACTIVATIONS,
        "slope = slope * (cubic * 3.0 + 1.0) * _TANH_LINEAR",
        "slope = slope * (cubic + 1.0) * _TANH_LINEAR",
        MLP,
    ),
    Mutant(
        "minus infinity times nothing",
        ACTIVATIONS,
        "        x = tl.where(x < -_FAR, -_FAR, x)\n",
        "",
        MLP,
    ),
    Mutant(
        "the activation of what was not rounded",
        FUSED,
        "hidden = activate(pre.to(tl.float32), ACTIVATION)",
        "hidden = activate(acc + 1e-3, ACTIVATION)",
        MLP,
    ),
    Mutant(
        "the gate's gradient of the gated activation",
        FUSED,
        "tl.store(dgate_ptr + sums, tl.sum(dhidden * hidden, axis=0), mask=in_columns)",
        "tl.store(dgate_ptr + sums, tl.sum(dhidden * hidden * slope, axis=0), mask=in_columns)",
        MLP,
    ),
    Mutant(
        "a tile's start in 32 bits",
        FUSED,
        "start = tl.cast(first_row, tl.int64) * N + first_column",
        "start = first_row * N + first_column",
        MLP,
    ),
    Mutant(
        "the last channels of the sum unmasked",
        FUSED,
        "keep_a, keep_b = keep_a & in_k[None, :], keep_b & in_k[:, None]",
        "keep_a, keep_b = keep_a & in_k[None, :], keep_b",
        MLP,
    ),
    Mutant(
        "the gate missing in the pointwise slope",
        POINTWISE,
        "hidden, slope = hidden * gate, slope * gate",
        "hidden, slope = hidden * gate, slope",
        MLP,
    ),
    Mutant(
        "the bias' gradient of the last rows only",
        POINTWISE,
        "dbias += dpre",
        "dbias = dpre",
        MLP,
    ),
    Mutant(
        "statistics over all channels",
        LAYER_NORM,
        "inverse = 1.0 / tl.maximum(tl.sum(kept.to(tl.float32), axis=0), 1.0)",
        "inverse = 1.0 / C",
        NORM,
    ),
    Mutant(
        "masked channels centred as well",
        LAYER_NORM,
        "centred = tl.where(inside, s - mean[:, None], 0.0)",
        "centred = s - mean[:, None]",
        NORM,
    ),
    Mutant(
        "masked channels of dy kept",
        LAYER_NORM,
        "        if HAS_MASK:\n            dy = tl.where(inside, dy, 0.0)\n",
        "",
        NORM,
    ),
    Mutant(
        "masked channels of the parameters kept",
        LAYER_NORM,
        "return tl.where(kept, values, 0.0) if HAS_MASK else values",
        "return values",
        NORM,
    ),
    Mutant(
        "masked channels of the widest rows' weight kept",
        LAYER_NORM,
        "d = tl.where(inside, d, 0.0)",
        "d = d * 1.0",
        NORM,
    ),
    Mutant(
        "the sum's own gradient dropped",
        LAYER_NORM,
        "dx += tl.load(dtotal_at, mask=here, other=0.0).to(tl.float32)",
        "dx += 0.0",
        NORM,
    ),
    Mutant(
        "rows in 32 bits",
        LAYER_NORM,
        "block = tl.cast(tl.program_id(0), tl.int64) * STEPS + step",
        "block = tl.program_id(0) * STEPS + step",
        NORM,
    ),
    Mutant(
        "a run's rows counted by the next one, too",
        LAYER_NORM,
        "for start in tl.range(0, run, ROWS):",
        "for start in tl.range(0, run + ROWS, ROWS):",
        NORM,
    ),
    Mutant(
        "the weight forgotten backward",
        LAYER_NORM,
        "                d = dy * weight\n",
        "                d = dy\n",
        NORM,
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    made = Laboratory(tmp_path_factory.mktemp("mutants"))
    made.environment["TRITON_INTERPRET"] = "1"
    return made


@pytest.mark.parametrize("bug", MUTANTS, ids=lambda bug: bug.name)
def test_is_noticed(laboratory, bug):
    assert not laboratory.survives(bug)
