"""The GPU tier: the same problems on the device, in bf16, fp16 and fp32, and what only it can show.

`make gpu` runs these; without a CUDA device they are skipped, and say so.
"""

import pytest
import torch

import tinyclip
from tinyclip import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]


@pytest.mark.parametrize("length", (50, 77, 197, 257, 577))
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
