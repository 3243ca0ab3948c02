"""`torch` against the fp64 oracle: 600 problems an op under the tolerance rule."""

from collections import Counter
from functools import partial

import pytest

from tests.support import attention, contrastive, gelu_mlp, layer_norm
from tests.support.draw import LAYOUTS, REGIMES
from tests.support.rule import Tally, ratios

pytestmark = pytest.mark.usefixtures("poisoned")

MAKERS = {
    "attention": attention.make,
    "attention_qkv": partial(attention.make, packed=True),
    "gelu_mlp": gelu_mlp.make,
    "layer_norm": layer_norm.make,
    "contrastive_loss": contrastive.make,
}
PROBLEMS = 600


@pytest.mark.parametrize("op", MAKERS)
def test_torch_obeys_the_rule(op):
    tally = Tally()
    for seed in range(PROBLEMS):
        problem = MAKERS[op](seed)
        tally.add(problem.label, problem.judge("torch"))
    tally.verdict()


@pytest.mark.parametrize("op", MAKERS)
def test_the_draw_covers_what_it_lists(op):
    words = Counter(word for seed in range(PROBLEMS) for word in MAKERS[op](seed).label.split())
    assert min(words[regime] for regime in REGIMES) >= PROBLEMS / 20, words
    assert min(words[layout] for layout in LAYOUTS) >= PROBLEMS / 20, words


@pytest.mark.parametrize("op", MAKERS)
def test_the_rule_sees_an_error_of_one_percent(op):
    """A rule that accepts anything proves nothing: each wrong result must be refused."""
    problem = MAKERS[op](3, regimes=["normal"], layouts=["contiguous"], upstream=["contiguous"])
    tensors, douts = problem.doubled()
    peers = [problem.ours("reference"), problem._run(problem.fused, problem.tensors, problem.douts)]
    ours, truth = problem.ours("torch"), problem.truth()
    conds = problem.cond(problem, tensors, douts)
    conds = {name: conds[name] for name in ours}
    assert max(ratios(ours, truth, peers, conds, problem.roundings).values()) <= 1
    for name in ours:
        if truth[name].norm() == 0:
            continue
        wrong = {**ours, name: ours[name] * 1.05}
        assert ratios(wrong, truth, peers, conds, problem.roundings)[name] > 1, name
