"""Seeded bugs of the CUDA engine that the host's tests notice, with no GPU."""

import pytest

from tests.support.mutants import Laboratory, Mutant
from tinyclip import _extension

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not())),
]

KERNELS = ("tests/contrastive/test_cuda.py", "-k", "host and words0")
PANELS = ("tests/contrastive/test_panels.py",)
LAYOUT, TILE = "csrc/contrastive/cuda_layout.h", "csrc/contrastive/cuda_tile.h"
PRODUCTS, MERGE = "csrc/contrastive/cuda_products.h", "csrc/contrastive/cuda_merge.h"
ELEMENTS, WALK = "csrc/contrastive/cuda_elements.h", "tinyclip/ops/_panels.py"
UNIT = "tinyclip/ops/_ds_unit.py"

MUTANTS = (
    Mutant("no swizzle", LAYOUT, "((chunk ^ (row & 7)) << 4)", "(chunk << 4)", KERNELS),
    Mutant(
        "rows of a warp", LAYOUT, "half * 8 + thread % 32 / 4", "half * 8 + thread % 8", KERNELS
    ),
    Mutant(
        "32-bit rows",
        TILE,
        "(first + row) * from.stride",
        "int((first + row) * from.stride)",
        KERNELS,
    ),
    Mutant(
        "a stage too early", TILE, "ask(step + kStages - 1);", "ask(step + kStages - 2);", KERNELS
    ),
    Mutant("a stage too late", TILE, "ask(step + kStages - 1);", "ask(step + kStages);", KERNELS),
    Mutant(
        "no barrier before the epilogue",
        TILE,
        "Machine::sync();  // nobody reads",
        "// nobody",
        KERNELS,
    ),
    Mutant("nothing is published to wgmma", TILE, "Machine::publish();", "", KERNELS),
    Mutant(
        "the teacher begins at the student's end", TILE, "its ? step - own : step", "step", KERNELS
    ),
    Mutant(
        "the other half of a step for wgmma",
        PRODUCTS,
        "descriptor(b + k * 32)",
        "descriptor(b)",
        KERNELS,
    ),
    Mutant("no diagonal", TILE, "r + panel.diagonal == c)", "r == c)", KERNELS),
    Mutant(
        "padding counts",
        TILE,
        "real ? Machine::times(scale, s[i][j][e]) : Lowest<float>::value",
        "Machine::times(scale, s[i][j][e])",
        KERNELS,
    ),
    Mutant(
        "padding pulls",
        TILE,
        ">= panel.width) ds[e] = 0;",
        ">= panel.width) ds[e] = ds[e];",
        KERNELS,
    ),
    Mutant(
        "a warp's sum is lost",
        TILE,
        "for (int g = 1; g < Groups; ++g) sum +=",
        "for (int g = 2; g < Groups; ++g) sum +=",
        KERNELS,
    ),
    Mutant("panels before are forgotten", MERGE, "if (!args.first) {", "if (false) {", KERNELS),
    Mutant(
        "one product of three", ELEMENTS, "Machine::mma_tf32(sums, small_a, large_b);", "", KERNELS
    ),
    Mutant(
        "the diagonal of the panel above",
        WALK,
        "self.offset + top - left",
        "self.offset - left",
        PANELS,
    ),
    Mutant("gradients of the last panel", WALK, "first=i.start == 0", "first=True", PANELS),
    Mutant("units are forgotten", WALK, "factor = scale * unit", "factor = scale", PANELS),
    Mutant("dS past the end of fp16", UNIT, "unit * 2.0**-13", "unit * 2.0**-17", PANELS),
    Mutant("weights are not in units", WALK, "(weight / unit)", "weight", PANELS),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    built = Laboratory(tmp_path_factory.mktemp("mutants"))
    for tests in (KERNELS, PANELS):
        assert built.passes(*tests), f"{tests} fail without any mutant"
    return built


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_noticed(laboratory, mutant):
    assert not laboratory.survives(mutant), f"no test noticed: {mutant.name}"
