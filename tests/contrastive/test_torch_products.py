"""The `torch` backend's contrastive passes as they run on CUDA, simulated on CPU tensors.

There 16-bit features are multiplied as they are, with fp32 results, by products that a CPU does not
have: the two helpers are emulated, exactly but for fp32 sums, and look at what they are given.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import tinyclip
from tests.support import contrastive, contrastive_block
from tests.support.rule import Tally
from tinyclip import ops
from tinyclip.ops import _torch

HALVES = BF16, FP16 = (torch.bfloat16, torch.float16)
FP32, FP64 = torch.float32, torch.float64


@pytest.fixture
def products(monkeypatch, poisoned):
    """The dtypes of each product's operands; chunks of a few rows."""
    seen = []

    def mm(x, y, acc):
        seen.append(("mm", x.dtype, y.dtype))
        assert x.dtype in (acc, *HALVES)
        return x.to(acc) @ y.to(acc)

    def addmm_(into, x, y):
        seen.append(("addmm", x.dtype, y.dtype))
        assert x.dtype in (into.dtype, *HALVES)
        into.addmm_(x.to(into.dtype), y.to(into.dtype))

    monkeypatch.setattr(_torch, "_on_cuda", lambda x: True)
    monkeypatch.setattr(_torch, "_mm", mm)
    monkeypatch.setattr(_torch, "_addmm_", addmm_)
    monkeypatch.setitem(_torch._CHUNK_LOGITS, "cpu", 1000)
    return seen


def features(dtype, m=90, d=24):
    torch.manual_seed(6)
    return [F.normalize(torch.randn(m, d), dim=1).to(dtype) for _ in range(4)]


