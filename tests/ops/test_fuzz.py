"""`torch` against the fp64 oracle: 600 problems an op under the tolerance rule."""

from collections import Counter
from functools import partial

import pytest
import torch

from tests.support import attention, contrastive, gelu_mlp, layer_norm
from tests.support.draw import LAYOUTS, REGIMES
from tests.support.rule import Tally, assert_rule, ratios

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_rule_knows_where_a_dtype_ends(dtype):
    """Beyond it the infinity of that sign is exact, and no reason to tolerate more elsewhere."""
    largest, inf = torch.finfo(dtype).max, float("inf")
    truth = {"out": torch.tensor([1.0, 4.0 * largest, -4.0 * largest], dtype=torch.float64)}
    cond = {"out": truth["out"].abs()}

    def ratio(*values):
        return ratios({"out": torch.tensor(values, dtype=dtype)}, truth, [], cond)["out"]

    assert ratio(1.0, inf, -inf) == 0
    assert ratio(1.01, inf, -inf) > 1
    for wrong in ((1.0, -inf, -inf), (1.0, float("nan"), -inf), (inf, inf, -inf), (1.0, inf, 0.0)):
        assert ratio(*wrong) > 1, wrong


@pytest.mark.parametrize("activation", gelu_mlp.ACTIVATIONS)
def test_torch_brings_an_fp16_gradient_back_into_range(activation):
    problem = gelu_mlp.beyond_fp16(activation)
    assert_rule(problem.judge("torch"), problem.label)
