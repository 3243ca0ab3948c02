"""What torch.library knows: opcheck, and fakes that tell shapes, strides and dtypes truly."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tinyclip.ops  # noqa: F401
from tinyclip import _extension

pytestmark = pytest.mark.usefixtures("poisoned")
OPS = torch.ops.tinyclip


def _attention(dtype):
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=dtype)
    q, k, v = qkv.unbind(2)
    mask, gate = torch.rand(2, 5) > 0.3, torch.randn(2, 2)
    forward = (q, k, v, mask, gate, True, 0.3, "reference")
    out, stats = OPS.attention_fwd(*forward)
    shared = (out, stats, mask, gate, True, 0.3)
    return forward, (out, q, k, v, *shared), (out, qkv, *shared)


def _cases(dtype):
    """(op, arguments) with every optional tensor, without, and with part of the gradients."""
    forward, backward, packed = _attention(dtype)
    yield "attention_fwd", forward
    yield "attention_fwd", (*forward[:3], None, None, False, 0.3, "reference")
    for needs in ([True] * 4, [False, True, False, False]):
        yield "attention_bwd", (*backward, needs, "reference")
    for needs in ([True, True], [True, False]):
        yield "attention_qkv_bwd", (*packed, needs, "reference")
    x, dy = torch.randn(6, 5, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    w1, b1, w2, b2, gate = (
        torch.randn(shape, dtype=dtype) for shape in ((7, 5), (7,), (4, 7), (4,), (7,))
    )
    pre = torch.randn(6, 7, dtype=dtype)
    cpu = dtype in (torch.float32, torch.float64) and _extension.load() is not None
    for backend in ("reference", "torch", *(("cpu",) if cpu else ())):
        yield "gelu_mlp_fwd", (x, w1, b1, w2, b2, gate.float(), "gelu", backend)
        yield "gelu_mlp_fwd", (x, w1, None, w2, None, None, "quick_gelu", backend)
        for needs in ([True] * 6, [False, True, False, False, True, False]):
            yield "gelu_mlp_bwd", (dy, x, pre, w1, w2, gate.float(), "gelu", needs, backend)
        weight, mask = torch.randn(5), torch.tensor([True, True, False, True, True])
        for out_dtype in (dtype, torch.float32):
            yield "layer_norm_fwd", (x, x, weight, weight, mask, 1e-5, out_dtype, backend)
            yield "layer_norm_fwd", (x, None, None, None, None, 1e-5, out_dtype, backend)
        acc = torch.promote_types(dtype, torch.float32)
        mean, rstd = torch.randn(6, dtype=acc), torch.rand(6, dtype=acc)
        for needs in ([True] * 3, [False, True, False]):
            arguments = (x, x, x, mean, rstd, weight, weight, mask, needs, backend)
            yield "layer_norm_bwd", arguments
        yield (
            "layer_norm_bwd",
            (x, None, x, mean, rstd, None, None, None, [True, False, False], backend),
        )
        a, b, ta, tb = (torch.randn(n, d, dtype=dtype) for n, d in ((4, 5), (7, 5), (4, 3), (7, 3)))
        scale = torch.tensor(9.0, dtype=acc)
        for teacher in ((None, None, None), (ta, tb, scale)):
            statistics = (a, b, scale, *teacher, 2, backend)
            yield "contrastive_stats", statistics
            rows, cols, _ = OPS.contrastive_stats(*statistics)
            alpha = 0.0 if teacher[0] is None else 0.5
            for weight, needs in ((scale / 9, [True] * 3), (None, [True, False, False])):
                arguments = (a, b, scale, rows, cols, scale / 9, weight, alpha, *teacher, 2, needs)
                yield "contrastive_grads", (*arguments, backend)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_tell_the_truth(dtype):
    torch.manual_seed(0)
    for name, arguments in _cases(dtype):
        op = getattr(OPS, name)
        real = op(*arguments)
        with FakeTensorMode() as mode:
            to_fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = op(*to_fake)
        for i, (r, f) in enumerate(zip(real, fake, strict=True)):
            told = (f.shape, f.stride(), f.dtype, f.device)
            assert (r.shape, r.stride(), r.dtype, r.device) == told, (name, i, arguments[-2:])
            assert not r.isnan().any(), f"{name}: output {i} has an element that was not written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    torch.manual_seed(0)
    for name, arguments in _cases(dtype):
        torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_an_unknown_backend_is_named():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="backend must name an implementation, got 'nonsense'"):
        OPS.layer_norm_fwd(x, None, None, None, None, 1e-5, torch.float32, "nonsense")
