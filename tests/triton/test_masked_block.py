"""The transformer block in TinyCLIP's mask phase on the Triton kernels."""

import pytest
import torch

from tests.support import masked_block
from tinyclip.triton_kernels.gelu_mlp import IMPLEMENTATIONS, only

pytestmark = pytest.mark.usefixtures("poisoned", "interpreter")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_block(implementation, causal):
    with only(implementation):
        masked_block.check("triton", "quick_gelu", causal, torch.float32, 1e-5)
