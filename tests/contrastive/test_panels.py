"""The walk that both GPU engines share, with tiles in plain PyTorch: against the C++ engine."""

import math

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support import contrastive_block
from tests.support.rule import Tally
from tinyclip import _extension, ops
from tinyclip.ops import _contracts, _panels

pytestmark = pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not()))


class Plain:
    """What a backend brings, tile by tile as its kernels would: the numbers of `Kernels`."""

    one_dtype = False
    tiles = (32, 64)

    @staticmethod
    def tile(kind, dtype, teacher):
        return Plain.tiles

    @staticmethod
    def features(x):
        """Padded, as a kernel may ask for."""
        return F.pad(x, (0, -x.shape[1] % 8))

    @staticmethod
    def _cut(panel):
        s = panel.scale * (panel.a.float() @ panel.b.float().T)
        t = None if panel.ta is None else panel.t_scale * (panel.ta.float() @ panel.tb.float().T)
        down, across = Plain.tiles
        for i, top in enumerate(range(0, s.shape[0], down)):
            for j, left in enumerate(range(0, s.shape[1], across)):
                rows, cols = slice(top, top + down), slice(left, left + across)
                yield i, j, rows, cols, s[rows, cols], None if t is None else t[rows, cols]

    @staticmethod
    def _reduce(s, t, dim):
        m = s.amax(dim)
        centred = s - m.unsqueeze(dim)
        numbers = [m, centred.exp().sum(dim)]
        if t is not None:
            m_t = t.amax(dim)
            weight = (t - m_t.unsqueeze(dim)).exp()
            numbers += [m_t, weight.sum(dim), (weight * centred).sum(dim)]
        return torch.stack(numbers)

    @staticmethod
    def stats(panel, rows, cols, positive, parts, first):
        height, width = len(panel.a), len(panel.b)
        for i, j, r, c, s, t in Plain._cut(panel):
            parts.rows[j, :, :height][:, r] = Plain._reduce(s, t, 1)
            parts.cols[i, :, :width][:, c] = Plain._reduce(s, t, 0)
            for row in range(*r.indices(height)):
                if c.start <= row + panel.diagonal < min(c.stop, width):
                    positive[row] = s[row - r.start, row + panel.diagonal - c.start]
        down, across = math.ceil(height / Plain.tiles[0]), math.ceil(width / Plain.tiles[1])
        sides = ((parts.rows, rows, across, first[0]), (parts.cols, cols, down, first[1]))
        for part, into, count, fresh in sides:
            size, numbers = into.shape[1], part.shape[1]
            all_parts = [*(() if fresh else (into[:numbers].clone(),)), *part[:count, :, :size]]
            stacked = torch.stack(all_parts)
            m = stacked[:, 0].amax(0)
            share = (stacked[:, 0] - m).exp()
            into[0], into[1] = m, (share * stacked[:, 1]).sum(0)
            if numbers == 5:
                m_t = stacked[:, 2].amax(0)
                share = (stacked[:, 2] - m_t).exp()
                into[2], into[3] = m_t, (share * stacked[:, 3]).sum(0)
                into[4] = (share * (stacked[:, 4] + stacked[:, 3] * (stacked[:, 0] - m))).sum(0)

    @staticmethod
    def grads(panel, rows, cols, weights, alpha, ds, dscale):
        count = 0
        for _, _, r, c, s, t in Plain._cut(panel):
            tile = torch.zeros_like(s)
            for table, w, at, dim in ((rows, weights[0], r, 1), (cols, weights[1], c, 0)):
                m, l, m_t, l_t, _ = (x.unsqueeze(dim) for x in table[:, at])  # noqa: E741
                hit = torch.zeros_like(s)
                hit.diagonal(panel.diagonal + r.start - c.start).fill_(1 - alpha * (t is not None))
                pull = (s - m).exp() / l - hit
                if t is not None:
                    pull -= alpha * (t - m_t).exp() / l_t
                tile += w[at].unsqueeze(dim) * pull
            ds[r, c] = tile.to(ds.dtype)
            dscale[count] = (tile * s).sum() / panel.scale
            count += 1
        assert count == len(dscale)


@pytest.fixture(autouse=True)
def _plain(monkeypatch, poisoned):
    """Put the walk over `Plain` in the place of `cpu`."""
    torch.manual_seed(8)

    def use(small):
        for name in ("contrastive_stats", "contrastive_grads"):
            walk = getattr(_panels, name)
            monkeypatch.setitem(
                _contracts._loaded, (name, "cpu"), lambda *args, walk=walk: walk(Plain, *args)
            )
        monkeypatch.setattr(_panels, "STATS_PANEL", 128 if small else 8192)
        monkeypatch.setattr(_panels, "GRADS_PANEL_BYTES", (128 if small else 4096) ** 2 * 4)

    return use


def test_the_rule(_plain):
    """Offsets, weights, sides that are off, teachers, 16 bit: panels of 128, and one panel."""
    tally = Tally()
    for seed in range(60):
        drawn = contrastive_block.make(
            seed,
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            sizes=(1, 2, 17, 64, 127, 128, 129, 300),
            widths=(1, 7, 32, 100),
            regimes=("normal", "integers", "negative", "constant", "one_hot"),
            rounded_ds=True,
        )
        _plain(seed % 3 > 0)
        tally.add(drawn.label, drawn.judge("cpu"))
    print(f"{len(tally.worst)} problems, worst error / bound {max(tally.worst)[0]:.2f}")
    tally.verdict()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(default, _plain):
    """Sums are in fp32, whatever a library has set while it loads a model."""
    _plain(True)
    a, b = (torch.randn(200, 16).to(torch.float16) for _ in range(2))

    def gradients():
        image, text = a.clone().requires_grad_(), b.clone().requires_grad_()
        with tinyclip.backend("cpu"):
            tinyclip.ops.contrastive_loss(image, text, 0.5).backward()
        return image.grad, text.grad

    plain = gradients()
    torch.set_default_dtype(default)
    try:
        found = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_of_any_size(dtype, magnitude, _plain):
    """dS of a wrong pair reaches four units: fp16 holds them, and its smallest parts too."""
    _plain(True)
    a = F.normalize(torch.randn(150, 16), dim=1).to(dtype)
    b = -a
    with tinyclip.backend("cpu"):
        stats = ops.contrastive_stats(a, b, 60.0)
        weights = {"row_weight": 0.999 * magnitude, "col_weight": 0.999 * magnitude}
        found = ops.contrastive_grads(a, b, 60.0, stats, **weights)[2]
    with tinyclip.backend("reference"):
        exact = (a.double(), b.double(), 60.0)
        wanted = ops.contrastive_grads(*exact, ops.contrastive_stats(*exact), **weights)[2]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)
    with tinyclip.backend("cpu"):
        da, _, _ = ops.contrastive_grads(a, b, 60.0, stats, **weights)
    assert not (da.isnan().any() or (magnitude == 1 and da.isinf().any()))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 8192, 8193, 20_000, 1 << 20])
@pytest.mark.parametrize("tile", [64, 128])
def test_edges(size, tile):
    """Whole tiles but for the last, nothing twice, nothing left out, at most 8,192."""
    found = _panels.edges(size, 8192, tile)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found)][: len(found)]
    assert found[-1][1] == size
    assert all(start % tile == 0 and 0 < stop - start <= 8192 for start, stop in found)
    assert len(found) == -(-size // 8192)
