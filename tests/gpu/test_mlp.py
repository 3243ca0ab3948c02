"""The GELU-MLP and LayerNorm kernels on the device: bf16, fp16 and fp32, both implementations."""

import pytest
import torch

import tinyclip
from tests.gpu.calls import mlp_leaves
from tests.gpu.problems import served_by
from tests.support import gelu_mlp, masked_block
from tests.support.rule import assert_rule
from tinyclip import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
IMPLEMENTATIONS = ("fused", "pointwise")


def _only(implementation):
    from tinyclip.triton_kernels.gelu_mlp import only

    return only(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gelu_mlp_repeats_bitwise_under_load(implementation, dtype):
    """200 reruns with a second stream busy, every gradient included."""
    inputs = mlp_leaves(1000, 256, 1024, dtype)
    gate = torch.randn(1024, device="cuda", requires_grad=True)
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run():
        with tinyclip.backend("triton"), _only(implementation):
            y = ops.gelu_mlp(*inputs, hidden_gate=gate)
        return [y.detach(), *torch.autograd.grad(y.float().sum(), [*inputs, gate])]

    first = run()
    for _ in range(200):
        with torch.cuda.stream(side):
            noise @ noise
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "torch"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_fp16_gradient_comes_back_into_range(implementation, activation):
    problem = gelu_mlp.beyond_fp16(activation, device="cuda")
    with served_by(implementation) as backend:
        assert_rule(problem.judge(backend), problem.label)


@pytest.mark.parametrize("masked", [False, True])
def test_layer_norm_repeats_bitwise_under_load(masked):
    x, residual = (
        torch.randn(5000, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    w, b = (torch.randn(768, device="cuda", requires_grad=True) for _ in range(2))
    mask = torch.rand(768, device="cuda") > 0.3 if masked else None
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run():
        with tinyclip.backend("triton"):
            y, total = ops.layer_norm(x, w, b, residual=residual, channel_mask=mask)
        outs = (y.float().square().sum(), total.float().sum())
        return [y.detach(), *torch.autograd.grad(outs, (x, residual, w, b))]

    first = run()
    for _ in range(200):
        with torch.cuda.stream(side):
            noise @ noise
        for a, b_ in zip(run(), first, strict=True):
            assert torch.equal(a, b_)


@pytest.mark.parametrize("name", ["gelu_mlp", "layer_norm"])
def test_in_a_graph(name):
    """Capture and replay on new values in the same memory: no sync, no allocation of our own."""
    inputs = mlp_leaves(400, 128, 512, torch.bfloat16)
    mask = torch.rand(128, device="cuda") > 0.3

    def run():
        with tinyclip.backend("triton"):
            if name == "gelu_mlp":
                y = ops.gelu_mlp(*inputs)
            else:
                y = ops.layer_norm(inputs[0], inputs[4], None, channel_mask=mask)
        return [y, torch.autograd.grad(y.float().sum(), inputs[0])[0]]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_the_masked_block_does_not_wait():
    """PyTorch's own watch over synchronisations, set to raise."""
    module = masked_block.block(dtype=torch.float32).cuda()
    gates = {n: g.cuda().requires_grad_() for n, g in masked_block.gates(torch.float32).items()}
    x = torch.randn(2, 9, masked_block.C, device="cuda", requires_grad=True)
    module(x, **gates).sum().backward()  # compiled and warm
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, **gates).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
