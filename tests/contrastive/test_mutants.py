"""Twenty seeded bugs of the contrastive engine and of the Python around it: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant
from tinyclip import _extension

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not())),
]

ENGINE = ("tests/contrastive/test_engine.py",)
FUZZ = ("tests/contrastive/test_fuzz.py", "-k", "rule")
RANKS = ("tests/contrastive/test_ranks.py", "-k", "one_process and 3")
EPILOGUE, ROWS, CPU = (
    f"csrc/contrastive/{name}" for name in ("epilogue.h", "cpu_rows.h", "cpu.cpp")
)
PROBLEM = "csrc/contrastive/problem.h"
TARGET, SIMD, CHECK = (f"csrc/{name}.h" for name in ("target", "simd", "check"))
PY = "tinyclip/ops/"

MUTANTS = (
    Mutant(
        "u keeps its old centre", EPILOGUE, "(into.u + into.l_t * (into.m - m))", "(into.u)", ENGINE
    ),
    Mutant("l is not rescaled", EPILOGUE, "exp(into.m - m) * into.l +", "into.l +", ENGINE),
    Mutant("no logits have a maximum of 0", EPILOGUE, "value = -1.7e38f", "value = 0.0f", ENGINE),
    Mutant(
        "P instead of P - 1",
        EPILOGUE,
        "(expm1(s - pull.m) + (1 - l))",
        "(expm1(s - pull.m) + 1)",
        FUZZ,
    ),
    Mutant(
        "the teacher pushes",
        EPILOGUE,
        "? student - pull.per_exp_t * exp(",
        "? student + pull.per_exp_t * exp(",
        FUZZ,
    ),
    Mutant("hard counts whole", EPILOGUE, "value = (1 - alpha) * (log_l", "value = (log_l", FUZZ),
    Mutant(
        "a tile's rows forget the last", ROWS, "tile.column == 0 ? nothing", "true ? nothing", FUZZ
    ),
    Mutant(
        "a tile's first block is lost", ROWS, "for (Index b = first; b", "for (Index b = 1; b", FUZZ
    ),
    Mutant("alpha is forgotten", ROWS, "alpha * (weight / stat.l_t)", "(weight / stat.l_t)", FUZZ),
    Mutant(
        "a positive in another's column",
        ROWS,
        "side(problem.columns, tile.column + positive)",
        "side(problem.columns, positive)",
        FUZZ,
    ),
    Mutant(
        "the last lane's positive", ROWS, "positive < j + kWidth", "positive < j + kWidth - 1", FUZZ
    ),
    Mutant(
        "the offset is forgotten",
        PROBLEM,
        "return offset + row + i - column;",
        "return row + i - column;",
        FUZZ,
    ),
    Mutant(
        "32-bit rows",
        TARGET,
        "data + row * stride + column",
        "data + static_cast<int>(row * stride) + column",
        ENGINE,
    ),
    Mutant("a coarse exponential", SIMD, "5.0000001201e-1f", "4.9990001201e-1f", ENGINE),
    Mutant("dscale of the last block", CPU, "*dscale += partial[b]", "*dscale = partial[b]", FUZZ),
    Mutant(
        "ranges may overlap",
        CHECK,
        "end <= other.begin || other.end <= address",
        "true",
        ("tests/contrastive/test_malformed.py",),
    ),
    Mutant(
        "gradients of the last tile", PY + "_cpu.py", "beta=0.0 if first else 1.0", "beta=0.0", FUZZ
    ),
    Mutant(
        "no upstream gradient", PY + "_contrastive.py", "ds * (dloss * scale)", "ds * scale", FUZZ
    ),
    Mutant("1/W", PY + "_ranks.py", "0.5 * len(ctx.counts) / ctx.total", "0.5 / ctx.total", RANKS),
    Mutant(
        "sums of other maxima",
        PY + "_ranks.py",
        "sums[0] = torch.exp(cols[0] - m[0]) * cols[1]",
        "sums[0] = cols[1]",
        RANKS,
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    built = Laboratory(tmp_path_factory.mktemp("mutants"))
    for tests in sorted({mutant.tests for mutant in MUTANTS}):
        assert built.passes(*tests), f"{tests} fail without any mutant"
    return built


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_noticed(laboratory, mutant):
    assert not laboratory.survives(mutant), f"no test noticed: {mutant.name}"
