"""The Triton GELU-MLP under the interpreter, fused and pointwise: the tolerance rule and edges."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import tinyclip
from tests.support import gelu_mlp
from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM
from tests.support.rule import Tally, assert_rule
from tinyclip import ops
from tinyclip.ops.gelu_mlp import ACTIVATIONS
from tinyclip.triton_kernels import gelu_mlp as kernels
from tinyclip.triton_kernels import gelu_mlp_pointwise
from tinyclip.triton_kernels.activations import activate, activate_with_slope
from tinyclip.triton_kernels.gelu_mlp import IMPLEMENTATIONS, Tile
from tinyclip.triton_kernels.gelu_mlp_fused import _place, plan_gelu_mlp_fwd

pytestmark = pytest.mark.usefixtures("poisoned", "interpreter")

CHOICES = {
    "rows": (1, 1, 7, 7, 50, 50, 50, 77, 77, 197, 400),  # the long ones are slow: less often
    "widths": (21, 32, 48, 64, 77, 100, 192, 256, 301, 384),
    "dtypes": (torch.float32, torch.float16),  # the interpreter has no bf16 products
}
SEEDS = range(440)
PARTS = 8
# One program a tile and several tiles a program, a whole epilogue and one in parts, odd groups.
FUSED = (
    Tile("fused", 128, 128, 64, 8, 8, 3, 0, 8, 128),
    Tile("fused", 64, 64, 32, 3, 4, 2, 1, 1),
    Tile("fused", 32, 128, 64, 2, 4, 2, 3, 2),
)
LARGE = Tile("fused", 256, 128, 128, 2, 8, 2, 1, 2)  # what is quick to interpret
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(monkeypatch):
    """Make the next calls compute with one implementation, and one tile where it has one."""

    def choose(implementation, number=0, large=False):
        tile = Tile("pointwise")
        if implementation == "fused":
            tile = LARGE if large else FUSED[number % len(FUSED)]
        monkeypatch.setattr(gelu_mlp_pointwise, "BWD_ROWS", 64 if large else 8)
        monkeypatch.setattr(gelu_mlp_pointwise, "FWD_ROWS", 128 if large else 16)
        monkeypatch.setattr(kernels, "choose", lambda key, milliseconds: tile)
        return tile

    return choose


@pytest.mark.parametrize("part", range(PARTS))
def test_the_rule(part, use):
    tally = Tally()
    for seed in SEEDS[part::PARTS]:
        problem = gelu_mlp.make(seed, **CHOICES)
        x, w1 = problem.tensors["x"], problem.tensors["fc1_weight"]
        implementation = IMPLEMENTATIONS[seed // PARTS % 2]
        tile = use(implementation, seed // (2 * PARTS), x.numel() // x.shape[-1] * len(w1) > 20_000)
        tally.add(f"{problem.label} {tile}", problem.judge("triton"))
    tally.verdict()


@every_implementation
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_fp16_gradient_comes_back_into_range(activation, implementation, use):
    use(implementation)
    problem = gelu_mlp.beyond_fp16(activation)
    assert_rule(problem.judge("triton"), problem.label)


def test_every_value_is_drawn():
    words = Counter()
    for seed in SEEDS:
        problem = gelu_mlp.make(seed, **CHOICES)
        tensors = problem.tensors
        words.update(problem.label.split())
        words[f"rows {tensors['x'].shape[-2]}"] += 1
        words.update(problem.label.split()[-1].split("-"))
        words.update(f"frozen {name}" for name in problem.frozen)
        words.update(f"no {name}" for name, tensor in tensors.items() if tensor is None)
    wanted = [f"rows {n}" for n in CHOICES["rows"]]
    wanted += [f"{letter}{n}" for n in CHOICES["widths"] for letter in "CFO"]
    wanted += [*REGIMES, *LAYOUTS, *UPSTREAM, *ACTIVATIONS]
    wanted += [f"{x}/{w}" for x in CHOICES["dtypes"] for w in (torch.float32, x)]
    wanted += ["no fc1_bias", "no fc2_bias", "no hidden_gate"]
    wanted += [f"frozen {name}" for name in gelu_mlp.make(0).tensors]
    rare = {word: words[word] for word in wanted if words[word] < 10}
    assert not rare, rare


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_integers_are_bitwise(implementation, dtype, gated, use):
    """Relu on small integers rounds nowhere: y and every gradient are the fp64 ones, to the bit."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, most=1):
        return torch.randint(-most, most + 1, shape, generator=generator).to(dtype).requires_grad_()

    inputs = [draw(70, 24, most=2), draw(150, 24), draw(150), draw(36, 150), draw(36)]
    gate = draw(150) if gated else None
    dy = draw(70, 36).detach()
    wanted = [*inputs, gate] if gated else inputs

    def run(backend, wanted):
        *inputs, last = wanted if gated else [*wanted, None]
        with tinyclip.backend(backend):
            y = ops.gelu_mlp(*inputs, activation="relu", hidden_gate=last)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]

    truth = run("reference", [t.detach().double().requires_grad_() for t in wanted])
    for number in range(len(FUSED)):
        use(implementation, number)
        for found, exact in zip(run("triton", wanted), truth, strict=True):
            assert exact.norm() > 0
            assert torch.equal(found.double(), exact)


