"""The transformer block in TinyCLIP's mask phase, without a GPU: values, pruning, no host syncs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tinyclip
from bench.peers.layer_norm import tinyclip_masked
from tests.support import masked_block


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_masked_block(backend, kind, causal):
    masked_block.check(backend, kind, causal, torch.float64, 1e-12)


def test_a_sync_is_seen():
    """The guard itself: each way to wait for the device raises, TinyCLIP's norm among them."""
    x, mask = torch.randn(3, 8), torch.rand(8) > 0.3
    t = {"x": x, "channel_mask": mask, "weight": torch.randn(8), "bias": torch.randn(8)}
    ways = (
        lambda: x.sum().item(),
        lambda: float(x[0, 0]),
        lambda: bool(mask.any()),
        lambda: torch.where(mask),
        lambda: mask.nonzero(),
        lambda: x[:, mask],
        lambda: x.masked_select(mask),
        lambda: torch.equal(x, x),
        lambda: tinyclip_masked(t, {}),
    )
    for way in ways:
        way()
        with masked_block.NoSync(), pytest.raises(AssertionError, match="waits for the device"):
            way()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_size_depends_on_a_value(backend):
    """Fake tensors have no values: a block that asked for one would raise."""
    with FakeTensorMode(), tinyclip.backend(backend):
        module, masks = (
            masked_block.block(),
            {
                "head_gate": torch.empty(masked_block.H, requires_grad=True),
                "hidden_gate": torch.empty(masked_block.HIDDEN, requires_grad=True),
                "channel_gate": torch.empty(masked_block.C, requires_grad=True),
            },
        )
        y = module(torch.empty(2, 9, masked_block.C, dtype=torch.float64), **masks)
        y.sum().backward()
    assert all(gate.grad.shape == gate.shape for gate in masks.values())