def gradients(image, text, ti, tt, backend="torch"):
    """Loss, dimage, dtext, dscale."""
    leaves = [x.detach().requires_grad_() for x in (image, text)]
    leaves.append(torch.tensor(30.0, requires_grad=True))
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(*leaves, teacher=tinyclip.Teacher(ti, tt, 20.0), alpha=0.5)
    return value, *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_operands_stay_in_16_bit(dtype, products):
    value, dimage, dtext, dscale = gradients(*features(dtype))
    assert {x[1:] for x in products} == {(dtype, dtype)}
    chunks = -(-90 // (1000 // 90))
    kinds = [x[0] for x in products]
    # Student and teacher, forward and backward, and dS b; a chunk each.
    assert (kinds.count("mm"), kinds.count("addmm")) == (5 * chunks, chunks)
    assert value.dtype == dscale.dtype == torch.float32
    assert dimage.dtype == dtext.dtype == dtype


@pytest.mark.parametrize(
    ("given", "multiplied"),
    [
        ((FP32, FP32, FP32, FP32), {FP32}),
        ((FP64, FP64, FP64, FP64), {FP64}),
        ((BF16, FP16, BF16, BF16), {FP32, BF16}),
        ((BF16, FP32, FP32, BF16), {FP32}),
        ((FP32, FP32, FP16, FP16), {FP32, FP16}),
        ((FP64, FP64, FP16, FP16), {FP64}),
    ],
    ids=["fp32", "fp64", "bf16-fp16", "bf16-fp32", "teacher_fp16", "fp64_teacher_fp16"],
)  # fmt: skip
def test_what_else_is_multiplied(given, multiplied, products):
    """A pair is in 16 bit if both are, in the same dtype, and the logits are fp32."""
    found = gradients(*(x.to(dtype) for x, dtype in zip(features(FP32), given, strict=True)))
    assert {x[1:] for x in products} == {(dtype, dtype) for dtype in multiplied}
    expected = gradients(*(x.double() for x in features(FP32)), backend="reference")
    rough = any(dtype in HALVES for dtype in given)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= (3e-2 if rough else 1e-5) * y.norm()


@pytest.mark.parametrize("make", [contrastive.make, contrastive_block.make], ids=["loss", "passes"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_rule(make, dtype, products):
    """One rounding of dS is what the rule grants to an engine that multiplies it in 16 bit."""
    tally = Tally()
    for seed in range(25):
        problem = make(seed, dtypes=(dtype,), sizes=(1, 2, 17, 64, 129), rounded_ds=True)
        tally.add(problem.label, problem.judge("torch"))
    assert ("addmm", dtype, dtype) in products
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_of_any_size(dtype, magnitude, products):
    """dS is kept in units of the largest weight: 1 / (2 M) does not vanish, 65,536 does not end."""
    a = F.normalize(torch.randn(150, 16), dim=1).to(dtype)
    b = -a
    weights = {"row_weight": 0.999 * magnitude, "col_weight": 0.999 * magnitude}
    with tinyclip.backend("torch"):
        stats = ops.contrastive_stats(a, b, 60.0)
        da, _, dscale = ops.contrastive_grads(a, b, 60.0, stats, **weights)
    with tinyclip.backend("reference"):
        exact = (a.double(), b.double(), 60.0)
        truth = ops.contrastive_grads(*exact, ops.contrastive_stats(*exact), **weights)
    torch.testing.assert_close(dscale.double(), truth[2], rtol=1e-3, atol=0)
    assert not da.isnan().any()
    if magnitude == 1:
        assert (da.double() - truth[0]).norm() <= 2 * torch.finfo(dtype).eps * truth[0].norm()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_weights_beside_a_large_one(dtype, products):
    """The unit is the large one's, and the others' dS, 1e-6 of it, still has all bits of fp16."""
    a, b = features(dtype)[:2]
    weight = torch.full((90,), 1e-4)
    weight[0] = 1.0
    weights = {"row_weight": weight, "col_weight": 0.0}
    with tinyclip.backend("torch"):
        da, _, _ = ops.contrastive_grads(a, b, 9.0, ops.contrastive_stats(a, b, 9.0), **weights)
    with tinyclip.backend("reference"):
        exact = (a.double(), b.double(), 9.0)
        truth, _, _ = ops.contrastive_grads(*exact, ops.contrastive_stats(*exact), **weights)
    error = (da.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert (error <= 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("m", [0, 1])
def test_hardly_any_rows(m, products):
    a, b = torch.randn(m, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    with tinyclip.backend("torch"):
        stats = ops.contrastive_stats(a, b, 2.0)
        da, db, dscale = ops.contrastive_grads(
            a, b, 2.0, stats, row_weight=torch.ones(m), col_weight=0.0
        )
    assert (da.shape, db.shape) == (a.shape, b.shape)
    assert (db != 0).any() == (dscale != 0) == (m == 1)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_pytorch_has_these_products(dtype):
    """The helpers themselves, on PyTorch's fake CUDA tensors: signatures, dtypes, shapes."""
    with FakeTensorMode():
        a, b, ta, tb = (torch.empty(n, 8, device="cuda", dtype=dtype) for n in (5, 7, 5, 7))
        scale = torch.empty((), device="cuda")
        stats = _torch.contrastive_stats(a, b, scale, ta, tb, scale, 1)
        assert [x.dtype for x in stats] == [torch.float32] * 3
        both = (stats[0], stats[1], scale, None, 0.5, ta, tb, scale, 1, [True] * 3)
        da, db, dscale = _torch.contrastive_grads(a, b, scale, *both)
        product, total = _torch._mm(a, b.T, FP32), torch.empty(5, 5, device="cuda")
        _torch._addmm_(total, a, a.T)
    assert (product.dtype, total.dtype) == (FP32, FP32)
    assert (da.dtype, db.dtype, dscale.dtype) == (dtype, dtype, torch.float32)
    assert (da.shape, db.shape) == (a.shape, b.shape)


def test_a_cpu_multiplies_in_fp32(monkeypatch):
    """Nothing there is rounded, as its gradients show: they are those of fp32 features."""
    found = gradients(*features(torch.bfloat16))
    expected = gradients(*(x.float() for x in features(torch.bfloat16)))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y.to(x.dtype))
