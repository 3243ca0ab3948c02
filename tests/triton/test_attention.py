"""The Triton attention kernels under the interpreter: the tolerance rule on seeded problems."""

from collections import Counter
from functools import partial

import pytest
import torch

import tinyclip
from tests.support import attention
from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM
from tests.support.rule import Tally, assert_rule
from tinyclip import ops
from tinyclip.triton_kernels import attention_bwd, attention_fwd
from tinyclip.triton_kernels.tuning import Tile, table

pytestmark = pytest.mark.usefixtures("poisoned", "interpreter")

CHOICES = {
    "lengths": (1, 2, 17, 49, 50, 77, 97, 197, 257),
    "dims": (16, 21, 32, 40, 48, 64, 72, 80, 96, 128),
    "dtypes": (torch.float32, torch.float16),  # the interpreter has no bf16 products
    "batches": (1, 2),
    "heads": (1, 2),
}
SEEDS = range(440)
# Every tile of the table: with main tiles of 16 there are no tails, with 64 there are both.
TILES = sorted({Tile(*row["tile"])[:2] for row in table()})
PARTS = 2
_packed = partial(attention.make, packed=True)


def _keys(drawn):
    """How many keys a problem has."""
    return drawn.tensors["qkv" if "qkv" in drawn.tensors else "k"].shape[1]


def problem(seed):
    """Every third problem is packed."""
    return (_packed if seed % 3 == 0 else attention.make)(seed, **CHOICES)


@pytest.fixture
def tiled(monkeypatch):
    """Make the launches use tile number n of the table, of those not too small for the length."""

    def use(number, length):
        tiles = [tile for tile in TILES if length <= 6 * min(tile)]
        tile = Tile(*tiles[number % len(tiles)], 4, 1)
        for module in (attention_fwd, attention_bwd):
            monkeypatch.setattr(module, "choose", lambda key, milliseconds: tile)

    return use


@pytest.mark.parametrize("part", range(PARTS))
def test_the_rule(part, tiled):
    tally = Tally()
    for seed in SEEDS[part::PARTS]:
        drawn = problem(seed)
        tiled(seed // PARTS, max(drawn.douts[0].shape[1], _keys(drawn)))
        tally.add(drawn.label, drawn.judge("triton"))
    tally.verdict()


def test_every_value_is_drawn():
    words = Counter()
    for seed in SEEDS:
        drawn = problem(seed)
        shape = drawn.label.split(" B")[1].split()[0]  # 2-Lq50-Lk77-H1-D64
        words.update([*drawn.label.split(), *shape.split("-")])
        words.update(f"frozen {name}" for name in drawn.frozen)
        gate = drawn.tensors["head_gate"]
        words[f"gate {None if gate is None else gate.dim()}"] += 1
    wanted = [f"Lq{n}" for n in CHOICES["lengths"]] + [f"D{n}" for n in CHOICES["dims"]]
    wanted += [*REGIMES, *LAYOUTS, *UPSTREAM, "causal", "mask", "gate None", "gate 1", "gate 2"]
    wanted += ["torch.float32", "torch.float16", "frozen q", "frozen qkv", "frozen head_gate"]
    rare = {word: words[word] for word in wanted if words[word] < 10}
    assert not rare, rare


@pytest.mark.parametrize("length", [1, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 81, 96, 97, 129])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_tiles(length, causal, tiled):
    """Off by one at every edge of main tiles and tails, self and against one key more."""
    options = {"dims": [16], "regimes": ["normal"], "lengths": [length], "batches": [1]}
    for seed in range(40):
        drawn = attention.make(seed, **{**CHOICES, **options})
        if drawn.options["causal"] == causal:
            break
    drawn.frozen = frozenset()
    for number in range(len(TILES)):
        tiled(number, 1)
        assert_rule(drawn.judge("triton"), f"{drawn.label} {TILES[number]}")


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_no_key(causal):
    """Whatever it holds, and whatever comes back to it; also where one tile is the whole head."""
    for length in (70, 40):
        _blind(causal, length)


def _blind(causal, length):
    q, k, v, dout = (torch.randn(3, length, 2, 16) for _ in range(4))
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0] = False
    mask[1, : length - 4] = False
    blind = torch.zeros(3, length, dtype=torch.bool)
    blind[0] = True
    blind[1, : length - 4] = causal
    q[blind], dout[blind] = float("nan"), float("inf")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with tinyclip.backend("triton"):
        out = ops.attention(q, k, v, causal=causal, key_mask=mask)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert (out[blind] == 0).all()
    assert (grads[0][blind] == 0).all()
    assert (grads[1][~mask] == 0).all()
    assert (grads[2][~mask] == 0).all()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [50, 77])
def test_integers_are_bitwise(dtype, length):
    """One visible key: out is its value, dV the sum of the upstream gradients, dQ and dK are 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-8, 9, shape, generator=generator).to(dtype)

    q, k, v = (draw(2, length, 2, 16).requires_grad_() for _ in range(3))
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[:, length - 1] = True
    dout = draw(2, length, 2, 16)
    with tinyclip.backend("triton"):
        out = ops.attention(q, k, v, key_mask=mask)
    assert torch.equal(out, v[:, -1:].expand_as(out))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(dv[:, -1], dout.double().sum(dim=1).to(dtype))
    assert not dv[:, :-1].any()
    assert not dq.any()
    assert not dk.any()


def test_a_visible_nan_stays_in_its_batch_and_head():
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in range(3))
    k[1, 68, 0, 3] = float("nan")
    with tinyclip.backend("triton"):
        out = ops.attention(q, k, v)
    assert out[1, :, 0].isnan().all()
    out[1, :, 0] = 0
    assert not out.isnan().any()


def test_many_heads_stay_on_grid_axis_0():
    """More than 65,535 programs, the limit of axes 1 and 2, run under one axis."""
    q = torch.empty(4096, 5, 20, 16, device="meta", dtype=torch.float16)
    stats = torch.empty(2, 4096, 20, 5, device="meta")
    launch = attention_fwd.plan_attention_fwd(
        q, q, q, q, stats, None, None, False, 0.25, Tile(64, 64, 4, 2)
    )
    assert launch.programs == 4096 * 20


def test_rows_too_far_apart_are_copied():
    """Offsets inside a tile are 32 bit: a stride that would leave them is taken off the tensor."""
    far = torch.empty_strided((1, 2, 1, 16), (16, 2**24, 16, 1), device="meta")
    near = torch.empty(1, 2, 1, 16)
    assert attention_fwd.near(far).stride(1) == 16
    assert attention_fwd.near(near) is near
