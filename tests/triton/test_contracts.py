"""The Triton kernels as registered ops: opcheck, compile, checkpoint, autocast, every subset."""

from itertools import combinations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tinyclip
from tests.support import samples
from tests.support.samples import leaves, total
from tinyclip import ops

pytestmark = pytest.mark.usefixtures("interpreter")
SAMPLES = (
    samples.attention,
    samples.attention_masked,
    samples.attention_qkv,
    samples.gelu_mlp,
    samples.layer_norm,
    samples.layer_norm_masked,
    samples.contrastive_loss,
)
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)


@pytest.fixture(autouse=True)
def _triton():
    torch.manual_seed(3)
    with tinyclip.backend("triton"):
        yield


def _attention(dtype):
    """Packed views in, as the modules hand them over; with and without the optional tensors."""
    qkv = torch.randn(2, 18, 3, 2, 16, dtype=dtype)
    q, k, v = qkv.unbind(2)
    for mask, gate, causal in (
        (None, None, False),
        (torch.rand(2, 18) > 0.3, torch.randn(2, 2), True),
    ):
        forward = (q, k, v, mask, gate, causal, 0.3, "triton")
        yield "attention_fwd", forward
        out, stats = torch.ops.tinyclip.attention_fwd(*forward)
        shared = (out, stats, mask, gate, causal, 0.3)
        with_gate = gate is not None
        for needs in ([True, True, True, with_gate], [False, True, False, False]):
            yield "attention_bwd", (out, q, k, v, *shared, needs, "triton")
        yield "attention_qkv_bwd", (out, qkv, *shared, [True, with_gate], "triton")


def _gelu_mlp(dtype):
    x, dy, pre = (torch.randn(9, n, dtype=dtype) for n in (12, 8, 20))
    w1, b1, w2, b2 = (torch.randn(s, dtype=dtype) for s in ((20, 12), (20,), (8, 20), (8,)))
    gate = torch.randn(20)
    yield "gelu_mlp_fwd", (x, w1, b1, w2, b2, gate, "gelu", "triton")
    yield "gelu_mlp_fwd", (x, w1, None, w2, None, None, "quick_gelu", "triton")
    for needs in ([True] * 6, [False, True, False, False, True, False]):
        yield "gelu_mlp_bwd", (dy, x, pre, w1, w2, gate, "gelu_tanh", needs, "triton")


def _layer_norm(dtype):
    x, weight, mask = torch.randn(9, 12, dtype=dtype), torch.randn(12), torch.rand(12) > 0.3
    mean, rstd = torch.randn(9), torch.rand(9)
    for out_dtype in (dtype, torch.float32):
        yield "layer_norm_fwd", (x, x.float(), weight, weight, mask, 1e-5, out_dtype, "triton")
        yield "layer_norm_fwd", (x, None, None, None, None, 1e-5, out_dtype, "triton")
    for needs in ([True] * 3, [False, True, False]):
        yield "layer_norm_bwd", (x, x, x, mean, rstd, weight, weight, mask, needs, "triton")
    alone = (None, None, None, [True, False, False], "triton")
    yield "layer_norm_bwd", (x, None, x, mean, rstd, *alone)


def _contrastive(dtype):
    """With a teacher, all gradients of both sides; without one, some of one side."""
    a, b, ta, tb = (torch.randn(n, d, dtype=dtype) for n, d in ((4, 5), (7, 5), (4, 3), (7, 3)))
    scale = torch.tensor(9.0)
    for teacher, alpha, weight, needs in (
        ((ta, tb, scale), 0.5, scale / 9, [True, True, True]),
        ((None, None, None), 0.0, None, [True, False, False]),
    ):
        forward = (a, b, scale, *teacher, 2, "triton")
        yield "contrastive_stats", forward
        rows, cols, _ = torch.ops.tinyclip.contrastive_stats(*forward)
        arguments = (a, b, scale, rows, cols, scale / 9, weight, alpha, *teacher, 2, needs)
        yield "contrastive_grads", (*arguments, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cases", [_attention, _gelu_mlp, _layer_norm, _contrastive])
def test_opcheck_and_strides(dtype, cases):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, arguments in cases(dtype):
        op = getattr(torch.ops.tinyclip, name).default
        torch.library.opcheck(op, arguments)
        with FakeTensorMode() as mode:
            fake = op(
                *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        for real, told in zip(op(*arguments), fake, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (
                told.shape,
                told.stride(),
                told.dtype,
            )


@every_sample
def test_any_subset_of_inputs(sample):
    op, tensors, options = sample()
    full = leaves(tensors)
    total(op(**full, **options)).backward()
    for size in range(len(tensors)):
        for frozen in combinations(tensors, size):
            some = leaves(tensors, frozen)
            total(op(**some, **options)).backward()
            for name, tensor in some.items():
                if name in frozen:
                    assert tensor.grad is None
                else:
                    assert torch.equal(tensor.grad, full[name].grad), (name, frozen)


@every_sample
def test_compile_fullgraph_dynamic(sample):
    op, _, _ = sample()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        _, tensors, options = sample(n=n)
        eager, traced = leaves(tensors), leaves(tensors)
        total(op(**eager, **options)).backward()
        total(compiled(**traced, **options)).backward()
        for name in tensors:
            torch.testing.assert_close(traced[name].grad, eager[name].grad)


@every_sample
def test_checkpoint_and_reruns_change_no_bit(sample):
    op, tensors, options = sample()
    plain, again = leaves(tensors), leaves(tensors)
    total(op(**plain, **options)).backward()
    total(checkpoint(lambda **kw: op(**kw, **options), **again, use_reentrant=False)).backward()
    for name in tensors:
        assert torch.equal(plain[name].grad, again[name].grad), name


@every_sample
def test_autocast_and_double_backward(sample):
    op, tensors, options = sample()
    inputs = leaves(tensors)
    with torch.autocast("cpu", torch.float16):
        out = op(**inputs, **options)
    first = out[0] if isinstance(out, tuple) else out
    wide = op is ops.layer_norm or first.dim() == 0
    assert first.dtype == (torch.float32 if wide else torch.float16)
    grads = torch.autograd.grad(total(out), list(inputs.values()), create_graph=True)
    for grad, tensor in zip(grads, inputs.values(), strict=True):
        assert grad.dtype == tensor.dtype
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward(retain_graph=True)


def test_what_the_interpreter_cannot_do_is_refused():
    q = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(tinyclip.BackendUnavailable, match="bits of bf16"):
        ops.attention(q, q, q)
    told = tinyclip.explain("attention", q.float(), q.float(), q.float())
    assert told.rows[0][:2] == ("triton", "runs")
