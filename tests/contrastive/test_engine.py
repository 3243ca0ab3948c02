"""The engine's parts on their own (engine.cpp), its large indices, and its invariances."""

import math
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support import contrastive
from tests.support.draw import REGIMES
from tests.support.rule import assert_rule
from tinyclip import _extension, ops
from tinyclip.ops import _contrastive, _cpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))


@pytest.mark.parametrize("optimised", ["-O1", "-O3"])
def test_the_parts(tmp_path, optimised):
    """exp to 1 ulp, merging however cut, offsets past 2**32, sizes that overflow."""
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "engine"
    source = ROOT / "tests" / "contrastive" / "engine.cpp"
    flags = ["-std=c++17", optimised, "-ffp-contract=off", f"-I{ROOT / 'csrc'}", "-Wno-unused"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def walk(monkeypatch):
    """Tiles of so many rows and bytes, and two passes even where dS would be kept."""

    def set_walk(rows: int, size: int) -> None:
        monkeypatch.setattr(_cpu, "_TILE_ROWS", rows)
        monkeypatch.setattr(_cpu, "_TILE_BYTES", size)
        monkeypatch.setitem(_contrastive._KEPT_LOGITS, "cpu", 0)

    return set_walk


@pytest.mark.parametrize("regime", REGIMES)
def test_tiles_change_nothing(regime, walk):
    choices = {"regimes": [regime], "rows": [131], "widths": [24], "dtypes": [torch.float32]}
    for alpha in (0.0, 0.3, 1.0):
        problem = contrastive.make(9, alphas=[alpha], **choices)
        for rows, size in ((512, 1 << 22), (64, 1 << 12), (1, 1 << 9), (33, 1), (131, 600)):
            walk(rows, size)
            assert_rule(problem.judge("cpu"), f"{problem.label} {rows} {size}")


def test_both_passes_see_the_same_bits(walk):
    """With one column and one row the softmax is 1: any other bit of S in pass 2 would show."""
    walk(16, 1 << 10)
    a, b = torch.randn(300, 40), torch.randn(300, 40)
    with tinyclip.backend("cpu"):
        for row in range(0, 300, 37):
            stats = ops.contrastive_stats(a[row : row + 1], b[row : row + 1], 70.0)
            da, db, dscale = ops.contrastive_grads(
                a[row : row + 1], b[row : row + 1], 70.0, stats, row_weight=1.0, col_weight=2.0
            )
            assert (da == 0).all() and (db == 0).all() and dscale == 0


def test_all_negative_in_a_ragged_last_tile(walk):
    """Padding that counted as 0 would drown logits of -1000."""
    walk(16, 1 << 8)
    x = F.normalize(torch.ones(37, 5), dim=1).requires_grad_()
    y = -x.detach()
    with tinyclip.backend("cpu"):
        value = ops.contrastive_loss(x, y, 1000.0)
        value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(math.log(37)))
    assert x.grad.abs().max() < 1e-3


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "two_passes"])
def test_identities(kept, walk):
    if not kept:
        walk(16, 1 << 9)
    with tinyclip.backend("cpu"):
        same = F.normalize(torch.ones(33, 8), dim=1)
        torch.testing.assert_close(
            ops.contrastive_loss(same, same, 100.0), torch.tensor(math.log(33))
        )
        one = same[:1].clone().requires_grad_()
        value = ops.contrastive_loss(one, same[:1], 100.0)
        value.backward()
        assert value == 0
        assert (one.grad == 0).all()
        x, y = (F.normalize(torch.randn(90, 16), dim=1).requires_grad_() for _ in range(2))
        teacher = tinyclip.Teacher(x.detach(), y.detach(), 20.0)
        ops.contrastive_loss(x, y, 20.0, teacher=teacher, alpha=1.0).backward()
        assert (x.grad == 0).all(), "a student that is its teacher has nothing to learn"
        assert (y.grad == 0).all()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "two_passes"])
def test_symmetries(kept, walk):
    """Swapping towers and permuting pairs move gradients and change nothing else."""
    if not kept:
        walk(16, 1 << 9)
    x, y, tx, ty = (F.normalize(torch.randn(70, 12), dim=1).double() for _ in range(4))
    order = torch.randperm(70)

    def run(x, y, tx, ty):
        x, y = (z.clone().requires_grad_() for z in (x, y))
        scale = torch.tensor(15.0, dtype=torch.float64, requires_grad=True)
        teacher = tinyclip.Teacher(tx, ty, 9.0)
        value = ops.contrastive_loss(x, y, scale, teacher=teacher, alpha=0.3)
        return value.detach(), *torch.autograd.grad(value, (x, y, scale))

    with tinyclip.backend("cpu"):
        value, dx, dy, dscale = run(x, y, tx, ty)
        swapped = run(y, x, ty, tx)
        mixed = run(*(z[order] for z in (x, y, tx, ty)))
    for found, wanted in zip(swapped, (value, dy, dx, dscale), strict=True):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip(mixed, (value, dx[order], dy[order], dscale), strict=True):
        torch.testing.assert_close(found, wanted)


