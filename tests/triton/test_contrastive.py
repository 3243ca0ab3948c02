"""The contrastive kernels under the interpreter: the tolerance rule, panels, and identities."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support import contrastive, contrastive_block
from tests.support.draw import LAYOUTS, REGIMES
from tests.support.rule import Tally, assert_rule
from tinyclip import ops
from tinyclip.ops import _panels, _panels_triton
from tinyclip.triton_kernels import contrastive as kernels

pytestmark = pytest.mark.usefixtures("poisoned", "interpreter")

DTYPES = (torch.float32, torch.float16)  # the interpreter has no bf16 products
SEEDS = range(150)
SIZES = (1, 2, 3, 15, 17, 63, 64, 65, 100, 129, 200)
WIDTHS = (1, 7, 32, 64, 100, 130)
TILES = ((128, 128, 64), (64, 32, 32), (32, 128, 16))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(8)


@pytest.fixture
def plan(monkeypatch):
    """Tile number n of three, and panels of 128 or of the usual size."""

    def use(tile, small):
        tile = kernels.Tile(*TILES[tile % len(TILES)], 4, 1)
        monkeypatch.setattr(kernels, "TILES", dict.fromkeys(kernels.TILES, tile))
        monkeypatch.setattr(_panels, "STATS_PANEL", 128 if small else 8192)
        monkeypatch.setattr(_panels, "grads_panel", lambda dtype: 128 if small else 4096)
        return f"tile {tile[:3]} small panels {small}"

    return use


def problem(seed):
    """Every other problem is a block with an offset and weights."""
    if seed % 2:
        return contrastive_block.make(seed, sizes=SIZES, widths=WIDTHS, dtypes=DTYPES)
    return contrastive.make(seed, rows=SIZES, widths=WIDTHS, dtypes=DTYPES)


def test_the_rule(plan):
    tally = Tally()
    for seed in SEEDS:
        walk, drawn = plan(seed // 2, seed % 4 < 2), problem(seed)
        tally.add(f"{drawn.label} ({walk})", drawn.judge("triton"))
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


def test_every_value_is_drawn():
    words = Counter()
    for seed in SEEDS:
        words.update(problem(seed).label.split())
    wanted = [*REGIMES, "torch.float32", "torch.float16", "0.0", "0.3", "1.0"]
    assert all(words[word] >= 10 for word in wanted), words
    assert all(words[layout] >= 5 for layout in LAYOUTS), words


def loss(image, text, scale, teacher=None, alpha=0.0):
    with tinyclip.backend("triton"):
        return ops.contrastive_loss(image, text, scale, teacher=teacher, alpha=alpha)


@pytest.mark.parametrize("small", [False, True])
def test_tiles_and_panels_change_nothing(small, plan):
    drawn = contrastive.make(
        9, rows=[260], widths=[24], dtypes=DTYPES[:1], alphas=[0.3], regimes=["normal"]
    )
    for tile in range(len(TILES)):
        walk = plan(tile, small)
        assert_rule(drawn.judge("triton"), f"{drawn.label} {walk}")


@pytest.mark.parametrize("missing", [1e-1, 1e-3, 1e-6])
def test_a_sure_model_keeps_its_gradient(missing, plan):
    plan(1, True)
    drawn = contrastive.make(4, regimes=["confident"], rows=[150], widths=[64], dtypes=DTYPES[:1])
    image = drawn.tensors["image"]
    drawn.tensors["text"] = F.normalize(image + missing * 0.1, dim=1)
    assert_rule(drawn.judge("triton"), f"{missing}")


def test_identities(plan):
    plan(1, True)
    same = F.normalize(torch.ones(150, 8), dim=1)
    torch.testing.assert_close(loss(same, same, 100.0), torch.tensor(math.log(150)))
    torch.testing.assert_close(loss(same, -same, 1000.0), torch.tensor(math.log(150)))
    one = same[:1].clone().requires_grad_()
    value = loss(one, same[:1], 100.0)
    value.backward()
    assert value == 0
    assert (one.grad == 0).all()
    x, y = (F.normalize(torch.randn(150, 16), dim=1).requires_grad_() for _ in range(2))
    loss(x, y, 20.0, tinyclip.Teacher(x.detach(), y.detach(), 20.0), 1.0).backward()
    assert (x.grad == 0).all(), "a student that is its teacher has nothing to learn"
    assert (y.grad == 0).all()


def test_both_passes_see_the_same_bits():
    """With one column and one row the softmax is 1: any other bit of S in pass 2 would show."""
    a, b = torch.randn(40, 40), torch.randn(40, 40)
    with tinyclip.backend("triton"):
        for row in range(40):
            one = (a[row : row + 1], b[row : row + 1], 70.0)
            stats = ops.contrastive_stats(*one)
            grads = ops.contrastive_grads(*one, stats, row_weight=1.0, col_weight=2.0)
            assert not any(grad.any() for grad in grads)


def test_a_nan_is_not_swallowed(plan):
    plan(1, True)
    for row in (0, 17, 149):
        image, text = (F.normalize(torch.randn(150, 8), dim=1) for _ in range(2))
        image[row, 3] = float("nan")
        image.requires_grad_()
        value = loss(image, text, 9.0)
        value.backward()
        assert value.isnan()
        assert image.grad[row].isnan().any()


def test_a_side_that_is_off_is_not_read(plan):
    """Its statistics may be anything."""
    plan(0, True)
    a, b = torch.randn(5, 8), torch.randn(9, 8)
    with tinyclip.backend("triton"):
        stats = ops.contrastive_stats(a, b, 3.0)
        broken = stats._replace(cols=torch.full_like(stats.cols, float("nan")))
        found = ops.contrastive_grads(a, b, 3.0, broken, row_weight=0.2, col_weight=0.0)
    with tinyclip.backend("reference"):
        wanted = ops.contrastive_grads(a, b, 3.0, stats, row_weight=0.2, col_weight=0.0)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_any_size(dtype, magnitude, plan):
    """dS is kept in units of the largest weight: neither fp16's end nor its start is met."""
    plan(0, True)
    a, b = (F.normalize(torch.randn(70, 16), dim=1).to(dtype) for _ in range(2))
    weight = magnitude * torch.rand(70)
    with tinyclip.backend("triton"):
        stats = ops.contrastive_stats(a, b, 30.0)
        found = ops.contrastive_grads(a, b, 30.0, stats, row_weight=weight, col_weight=weight)
    with tinyclip.backend("reference"):
        exact = (a.double(), b.double(), 30.0)
        stats = ops.contrastive_stats(*exact)
        weight = weight.double()
        wanted = ops.contrastive_grads(*exact, stats, row_weight=weight, col_weight=weight)
    for x, y in zip(found, wanted, strict=True):
        if x.dtype == torch.float32:  # fp16 would hold zeros, or infinities
            torch.testing.assert_close(x.double(), y, rtol=2e-3, atol=2e-3 * magnitude)


