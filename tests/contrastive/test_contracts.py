"""What the `cpu` backend owes torch.library, autograd and torch.compile, kept dS or two passes."""

from itertools import combinations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tinyclip
from tests.support.samples import contrastive_loss as sample
from tests.support.samples import leaves
from tinyclip import _extension, ops
from tinyclip.ops import _contrastive, _dispatch

pytestmark = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))
OPS = torch.ops.tinyclip


@pytest.fixture(params=["kept", "two_passes"], autouse=True)
def _path(request, monkeypatch):
    if request.param == "two_passes":
        monkeypatch.setitem(_contrastive._KEPT_LOGITS, "cpu", 0)
    torch.manual_seed(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype, poisoned):
    a, b, ta, tb = (torch.randn(n, d, dtype=dtype) for n, d in ((4, 5), (7, 5), (4, 3), (7, 3)))
    scale = torch.tensor(9.0, dtype=torch.promote_types(dtype, torch.float32))
    for teacher in ((None, None, None), (ta, tb, scale)):
        alpha = 0.0 if teacher[0] is None else 0.5
        torch.library.opcheck(OPS.contrastive_stats.default, (a, b, scale, *teacher, 2, "cpu"))
        rows, cols, _ = OPS.contrastive_stats(a, b, scale, *teacher, 2, "cpu")
        for weight, needs in ((scale / 9, [True] * 3), (None, [True, False, False])):
            arguments = (a, b, scale, rows, cols, scale / 9, weight, alpha, *teacher, 2, needs)
            torch.library.opcheck(OPS.contrastive_grads.default, (*arguments, "cpu"))
        square = (a, b[:4], scale, *((ta, tb[:4], scale) if teacher[0] is not None else teacher))
        torch.library.opcheck(OPS.contrastive_whole.default, (*square, alpha, "cpu"))


def test_any_subset_of_inputs():
    op, tensors, options = sample()
    with tinyclip.backend("cpu"):
        full = leaves(tensors)
        op(**full, **options).backward()
        for size in range(len(tensors)):
            for frozen in combinations(tensors, size):
                some = leaves(tensors, frozen)
                op(**some, **options).backward()
                for name, tensor in some.items():
                    if name in frozen:
                        assert tensor.grad is None
                    else:
                        torch.testing.assert_close(tensor.grad, full[name].grad)


def test_autocast_checkpoint_and_double_backward():
    op, tensors, options = sample(n=40)
    with tinyclip.backend("cpu"):
        plain, mixed, again = (leaves(tensors) for _ in range(3))
        op(**plain, **options).backward()
        checkpoint(lambda **kw: op(**kw, **options), **again, use_reentrant=False).backward()
        for name in tensors:
            assert torch.equal(plain[name].grad, again[name].grad), name
        with torch.autocast("cpu", torch.bfloat16):
            op(**mixed, **options).backward()
        features, half = options["teacher"][:2], leaves(tensors)
        teacher = (x.bfloat16() for x in features)
        cast = {name: half[name].bfloat16() for name in ("image", "text")}
        teacher = tinyclip.Teacher(*teacher, options["teacher"].logit_scale)
        op(**{**half, **cast}, **{**options, "teacher": teacher}).backward()
        for name in tensors:
            assert torch.equal(half[name].grad, mixed[name].grad), name
        inputs = leaves(tensors)
        (grad, *_) = torch.autograd.grad(
            op(**inputs, **options), list(inputs.values()), create_graph=True
        )
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_compile_fullgraph_dynamic():
    op, _, _ = sample()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with tinyclip.backend("cpu"):
        for n in (5, 9):
            _, tensors, options = sample(n=n)
            eager, traced = leaves(tensors), leaves(tensors)
            op(**eager, **options).backward()
            compiled(**traced, **options).backward()
            for name in tensors:
                torch.testing.assert_close(traced[name].grad, eager[name].grad)


def test_it_is_first_and_says_why_not(monkeypatch):
    x = torch.randn(4, 3)
    assert tinyclip.explain("contrastive_loss", x, x, 2.0).backend == "cpu"
    spec = _dispatch._OPS["contrastive_loss"].prepare(x, x, 2.0)[0]
    (why_not,) = (
        c.why_not for c in _dispatch._OPS["contrastive_loss"].candidates if c.backend == "cpu"
    )
    assert "these are on cuda" in why_not(spec._replace(device="cuda")).reason
    monkeypatch.setattr(_extension, "why_not", lambda: "the extension was not built: no compiler")
    assert "no compiler" in why_not(spec).reason
    with tinyclip.backend("cpu"), pytest.raises(tinyclip.ops.BackendUnavailable, match="compiler"):
        ops.contrastive_loss(x, x, 2.0)
