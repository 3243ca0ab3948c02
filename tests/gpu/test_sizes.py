"""Sizes at which an index, a grid or the memory would run out: alone on the device, one by one."""

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.gpu.calls import features, gradients, mlp_leaves
from tinyclip import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
both = pytest.mark.parametrize("backend", ["cuda", "triton"])


def test_triton_attention_past_65535_heads():
    """A grid axis other than the first ends there; PyTorch's own kernels may, too."""
    q = torch.randn(70_000, 3, 1, 16, device="cuda", dtype=torch.float16, requires_grad=True)
    last = q[-5:].detach().requires_grad_()
    with tinyclip.backend("triton"):
        out = ops.attention(q, q, q)
    (dq,) = torch.autograd.grad(out.float().sum(), q)
    with tinyclip.backend("torch"):
        expected = ops.attention(last, last, last)
    (dlast,) = torch.autograd.grad(expected.float().sum(), last)
    torch.testing.assert_close(out[-5:], expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dq[-5:], dlast, rtol=1e-2, atol=1e-2)
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


@pytest.mark.parametrize("implementation", ("fused", "pointwise"))
def test_gelu_mlp_past_2_to_the_31_elements(implementation):
    from tinyclip.triton_kernels.gelu_mlp import only

    rows, f = 2**31 // 4096 + 300, 4096
    if torch.cuda.mem_get_info()[0] < 6 * rows * f * 2:
        pytest.skip(f"needs {6 * rows * f * 2 / 2**30:.0f} GiB of free device memory")
    x, w1, b1, w2, b2 = mlp_leaves(rows, 64, f, torch.bfloat16)
    with tinyclip.backend("triton"), only(implementation):
        y = ops.gelu_mlp(x, w1, b1, w2, b2)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x[-5:].detach().requires_grad_()
    with tinyclip.backend("torch"):
        expected = ops.gelu_mlp(last, w1, b1, w2, b2)
        (dlast,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    for ours, theirs in ((y[-5:], expected), (dx[-5:], dlast)):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@both
@pytest.mark.parametrize("m", [46_341, 65_537])
def test_more_logits_than_32_bits_count(backend, m):
    """Against fp64 in chunks of rows."""
    image, text = features(2, m, 64)
    found = gradients(backend, image, text, 20.0)
    exact = [x.detach().double().requires_grad_() for x in (image, text)]
    for x, t in zip(found, gradients("torch", *exact, 20.0), strict=True):
        error = ((x.double() - t).norm() / t.norm()).item()
        assert error <= (1e-5 if x.dim() == 0 else 1e-2), error


@both
@pytest.mark.parametrize("with_teacher", [False, True])
def test_memory_at_32768(backend, with_teacher):
    """0.3 GB over the inputs and the gradients."""
    image, text, ti, tt = features(4, 32_768, 512)
    teacher = tinyclip.Teacher(ti.detach(), tt.detach(), 50.0) if with_teacher else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(backend, image, text, 50.0, teacher=teacher, alpha=0.5 if with_teacher else 0.0)
    used = torch.cuda.max_memory_allocated() - before - image.nbytes - text.nbytes
    print(f"{backend}: {used / 1e9:.3f} GB")
    assert used <= 0.3e9


@both
def test_a_batch_of_a_million(backend):
    """2^40 logits; identical pairs apart, so that the loss is known: log of the batch."""
    m = 1 << 20
    one = F.normalize(torch.ones(1, 512, device="cuda"), dim=1).bfloat16()
    image, text = (one.repeat(m, 1).requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, dimage, dtext, _ = gradients(backend, image, text, 20.0)
    used = torch.cuda.max_memory_allocated() - before - image.nbytes - text.nbytes
    print(f"{backend}: {used / 1e9:.2f} GB")
    torch.testing.assert_close(value.item(), 20 * 0.6931471805599453, rtol=1e-4, atol=0)
    assert used <= 4e9
    assert dimage.float().norm() < 1e-2
    assert dtext.float().norm() < 1e-2
