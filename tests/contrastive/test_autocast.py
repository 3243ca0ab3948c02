"""What torch.autocast does to the contrastive ops: the loss casts features, the passes nothing."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tinyclip
from tinyclip import ops
from tinyclip.ops import _dispatch, _ranks

DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("image", "text", "teacher.image", "teacher.text")


def features(m=12, d=8, dtype=torch.float32):
    torch.manual_seed(4)
    return [F.normalize(torch.randn(m, d), dim=1).to(dtype) for _ in range(4)]


def problem(image, text, ti, tt, scale=20.0, alpha=0.5):
    """What a backend would be given: image, text, scale, its image, its text, its scale."""
    teacher = tinyclip.Teacher(ti, tt, 30.0)
    prepare = _dispatch._OPS["contrastive_loss"].prepare
    spec, given = prepare(image, text, scale, teacher=teacher, alpha=alpha)
    assert spec.dtype == given[0].dtype
    return given[:6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_enter_in_the_autocast_dtype(dtype, given):
    with torch.autocast("cpu", dtype):
        image, text, scale, ti, tt, t_scale = problem(*features(dtype=given))
    assert [x.dtype for x in (image, text, ti, tt)] == [dtype] * 4
    assert scale.dtype == t_scale.dtype == torch.float32
    image, text, scale, ti, tt, t_scale = problem(*features(dtype=given))
    assert [x.dtype for x in (image, text, ti, tt)] == [given] * 4


@pytest.mark.parametrize("wide", range(4), ids=NAMES)
def test_one_fp64_keeps_all_as_they_are(wide):
    given = features()
    given[wide] = given[wide].double()
    with torch.autocast("cpu", torch.bfloat16):
        image, text, scale, ti, tt, _ = problem(*given)
        value = ops.contrastive_loss(given[0], given[1], 20.0)
    assert [x.dtype for x in (image, text, ti, tt)] == [x.dtype for x in given]
    assert scale.dtype == (torch.float64 if wide < 2 else torch.float32)
    assert value.dtype == (torch.float64 if wide < 2 else torch.float32)


def test_a_teacher_that_is_not_read_is_not_cast():
    image, text, ti, tt = features()
    with torch.autocast("cpu", torch.bfloat16):
        image, _, _, ti, tt, _ = problem(image, text, ti, tt.double(), alpha=0.0)
    assert image.dtype == torch.bfloat16
    assert ti is tt is None


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_come_back_in_fp32(layout):
    """Through the cast, to leaves in fp32; whatever the strides."""
    leaves = [x if layout == "rows" else x.T.contiguous().T for x in features()[:2]]
    leaves = [x.requires_grad_() for x in leaves]
    scale = torch.tensor(20.0, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = ops.contrastive_loss(*leaves, scale)
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, (*leaves, scale))
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(ops.contrastive_loss(*halves, scale), (*halves, scale))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


@pytest.mark.parametrize(("first", "second"), list(product([False, True], repeat=2)))
def test_the_passes_cast_nothing(first, second):
    """One inside and one outside of a block: S is the same bits, or this gradient were not 0."""
    a, b = (x[:1] for x in features(d=40)[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=first):
        stats = ops.contrastive_stats(a, b, 70.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=second):
        found = ops.contrastive_grads(a, b, 70.0, stats, row_weight=1.0, col_weight=1.0)
    assert stats.positive == 70.0 * (a @ b.T)
    assert not any(gradient.any() for gradient in found)


def test_ranks_exchange_the_cast_features(monkeypatch):
    sent = []
    gather = _ranks._gather
    monkeypatch.setattr(
        _ranks, "_gather", lambda x, *rest: sent.append(x.dtype) or gather(x, *rest)
    )
    image, text, ti, tt = features()
    teacher = tinyclip.Teacher(ti, tt, 30.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = {"teacher": teacher, "alpha": 0.5}
        with torch.autocast("cpu", torch.bfloat16):
            value = ops.contrastive_loss(image, text, 20.0, group=dist.group.WORLD, **options)
            expected = ops.contrastive_loss(image, text, 20.0, **options)
    finally:
        dist.destroy_process_group()
    assert sent == [torch.bfloat16] * 2
    torch.testing.assert_close(value, expected)
