"""The C++ engine against the fp64 oracle, under the tolerance rule.

Whole losses and blocks with offsets and weights, sizes 1 to 700, widths 1 to 600, four dtypes,
eight regimes, with tiles from tiny to the default, with and without keeping dS from forward.
"""

import random

import pytest
import torch

from tests.support import contrastive, contrastive_block
from tests.support.rule import Tally, assert_rule
from tinyclip import _extension
from tinyclip.ops import _contrastive, _cpu

pytestmark = [
    pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not())),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TILES = ((512, 1 << 21), (64, 1 << 14), (100, 1 << 16), (7, 1 << 9), (1, 1))
QUICK, FULL = 240, 2400


@pytest.fixture
def plan(monkeypatch):
    """How the engine walks: rows of a tile, its bytes, and whether a small problem keeps dS."""

    def set_plan(seed: int) -> str:
        choices = random.Random(seed)
        rows, size = choices.choice(TILES)
        keep = choices.random() < 0.5
        monkeypatch.setattr(_cpu, "_TILE_ROWS", rows)
        monkeypatch.setattr(_cpu, "_TILE_BYTES", size)
        monkeypatch.setitem(_contrastive._KEPT_LOGITS, "cpu", 1 << 19 if keep else 0)
        return f"tiles {rows} rows, {size} bytes, {'kept' if keep else 'two passes'}"

    return set_plan


def problem_of(seed: int):
    """Every other problem is a block."""
    if seed % 2:
        sizes = contrastive_block.SIZES[:-4] if seed % 16 > 1 else contrastive_block.SIZES
        return contrastive_block.make(seed, sizes=sizes)
    rows = range(1, 701) if seed % 16 == 0 else range(1, 140)
    widths = range(1, 601) if seed % 16 == 0 else range(1, 140)
    return contrastive.make(seed, rows=rows, widths=widths, dtypes=DTYPES)


def judge(seeds, plan) -> Tally:
    tally = Tally()
    for seed in seeds:
        walk, problem = plan(seed), problem_of(seed)
        if "1 rows" in walk and "M" in problem.label and problem.tensors.get("image") is not None:
            # One logit a tile: no more than a few thousand of them.
            problem = contrastive.make(seed, rows=range(1, 20), dtypes=DTYPES)
        tally.add(f"{problem.label} ({walk})", problem.judge("cpu"))
    return tally


def test_the_engine_obeys_the_rule(plan):
    tally = judge(range(QUICK), plan)
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


@pytest.mark.soak
@pytest.mark.parametrize("part", range(8))
def test_the_engine_obeys_the_rule_on_many(plan, part):
    tally = judge(range(QUICK + part, QUICK + FULL, 8), plan)
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same_bits(isa, monkeypatch):
    """The lanes are as many and no product is fused, whatever the width of a register."""
    if isa not in _extension.load().isas():
        pytest.skip(f"this processor has no {isa}")
    for seed in range(24):
        problem = problem_of(seed)
        found = {}
        for choice in (isa, "best"):
            monkeypatch.setattr(_cpu, "ISA", choice)
            found[choice] = problem.ours("cpu")
        for name, tensor in found["best"].items():
            assert torch.equal(tensor, found[isa][name]), (problem.label, name)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_number_of_threads_computes_the_same_bits(threads):
    """A block's sums are its own, and blocks are merged in their order."""
    image, text = torch.randn(2, 700, 48)
    usual = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            stats = _extension.load()
            cosines = (image @ text.T) if not results else results[0][-1]
            results.append((*_both_passes(stats, cosines.clone(), count), cosines))
    finally:
        torch.set_num_threads(usual)
    for one, other in zip(*(result[:-1] for result in results), strict=True):
        assert torch.equal(one, other)


def _both_passes(extension, cosines, threads):
    """Statistics, dS and dscale of a tile that is given, so that no GEMM can differ."""
    m, n = cosines.shape
    rows, cols, positive = torch.zeros(5, m), torch.zeros(5, n), torch.zeros(m)
    size = extension.contrastive_workspace("float32", m, n)
    workspace = torch.empty(size, dtype=torch.uint8)
    problem = ("float32", (m, n, 0), (0, 0, m, n), (cosines.data_ptr(), n), 3.0, None)
    machine = ((workspace.data_ptr(), size), threads)
    kept = (rows.data_ptr(), cols.data_ptr())
    extension.contrastive_stats(*problem, *kept, positive.data_ptr(), *machine)
    weight, dscale = torch.full((1,), 1 / m), torch.zeros(1, dtype=torch.float64)
    weights = ((weight.data_ptr(), 0), (weight.data_ptr(), 0))
    extension.contrastive_grads(*problem, 0.0, *kept, *weights, dscale.data_ptr(), *machine)
    return rows, cols, positive, cosines, dscale


@pytest.mark.parametrize("missing", [1e-1, 1e-3, 1e-6])
def test_a_sure_model_keeps_its_gradient(missing):
    problem = contrastive.make(
        4, regimes=["confident"], rows=[257], widths=[64], dtypes=[DTYPES[0]]
    )
    image = problem.tensors["image"]
    problem.tensors["text"] = torch.nn.functional.normalize(image + missing * 0.1, dim=1)
    assert_rule(problem.judge("cpu"), f"{missing}")
