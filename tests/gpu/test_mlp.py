"""The GELU-MLP and LayerNorm kernels on the device: bf16, fp16 and fp32, both implementations."""

import pytest
import torch

import tinyclip
from tests.support import gelu_mlp, layer_norm, masked_block
from tests.support.rule import Tally
from tinyclip import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
IMPLEMENTATIONS = ("fused", "pointwise")
ROWS = (1, 7, 50, 77, 197, 400, 2000)
WIDTHS = (21, 32, 48, 64, 77, 100, 192, 256, 301, 384, 768, 1024)


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products in fp32, the yardsticks' as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _only(implementation):
    from tinyclip.triton_kernels.gelu_mlp import only

    return only(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gelu_mlp_obeys_the_rule(implementation):
    tally = Tally()
    for seed in range(300):
        problem = gelu_mlp.make(seed, device="cuda", rows=ROWS, widths=WIDTHS)
        with _only(implementation):
            tally.add(problem.label, problem.judge("triton"))
    tally.verdict()


def test_layer_norm_obeys_the_rule():
    tally = Tally()
    for seed in range(300):
        problem = layer_norm.make(seed, device="cuda", rows=ROWS, widths=(*WIDTHS, 1280, 8192))
        tally.add(problem.label, problem.judge("triton"))
    tally.verdict()


def _mlp(rows, c, f, dtype):
    shapes = ((rows, c), (f, c), (f,), (c, f), (c,))
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gelu_mlp_repeats_bitwise_under_load(implementation, dtype):
    """200 reruns with a second stream busy, every gradient included."""
    inputs = _mlp(1000, 256, 1024, dtype)
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


def test_layer_norm_past_2_to_the_31_elements():
    rows = 2**31 // 1024 + 100
    if torch.cuda.mem_get_info()[0] < 5 * rows * 1024 * 2:
        pytest.skip(f"needs {5 * rows * 2**11 / 2**30:.0f} GiB of free device memory")
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with tinyclip.backend("triton"):
        y = ops.layer_norm(x, None, None)
        (dx,) = torch.autograd.grad(y, x, x.detach())
    last = x[-5:].detach().requires_grad_()
    expected = torch.nn.functional.layer_norm(last, (1024,))
    (dlast,) = torch.autograd.grad(expected, last, last.detach())
    torch.testing.assert_close(y[-5:], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx[-5:], dlast, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gelu_mlp_past_2_to_the_31_elements(implementation):
    rows, f = 2**31 // 4096 + 300, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * f * 2:
        pytest.skip(f"needs {6 * rows * f * 2 / 2**30:.0f} GiB of free device memory")
    x, w1, b1, w2, b2 = _mlp(rows, 64, f, torch.bfloat16)
    with tinyclip.backend("triton"), _only(implementation):
        y = ops.gelu_mlp(x, w1, b1, w2, b2)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x[-5:].detach().requires_grad_()
    with tinyclip.backend("torch"):
        expected = ops.gelu_mlp(last, w1, b1, w2, b2)
        (dlast,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    for ours, theirs in ((y[-5:], expected), (dx[-5:], dlast)):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize("name", ["gelu_mlp", "layer_norm"])
def test_in_a_graph(name):
    """Capture and replay on new values in the same memory: no sync, no allocation of our own."""
    inputs = _mlp(400, 128, 512, torch.bfloat16)
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
