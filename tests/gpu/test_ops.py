"""The GPU tier: the same problems on the device, in bf16, fp16 and fp32, and what only it can show.

`make gpu` runs these; without a CUDA device they are skipped, and say so.
"""

from functools import partial

import pytest
import torch

import tinyclip
from tests.support import attention, contrastive, gelu_mlp, layer_norm
from tests.support.rule import Tally
from tinyclip import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
MAKERS = {
    "attention": attention.make,
    "attention_qkv": partial(attention.make, packed=True),
    "gelu_mlp": gelu_mlp.make,
    "layer_norm": layer_norm.make,
    "contrastive_loss": contrastive.make,
}
CLIP = {"lengths": (50, 77, 197, 257, 577), "dims": (64,), "regimes": ("normal",)}


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products in fp32, the yardsticks' as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("op", MAKERS)
def test_the_rule(op, backend):
    tally = Tally()
    for seed in range(300):
        problem = MAKERS[op](seed, device="cuda")
        tally.add(problem.label, problem.judge(backend))
    tally.verdict()


@pytest.mark.parametrize("packed", [False, True])
def test_triton_attention_obeys_the_rule(packed):
    tally = Tally()
    for seed in range(400):
        problem = attention.make(
            seed, packed=packed, device="cuda", lengths=(1, 2, 17, 50, 77, 97, 197, 257, 577)
        )
        tally.add(problem.label, problem.judge("triton"))
    tally.verdict()


@pytest.mark.parametrize("length", CLIP["lengths"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_attention_repeats_bitwise_under_load(length, dtype):
    """1,000 reruns with a second stream busy, dQ included."""
    qkv = torch.randn(4, length, 3, 8, 64, device="cuda", dtype=dtype, requires_grad=True)
    dout = torch.randn(4, length, 8, 64, device="cuda", dtype=dtype)
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()

    def run():
        with tinyclip.backend("triton"):
            out = ops.attention_qkv(qkv, causal=length == 77)
        return out.detach(), torch.autograd.grad(out, qkv, dout)[0]

    first = run()
    for _ in range(1000):
        with torch.cuda.stream(side):
            noise @ noise
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


def test_triton_attention_past_65535_heads():
    q = torch.randn(70_000, 3, 1, 16, device="cuda", dtype=torch.float16, requires_grad=True)
    with tinyclip.backend("triton"):
        out = ops.attention(q, q, q)
    (dq,) = torch.autograd.grad(out.float().sum(), q)
    with tinyclip.backend("torch"):
        expected = ops.attention(q, q, q)
    torch.testing.assert_close(out[-5:], expected[-5:], rtol=1e-2, atol=1e-2)
    assert dq.isfinite().all()


def test_triton_attention_past_2_to_the_31_elements():
    """A packed tensor of 2.2e9 elements: the last batch is where a 32-bit offset would wrap."""
    batch = 2**31 // (257 * 3 * 16 * 64) + 20
    need = batch * 257 * 3 * 16 * 64 * 2 * 3
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free device memory")
    qkv = torch.randn(batch, 257, 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    qkv.requires_grad_()
    with tinyclip.backend("triton"):
        out = ops.attention_qkv(qkv)
        (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = qkv[-1:].detach().requires_grad_()
    with tinyclip.backend("torch"):
        expected = ops.attention_qkv(last)
        (dlast,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    torch.testing.assert_close(out[-1:], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dqkv[-1:], dlast, rtol=5e-2, atol=5e-2)


def test_triton_attention_in_a_graph():
    """Capture and replay on new values in the same memory: no sync, no allocation of our own."""
    qkv = torch.randn(8, 50, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(8, 50, 12, 64, device="cuda", dtype=torch.bfloat16)

    def run():
        with tinyclip.backend("triton"):
            out = ops.attention_qkv(qkv)
        return out, torch.autograd.grad(out, qkv, dout)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


def test_a_write_on_another_stream_is_seen():
    qkv = torch.zeros(8, 50, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), tinyclip.backend("triton"):
        torch.cuda._sleep(50_000_000)
        qkv.fill_(1.0)
        out = ops.attention_qkv(qkv)
    torch.cuda.current_stream().wait_stream(side)
    assert (out == 1).all()


@pytest.mark.parametrize("name", ["attention", "attention_qkv", "layer_norm", "gelu_mlp"])
def test_compiled_equals_eager(name):
    from tests.support import samples

    op, tensors, options = getattr(samples, name)()
    tensors = {key: value.cuda() for key, value in tensors.items()}
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    eager, traced = samples.leaves(tensors), samples.leaves(tensors)
    for function, inputs in ((op, eager), (compiled, traced)):
        outs = function(**inputs, **options)
        sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,))).backward()
    for key in tensors:
        torch.testing.assert_close(traced[key].grad, eager[key].grad, rtol=1e-4, atol=1e-4)
