"""The tolerance rule on the device: every op and implementation, 104 problems a dtype."""

import pytest
import torch

import tinyclip
from tests.gpu.problems import DTYPES, IMPLEMENTED, problems, served_by
from tests.support.rule import Tally, assert_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
engines = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.mark.parametrize(("op", "backend"), IMPLEMENTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rule(op, backend, dtype):
    tally = Tally()
    with served_by(backend) as name:
        for problem in problems(op, dtype, backend):
            tally.add(problem.label, problem.judge(name))
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


@engines
@pytest.mark.parametrize("missing", [1e-1, 1e-3, 1e-6])
def test_a_sure_model_keeps_its_gradient(backend, missing):
    """1 - p of the positives is what the gradient is made of, down to where fp32 has no more."""
    from tests.support import contrastive

    problem = contrastive.make(
        4, device="cuda", regimes=["confident"], rows=[150], widths=[64], dtypes=DTYPES[2:]
    )
    image = problem.tensors["image"]
    problem.tensors["text"] = torch.nn.functional.normalize(image + missing * 0.1, dim=1)
    assert_rule(problem.judge(backend), f"{missing}")


@engines
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pair_has_nothing_to_learn(backend, dtype):
    """A softmax over one logit is 1: the loss and every gradient are 0, to the bit."""
    image, text = (
        torch.nn.functional.normalize(torch.randn(1, 512, device="cuda"), dim=1).to(dtype)
        for _ in range(2)
    )
    scale = torch.tensor(100.0, device="cuda")
    leaves = [x.requires_grad_() for x in (image, text, scale)]
    with tinyclip.backend(backend):
        value = tinyclip.ops.contrastive_loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
    assert value.item() == 0
    assert not any(gradient.any() for gradient in gradients)
