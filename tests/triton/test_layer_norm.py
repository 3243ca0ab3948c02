"""The Triton LayerNorm under the interpreter: the tolerance rule on seeded problems, and edges."""

from collections import Counter

import pytest
import torch

import tinyclip
from tests.support import layer_norm
from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM
from tests.support.rule import Tally, assert_rule
from tinyclip import ops
from tinyclip.triton_kernels import layer_norm as kernels

pytestmark = pytest.mark.usefixtures("poisoned", "interpreter")

CHOICES = {
    "rows": (1, 7, 50, 77, 197, 400),
    "widths": (1, 21, 32, 48, 64, 77, 100, 192, 256, 301, 384, 1100),
    "dtypes": (torch.float32, torch.float16),
}
SEEDS = range(440)
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_the_rule(part, monkeypatch):
    """Few programs, so that each walks over several blocks of rows backward."""
    tally = Tally()
    for seed in SEEDS[part::PARTS]:
        monkeypatch.setattr(kernels, "_BWD_PROGRAMS", (1, 5, 1024)[seed // PARTS % 3])
        problem = layer_norm.make(seed, **CHOICES)
        # Narrow warps take a row at a time; wide ones many, which is quicker to interpret.
        wide = problem.douts[0].numel() > 20_000
        monkeypatch.setattr(kernels, "_FWD_WARP", 1 << 15 if wide else 1024)
        monkeypatch.setattr(kernels, "_BWD_WARP", 1 << 15 if wide else 512)
        tally.add(problem.label, problem.judge("triton"))
    tally.verdict()


def test_every_value_is_drawn():
    words = Counter()
    for seed in SEEDS:
        problem = layer_norm.make(seed, **CHOICES)
        tensors = problem.tensors
        words.update(problem.label.split())
        words[f"rows {tensors['x'].shape[-2]}"] += 1
        words.update(f"frozen {name}" for name in problem.frozen)
        words.update(f"no {name}" for name, tensor in tensors.items() if tensor is None)
        words["no channel"] += tensors["channel_mask"] is not None and not any(
            tensors["channel_mask"]
        )
    wanted = [f"rows {n}" for n in CHOICES["rows"]] + [f"C{n}" for n in CHOICES["widths"]]
    wanted += [*REGIMES, *LAYOUTS, *UPSTREAM, "mask", "no channel"]
    wanted += [f"{x}/{w}" for x in CHOICES["dtypes"] for w in (torch.float32, x)]
    wanted += ["no weight", "no bias", "no residual", "no channel_mask"]
    wanted += [f"frozen {name}" for name in ("x", "weight", "bias", "residual")]
    rare = {word: words[word] for word in wanted if words[word] < 10}
    assert not rare, rare


@pytest.mark.parametrize("c", [4096, 5000, 8192])
def test_wide_rows(c):
    for seed in range(2):
        problem = layer_norm.make(
            seed, rows=[3], widths=[c], dtypes=[torch.float16], regimes=["normal"]
        )
        assert_rule(problem.judge("triton"), problem.label)


def test_wider_rows_are_refused():
    x = torch.randn(2, 8193)
    told = tinyclip.explain("layer_norm", x, None, None)
    assert told.rows[0] == ("triton", "cannot", "channels go to 8192, there are 8193")
    told = tinyclip.explain("layer_norm", x[:, :0], None, None)
    assert told.rows[0] == ("triton", "cannot", "a size is zero")


@pytest.mark.parametrize("c", [70, 5000])  # of 5000 channels backward reads the weight row by row
@pytest.mark.parametrize("summed", [False, True])
def test_masked_channels_do_not_leak(c, summed):
    """NaN and inf where the mask is False: the bits that zeros give, in y and every gradient."""
    x, residual, dy = (torch.randn(3, c) for _ in range(3))
    w, b, mask = torch.randn(c), torch.randn(c), torch.rand(c) > 0.4
    options = {"residual": residual, "channel_mask": mask} if summed else {"channel_mask": mask}
    results = []
    for value in (0.0, float("nan"), float("inf")):
        planted = [t.clone() for t in (x, w, b, dy)]
        for tensor in planted:
            tensor[..., ~mask] = value
        *planted, upstream = planted
        planted = [t.requires_grad_() for t in planted]
        with tinyclip.backend("triton"):
            y = ops.layer_norm(*planted, **options)
        if summed:
            y, total = y
            assert torch.equal(total[:, mask], (x + residual)[:, mask])
        results.append([y.detach(), *torch.autograd.grad(y, planted, upstream)])
    for tensor in results[0]:
        assert (tensor[..., ~mask] == 0).all()
    for planted in results[1:]:
        for clean, other in zip(results[0], planted, strict=True):
            assert torch.equal(clean, other)


@pytest.mark.parametrize("masked", [False, True])
def test_integers_are_bitwise(masked):
    """Rows of +-1 over a power of two of kept channels: mean 0, variance 1, and eps 0."""
    sign = torch.ones(16)
    sign[::2] = -1
    order = torch.stack([torch.randperm(16) for _ in range(40)])
    kept = torch.zeros(40, dtype=torch.bool)
    kept[torch.randperm(40)[:16] if masked else slice(16)] = True
    x = torch.full((40, 40 if masked else 16), 7.0)
    mask = kept if masked else None
    columns = kept if masked else slice(None)
    x[:, columns] = sign[order] * 4 + 2
    w, b = (torch.randint(-8, 9, (x.shape[1],)).float().requires_grad_() for _ in range(2))
    dy = torch.randint(-8, 9, x.shape).float()
    with tinyclip.backend("triton"):
        y = ops.layer_norm(x, w, b, eps=0.0, channel_mask=mask)
        dw, db = torch.autograd.grad(y, (w, b), dy)
    normed = torch.zeros_like(x)
    normed[:, columns] = sign[order]
    inside = torch.ones_like(w) if mask is None else mask.float()
    assert torch.equal(y, (normed * w + b) * inside)
    assert torch.equal(dw, (dy * normed).sum(0))
    assert torch.equal(db, (dy * inside).sum(0))


def test_the_sum_is_rounded_once():
    """x and residual of two dtypes: the sum in the wider, and y of that sum."""
    x, residual = torch.randn(5, 48, dtype=torch.float16), torch.randn(5, 48)
    with tinyclip.backend("triton"):
        y, total = ops.layer_norm(x, None, None, residual=residual)
        half, sum_of_half = ops.layer_norm(x, None, None, residual=x)
    assert torch.equal(total, x + residual)
    assert torch.equal(sum_of_half, x + x)
    assert (y.dtype, total.dtype, half.dtype) == (torch.float32, torch.float32, torch.float16)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + residual, (48,)))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_only_what_is_wanted_is_written(needs):
    x, dy, w = torch.randn(9, 33), torch.randn(9, 33), torch.randn(33)
    _, _, mean, rstd = kernels.layer_norm_fwd(x, None, w, w, None, 1e-5, torch.float32)
    every = kernels.layer_norm_bwd(dy, None, x, mean, rstd, w, w, None, [True] * 3)
    some = kernels.layer_norm_bwd(dy, None, x, mean, rstd, w, w, None, [bool(n) for n in needs])
    for need, full, found in zip(needs, every, some, strict=True):
        assert torch.equal(found, full if need else x.new_empty(0))


def test_offsets_are_64_bit():
    """The last row starts beyond 2^31 elements; of the storage between, nothing is ever touched."""
    stride = 2**31 // 3 + 5
    assert 3 * stride > 2**31
    wide = torch.empty(3 * stride + 8, dtype=torch.float16)
    x, dy = wide.as_strided((4, 8), (stride, 1)), torch.randn(4, 8, dtype=torch.float16)
    x.copy_(torch.randn(4, 8))
    near = x.clone()
    far, expected = (
        kernels.layer_norm_fwd(t, t, None, None, None, 1e-5, torch.float32) for t in (x, near)
    )
    for found, exact in zip(far, expected, strict=True):
        assert torch.equal(found, exact)
    far, expected = (
        kernels.layer_norm_bwd(dy, t, t, *expected[2:], None, None, None, [True, False, False])[0]
        for t in (x, near)
    )
    assert torch.equal(far, expected)
