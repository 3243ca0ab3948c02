"""One problem a kernel family and dtype before anything else: does it run, and is it right?"""

import pytest
import torch

import tinyclip
from tests.gpu.problems import DTYPES, IMPLEMENTED, problems, served_by
from tests.support.rule import assert_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
FAMILIES = [family for family in IMPLEMENTED if family[1] != "torch"]


@pytest.mark.parametrize(("op", "backend"), FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_runs_and_is_right(op, backend, dtype):
    (problem,) = problems(op, dtype, backend, shapes=1, regimes=("normal",))
    with served_by(backend) as name:
        assert_rule(problem.judge(name), problem.label)


@pytest.mark.parametrize("name", ["attention", "attention_qkv", "gelu_mlp", "layer_norm"])
def test_auto_is_triton(name):
    assert tinyclip.explain(name).backend == "triton"


@pytest.mark.parametrize("name", ["contrastive_loss", "contrastive_stats", "contrastive_grads"])
def test_auto_serves_the_loss_where_it_was_measured(name):
    """`cuda` where the extension has code for this device, else `triton`; elsewhere PyTorch's."""
    told = tinyclip.explain(name)
    states = {row[0]: row[1] for row in told.rows}
    if torch.cuda.get_device_capability()[0] == 9:
        assert told.backend == ("triton" if states["cuda"] == "cannot" else "cuda")
    else:
        assert told.backend == "torch"
        assert states["triton"] == "slower"


@pytest.mark.parametrize("family", ["attention", "mlp_and_norm", "triton", "cuda"])
def test_the_checkers_problems(family):
    """What compute-sanitizer watches later, without it: here its kernels are compiled."""
    from bench.gpu import sanitized

    launches = sum(sanitized.family(family))
    if launches == 0 and family == "cuda":
        pytest.skip("the extension has no CUDA code here")
    torch.cuda.synchronize()
    assert launches >= 6