@triton.jit
def _activations(x_ptr, value_ptr, both_ptr, slope_ptr, N: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(value_ptr + at, activate(x, KIND))
    value, slope = activate_with_slope(x, KIND)
    tl.store(both_ptr + at, value)
    tl.store(slope_ptr + at, slope)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_extremes(kind):
    """Value and slope, to the last bits of fp32 or of PyTorch's own; the limits at infinity."""
    tiny = torch.finfo(torch.float32).smallest_normal
    extremes = [20.0, -20.0, 0.0, -0.0, tiny / 4, -tiny / 4, 1e4, -1e4, 3e38, -3e38]
    x = torch.cat([torch.tensor(extremes), torch.linspace(-12, 12, 1024 - len(extremes) - 3)])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])
    value, both, slope = (torch.full_like(x, math.nan) for _ in range(3))
    _activations[(1,)](x, value, both, slope, len(x), kind)
    assert torch.equal(value[:-1], both[:-1])
    assert value[-1].isnan()
    assert both[-1].isnan()

    exact = x[:-3].double().requires_grad_()
    truth = gelu_mlp.activation(kind, exact)
    (rise,) = torch.autograd.grad(truth.sum(), exact)
    assert (value[:-3].double() - truth).abs().max() <= 3e38 * 2e-7
    ordinary = exact.detach().abs() <= 20
    for ours, theirs in ((value[:-3], truth), (slope[:-3], rise)):
        error = (ours.double() - theirs).abs()[ordinary]
        assert (error <= 1e-6 + 1e-6 * theirs.abs()[ordinary]).all(), error.max()
    zero = torch.tensor(0.0)
    assert torch.equal(value[4:6], gelu_mlp.activation(kind, exact[4:6]).float().detach())
    assert torch.signbit(value[3]) or kind == "relu"
    # Far out act(x) is x or 0 and the slope 1 or 0, not one bit beside; so at infinity.
    for far, expected in ((6, 1.0), (7, 0.0), (8, 1.0), (9, 0.0)):
        assert slope[far] == expected
        assert value[far] == (x[far] if expected else zero)
    assert value[-3] == math.inf
    assert value[-2] == 0
    assert (slope[-3], slope[-2]) == (1.0, 0.0)