def test_nan_is_not_swallowed():
    for row in (0, 17, 39):
        image, text = (F.normalize(torch.randn(40, 8), dim=1) for _ in range(2))
        image[row, 3] = float("nan")
        for grad in (False, True):
            with tinyclip.backend("cpu"):
                assert ops.contrastive_loss(image.requires_grad_(grad), text, 9.0).isnan()


@pytest.mark.parametrize("column", [2**31 - 3, 2**31, 2**32])
def test_a_tile_that_lies_past_two_to_the_thirty_first(column):
    """Statistics of 2**32 columns are 86 GB apart in address, and a few pages of memory."""
    extension, m, width = _extension.load(), 5, 33
    total = column + width
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        room = mmap.mmap(-1, 5 * total * 4, flags=reserve)
    except OSError as error:
        pytest.skip(f"no address space to reserve: {error}")
    stats = torch.frombuffer(room, dtype=torch.float32).view(5, total)
    cosines = torch.randn(m, width)
    rows, positive = torch.zeros(5, m), torch.full((m,), float("nan"))
    workspace = torch.empty(extension.contrastive_workspace("float32", m, width), dtype=torch.uint8)
    offset = column + 4
    problem = ("float32", (m, total, offset), (0, column, m, width))
    machine = ((workspace.data_ptr(), workspace.numel()), 1)
    kept = (rows.data_ptr(), stats.data_ptr())
    logits = ((cosines.data_ptr(), width), 2.0, None)
    rows[0], rows[1] = -1e30, 0.0  # of earlier columns: nothing yet
    extension.contrastive_stats(*problem, *logits, *kept, positive.data_ptr(), *machine)
    s = 2 * cosines
    assert torch.equal(positive, s.diagonal(4))
    torch.testing.assert_close(rows[0] + rows[1].log(), s.logsumexp(1))
    here = stats[:2, column:]
    torch.testing.assert_close(here[0] + here[1].log(), s.logsumexp(0))
    weight, dscale = torch.ones(1), torch.zeros(1, dtype=torch.float64)
    weights = ((weight.data_ptr(), 0), (weight.data_ptr(), 0))
    extension.contrastive_grads(
        *problem, *logits, 0.0, *kept, *weights, dscale.data_ptr(), *machine
    )
    wanted = s.softmax(1) + s.softmax(0)
    wanted.diagonal(4).sub_(2.0)
    torch.testing.assert_close(cosines, wanted)
    del stats, here
    room.close()


@pytest.mark.parametrize("m", [3000, pytest.param(46_400, marks=pytest.mark.soak)])
def test_more_logits_than_an_int_counts(m):
    """M = N = 46,400: 2.15e9 logits against fp64 in chunks of rows, by the tolerance rule."""
    torch.manual_seed(0)
    scale = 20.0
    x, y = (F.normalize(torch.randn(m, 8), dim=1).requires_grad_() for _ in range(2))
    with tinyclip.backend("cpu"):
        value = ops.contrastive_loss(x, y, scale)
        dx, dy = torch.autograd.grad(value, (x, y))
    xd, yd = x.detach().double(), y.detach().double()
    chunks = torch.arange(m).split(800)
    by_column = torch.full((m,), -math.inf, dtype=torch.float64)
    by_row = torch.empty(m, dtype=torch.float64)
    for rows in chunks:
        s = scale * xd[rows] @ yd.T
        by_row[rows] = s.logsumexp(1)
        by_column = torch.logaddexp(by_column, s.logsumexp(0))
    positive = scale * (xd * yd).sum(1)
    wanted = (0.5 * (by_row + by_column) - positive).mean()
    torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-6, atol=0)
    truth = {name: torch.zeros_like(xd) for name in ("dx", "dy")}
    cond = {name: torch.zeros_like(xd) for name in ("dx", "dy")}
    for rows in chunks:
        s = scale * xd[rows] @ yd.T
        ds = (s - by_row[rows, None]).exp() + (s - by_column).exp()
        for into, target, left, right in ((truth, -2, xd, yd), (cond, 2, xd.abs(), yd.abs())):
            signed = ds.clone()
            signed[torch.arange(len(rows)), rows] += target
            signed *= scale * 0.5 / m
            into["dx"][rows] = signed @ right
            into["dy"] += signed.T @ left[rows]
    eps = torch.finfo(torch.float32).eps
    for name, found in (("dx", dx), ("dy", dy)):
        bound = 2 * eps * (truth[name].norm() + (8 + scale) * cond[name].norm())
        ratio = ((found.double() - truth[name]).norm() / bound).item()
        print(f"{name}: error / bound {ratio:.2f}")
        assert ratio <= 1, name


def test_the_cache_decides_the_tile():
    assert _extension.load().second_level_cache() >= 0
    assert 2 << 20 <= _cpu._tile_bytes() <= 8 << 20
