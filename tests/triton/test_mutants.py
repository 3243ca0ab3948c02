"""Seeded bugs of the attention kernels, each noticed by the interpreter tier."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak
TESTS = ("tests/triton/test_attention.py",)
FORWARD, BACKWARD = "triton_kernels/attention_fwd.py", "triton_kernels/attention_bwd.py"


def mutant(name, file, old, new):
    return Mutant(name, file, old, new, TESTS)


MUTANTS = (
    mutant(
        "mask dropped in forward",
        FORWARD,
        's = tl.where(keep[None, :], s, float("-inf"))',
        "s = s",
    ),
    mutant(
        "causal off by one in forward",
        FORWARD,
        "s = tl.where(offs_m[:, None] >= offs_n[None, :], s",
        "s = tl.where(offs_m[:, None] > offs_n[None, :], s",
    ),
    mutant(
        "causal ignored in backward",
        BACKWARD,
        "seen = keep[None, :] & (offs_m[:, None] >= offs_n[None, :]) if CAUSAL else keep[None, :]",
        "seen = keep[None, :]",
    ),
    mutant(
        "scale in the wrong units",
        FORWARD,
        "max(abs(float(scale)) * LOG2E, 1e-30)",
        "max(abs(float(scale)), 1e-30)",
    ),
    mutant("sign of the scale dropped", FORWARD, "return -s if NEGATE else s", "return s"),
    mutant("strides of rows and heads swapped", FORWARD, 'zip("blh"', 'zip("bhl"'),
    mutant("stride of the mask swapped", FORWARD, '"stride_mb": strides[0]', '"stride_mb": 0'),
    mutant(
        "tail of keys off by one in forward",
        FORWARD,
        "tail = Lk // BLOCK_N * BLOCK_N",
        "tail = Lk // BLOCK_N * BLOCK_N + 1",
    ),
    mutant("accumulator not rescaled", FORWARD, "acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    mutant(
        "a query that sees no key",
        FORWARD,
        'm_safe = tl.where(m_new == float("-inf"), 0.0, m_new)',
        "m_safe = m_new",
    ),
    mutant(
        "last tile of keys left out under causal",
        FORWARD,
        "tiles = tl.minimum(tiles, tl.cdiv(start_m + BLOCK_M, BLOCK_N))",
        "tiles = tl.minimum(tiles, tl.cdiv(start_m + 1, BLOCK_N))",
    ),
    mutant(
        "delta dropped",
        BACKWARD,
        "ds = p * (dp * gate - delta[:, None])",
        "ds = p * (dp * gate)",
    ),
    mutant(
        "scale missing in dK",
        BACKWARD,
        "_masked_rows(dk * scale, keep, HAS_MASK)\n        store_rows(dk_base, start_n",
        "_masked_rows(dk, keep, HAS_MASK)\n        store_rows(dk_base, start_n",
    ),
    mutant(
        "gate missing in dV",
        BACKWARD,
        "_masked_rows(dv * gate, keep, HAS_MASK)\n        store_rows(dv_base, start_n",
        "_masked_rows(dv, keep, HAS_MASK)\n        store_rows(dv_base, start_n",
    ),
    mutant(
        "gate's gradient of the last tile only",
        BACKWARD,
        "row_sum += tl.sum(p * dp, axis=1)",
        "row_sum = tl.sum(p * dp, axis=1)",
    ),
    mutant(
        "first tile of queries skipped under causal",
        BACKWARD,
        "first = start_n // BLOCK_M if CAUSAL else 0",
        "first = start_n // BLOCK_M + 1 if CAUSAL else 0",
    ),
    mutant(
        "NaN of a query that sees no key",
        BACKWARD,
        "q = load_rows(q_base, start_m, stride_q, real",
        "q = load_rows(q_base, start_m, stride_q, in_rows",
    ),
    mutant(
        "overflow in the gradient of a query that sees no key",
        BACKWARD,
        "do = load_rows(do_base, start_m, stride_do, real",
        "do = load_rows(do_base, start_m, stride_do, in_rows",
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
