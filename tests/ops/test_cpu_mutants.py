"""Seeded bugs of the passes over rows, in C++ and in the Python around them: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant
from tinyclip import _extension

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not())),
]

TESTS = ("tests/ops/test_cpu_rows.py",)
NORM, ACTIVATION = (f"csrc/rowwise/cpu_{name}.h" for name in ("layer_norm", "activation"))
CPU, SIMD, BINDINGS = "csrc/rowwise/cpu.cpp", "csrc/simd.h", "csrc/bindings_rowwise.cpp"
PY = "tinyclip/ops/_cpu_rows.py"

MUTANTS = (
    Mutant("the mean stays rough", NORM, "mean = rough + rest", "mean = rough", TESTS),
    Mutant("eps is forgotten", NORM, " + problem.eps)", ")", TESTS),
    Mutant(
        "a masked dy counts",
        NORM,
        "g = visible<Masked>(load<V>(dy + j), channels, j)",
        "g = load<V>(dy + j)",
        TESTS,
    ),
    Mutant(
        "a masked y is not 0",
        NORM,
        "store(y + j, visible<Masked>(value, channels, j))",
        "store(y + j, value)",
        TESTS,
    ),
    Mutant("dtotal is dropped", NORM, "ds = ds + load<V>(dtotal + j)", "ds = ds", TESTS),
    Mutant("the mean of d n is dropped", NORM, " - normed(j, V{}) * splat<V>(mean_dn)", "", TESTS),
    Mutant(
        "masked channels are counted",
        CPU,
        "count = std::count(kept, kept + width, true);",
        "",
        TESTS,
    ),
    Mutant(
        "a masked weight counts", CPU, "own[j] = kept[j] ? own[j] : T(0)", "own[j] = own[j]", TESTS
    ),
    Mutant(
        "the last block's sums are lost",
        CPU,
        "b < blocks.count; ++b)\n            for",
        "b + 1 < blocks.count; ++b)\n            for",
        TESTS,
    ),
    Mutant("the second sum is the first", CPU, "(out == second ? width : 0)", "0", TESTS),
    Mutant("half of the lanes", SIMD, "sum(even[k] + odd[k])", "sum(even[k])", TESTS),
    Mutant("what is left of the lanes", SIMD, " + one[k];", ";", TESTS),
    Mutant(
        "the wrong tail",
        ACTIVATION,
        "x < zero ? tail : T(1) - tail",
        "x > zero ? tail : T(1) - tail",
        TESTS,
    ),
    Mutant(
        "a slope without its density",
        ACTIVATION,
        "mul_add(near, e * kDensity, share)",
        "share",
        TESTS,
    ),
    Mutant(
        "tanh's slope",
        ACTIVATION,
        "mul_add(square, zero + 3 * kCube,",
        "mul_add(square, zero + kCube,",
        TESTS,
    ),
    Mutant(
        "dgate of the gated",
        ACTIVATION,
        "load<V>(dgate + j) + g * value",
        "load<V>(dgate + j) + g * value * load<V>(problem.gate + j)",
        TESTS,
    ),
    Mutant(
        "infinity times 0",
        ACTIVATION,
        "return {low * share, mul_add(near * rise",
        "return {x * share, mul_add(near * rise",
        TESTS,
    ),
    Mutant(
        "rows lie side by side",
        BINDINGS,
        "reinterpret_cast<const T*>(address), stride}",
        "reinterpret_cast<const T*>(address), width}",
        TESTS,
    ),
    Mutant(
        "backward forgets the gate",
        PY,
        "pre.data_ptr(), _address(factor))",
        "pre.data_ptr(), None)",
        TESTS,
    ),
    Mutant(
        "fake tensors have no address",
        "tinyclip/ops/_contracts.py",
        "return not plain or",
        "return",
        TESTS,
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    laboratory = Laboratory(tmp_path_factory.mktemp("mutants"))
    assert laboratory.passes(*TESTS)
    return laboratory


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_noticed(laboratory, mutant):
    assert not laboratory.survives(mutant)