def test_reruns_change_no_bit(plan):
    plan(2, True)
    image, text = (torch.randn(140, 24).half().requires_grad_() for _ in range(2))
    first = torch.autograd.grad(loss(image, text, 9.0), (image, text))
    again = torch.autograd.grad(loss(image, text, 9.0), (image, text))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_two_tiers_agree(plan):
    """The C++ engine is the second opinion."""
    if (
        tinyclip.explain("contrastive_loss", torch.ones(1, 1), torch.ones(1, 1), 1.0).backend
        != "cpu"
    ):
        pytest.skip("the extension is not built")
    plan(0, True)
    a, b, ta, tb = (
        torch.randn(130, 20),
        torch.randn(190, 20),
        torch.randn(130, 9),
        torch.randn(190, 9),
    )
    problem = {"teacher": (ta, tb, 2.0), "offset": 31}
    found = {}
    for name in ("triton", "cpu"):
        with tinyclip.backend(name):
            stats = ops.contrastive_stats(a, b, 3.0, **problem)
            weights = {"row_weight": 0.01, "col_weight": 0.02, "alpha": 0.4}
            found[name] = (*stats, *ops.contrastive_grads(a, b, 3.0, stats, **weights, **problem))
    for x, y in zip(found["triton"], found["cpu"], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_memory_is_what_is_promised():
    """Beside inputs and gradients: 0.3 GB at 32,768 and 4 GB at 1,048,576, at D = 512."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dt in (None, 512, 768):
            for most, m in ((0.3e9, 32_768), (4e9, 1 << 20)):
                found = _panels.workspace_bytes(m, m, 512, dt, dtype, _panels_triton.Kernels)
                assert 1e7 < found <= most, (dtype, dt, m, found)