@every_implementation
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extremes_through_the_op(implementation, kind, dtype, use):
    use(implementation, 1)
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = [20.0, -20.0, 0.0, -0.0, tiny, -tiny, 1e-3, -5.0, math.inf, -math.inf]
    x = torch.tensor(values, dtype=dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    with tinyclip.backend("triton"):
        y = ops.gelu_mlp(x, one, None, one, None, activation=kind)
        (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach()[:-2].double().requires_grad_()
    truth = gelu_mlp.activation(kind, exact)
    (rise,) = torch.autograd.grad(truth.sum(), exact)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y[:-2].double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx[:-2].double(), rise, rtol=tolerance, atol=tolerance)
    assert (y[-2], dx[-2], dx[-1]) == (math.inf, 1.0, 0.0)
    assert y[-1] == 0


def _kept(call, *parameters):
    """Bytes of the distinct storages that a call keeps for backward, `parameters` left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(size for address, size in storages.items() if address not in known)


@every_implementation
@pytest.mark.parametrize("kind,most", [("gelu", 0.56), ("quick_gelu", 0.39)])
def test_what_is_kept_for_backward(implementation, kind, most, use):
    """x and the pre-activation, against what Linear, activation, Linear keep, F = 4 C."""
    use(implementation)
    x = torch.randn(150, 64, dtype=torch.float16, requires_grad=True)
    parameters = [
        torch.randn(shape, dtype=torch.float16, requires_grad=True)
        for shape in ((256, 64), (256,), (64, 256), (64,))
    ]
    w1, b1, w2, b2 = parameters

    def eager():
        return F.linear(gelu_mlp.activation(kind, F.linear(x, w1, b1)), w2, b2)

    def ours():
        with tinyclip.backend("triton"):
            return ops.gelu_mlp(x, *parameters, activation=kind)

    kept = _kept(ours, *parameters)
    assert kept == 150 * (64 + 256) * 2
    assert kept <= most * _kept(eager, *parameters)


@every_implementation
def test_no_product_for_a_gradient_nobody_wants(implementation, use, monkeypatch):
    """With the first layer and x frozen, dhidden is not formed; with all frozen, nothing runs."""
    use(implementation)
    x, w1, w2 = torch.randn(50, 32), torch.randn(48, 32), torch.randn(32, 48)
    dy, pre = torch.randn(50, 32), torch.randn(50, 48)
    monkeypatch.setattr(kernels, "_down", None)
    *none, dw2, db2, dgate = kernels.gelu_mlp_bwd(
        dy, x, pre, w1, w2, None, "gelu", [False, False, False, True, True, False]
    )
    assert all(g.numel() == 0 for g in (*none, dgate))
    torch.testing.assert_close(dw2, dy.T @ F.gelu(pre))
    torch.testing.assert_close(db2, dy.sum(0))
    monkeypatch.setattr(kernels, "plan_pointwise_fwd", None)
    assert not any(
        g.numel() for g in kernels.gelu_mlp_bwd(dy, x, pre, w1, w2, None, "gelu", [False] * 6)
    )


def test_the_table_decides(monkeypatch):
    """Everything unmeasured is pointwise; a fused row that fits first would be taken."""
    key = kernels.Kind("fwd", 90, 16, 51200, 768, 3072, None)
    assert kernels.shipped(key).implementation == "pointwise"
    assert kernels.shipped(key._replace(only="fused")).implementation == "fused"
    fused = {"kind": "fwd", "bits": 16, "at_least": [1000, 512, 2048], "tile": ["fused"]}
    assert key.fits(fused)
    assert not key._replace(rows=999).fits(fused)
    assert not key._replace(k=477).fits(fused)  # rows that are not 16-byte aligned
    told = r"implementation must be one of .* got 'magic'"
    with pytest.raises(ValueError, match=told), kernels.only("magic"):
        pass
    with kernels.only("fused"):
        chosen = kernels._chosen("fwd", torch.empty(50, 64), 128, None)
    assert chosen.implementation == "fused"


def test_tiles_are_walked_once():
    """The numbering of tiles, whatever the group: every tile of the product, each once."""
    for m, n in ((1, 1), (5, 3), (9, 2)):
        for group in (1, 3, 8):
            tile = Tile("fused", 16, 16, 16, group, 4, 1)
            x, w = torch.ones(m * 16, 16), torch.ones(n * 16, 16)
            out = torch.full((m * 16, n * 16), math.nan)
            plan_gelu_mlp_fwd(x, w, None, None, "relu", out, torch.empty_like(out), tile).run(x)
            assert (out == 16).all()


@triton.jit
def _start(out_ptr, first_row, first_column, M, N):
    start, _, _, _, _ = _place(first_row, first_column, M, N, tl.zeros([16, 16], tl.float32))
    tl.store(out_ptr, start)


def test_tiles_beyond_2_to_the_31_elements():
    """Where a tile starts is 64 bit; rows too far apart for 32 bits inside a tile are copied."""
    start = torch.zeros(1, dtype=torch.int64)
    _start[(1,)](start, 2**20, 64, 2**21, 4096)
    assert start.item() == 2**32 + 64
    x, w = torch.empty(2**20, 64, device="meta"), torch.empty(4096, 64, device="meta")
    pre = torch.empty(2**20, 4096, device="meta")
    launch = plan_gelu_mlp_fwd(x, w, None, None, "gelu", pre, pre, FUSED[0])
    assert launch.programs == 2**20 // 128 * 32  # on grid axis 0, whose limit is 2^31 - 1
    far = torch.empty_strided((2, 64), (2**24, 1), device="meta")
    launch = plan_gelu_mlp_fwd(far, w, None, None, "gelu", pre, pre, FUSED[0])
    assert launch.arguments["stride_x"] == 64
