"""The extension's passes over rows: the rule, the same bits everywhere, extremes, far rows."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tinyclip
from tests.support import gelu_mlp, layer_norm
from tests.support.rule import Tally
from tinyclip import _extension, ops
from tinyclip.ops import _cpu
from tinyclip.ops.gelu_mlp import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(_extension.load() is None, reason=str(_extension.why_not())),
]
MAKERS = {"gelu_mlp": gelu_mlp.make, "layer_norm": layer_norm.make}
PROBLEMS = 400
# Lanes and what is left of them, in both types and at twice the width that sums are taken at.
WIDTHS = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 100, 257)


def problem_of(op: str, seed: int, dtype=torch.float32):
    widths = {"widths": WIDTHS} if seed % 2 else {}
    return MAKERS[op](seed, dtypes=[dtype], **widths)


@pytest.mark.parametrize("op", MAKERS)
def test_the_rule(op):
    tally = Tally()
    for seed in range(PROBLEMS):
        problem = problem_of(op, seed)
        tally.add(problem.label, problem.judge("cpu"))
    tally.verdict()


@pytest.mark.parametrize("op", MAKERS)
def test_fp64_is_the_reference_to_the_last_bits(op):
    for seed in range(80):
        problem = problem_of(op, seed, torch.float64)
        if "large" in problem.label:
            continue  # where statistics of 1e4 cancel, no two orders of summation agree
        ours, truth = problem.ours("cpu"), problem.ours("reference")
        for name, tensor in ours.items():
            scale = truth[name].abs().max().item() if tensor.numel() else 0.0
            torch.testing.assert_close(
                tensor, truth[name], rtol=1e-10, atol=1e-10 * scale + 1e-300, msg=problem.label
            )


@pytest.mark.parametrize(
    ("op", "isa", "other"),
    [
        ("layer_norm", "baseline", "best"),
        ("layer_norm", "avx2", "best"),
        # An activation's products are added to without rounding where that is one instruction.
        ("gelu_mlp", "avx2", "avx512"),
    ],
)
def test_instruction_sets_compute_the_same_bits(op, isa, other, monkeypatch):
    """The lanes are as many, whatever the width of a register."""
    for choice in (isa, other):
        if choice not in ("best", *_extension.load().isas()):
            pytest.skip(f"this processor has no {choice}")
    for seed in range(60):
        problem = problem_of(op, seed, (torch.float32, torch.float64)[seed % 2])
        found = {}
        for choice in (isa, other):
            monkeypatch.setattr(_cpu, "ISA", choice)
            found[choice] = problem.ours("cpu")
        for name, tensor in found[other].items():
            assert torch.equal(tensor, found[isa][name]), (problem.label, name)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_rule_without_the_widest_registers(isa, monkeypatch):
    if isa not in _extension.load().isas():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(_cpu, "ISA", isa)
    tally = Tally()
    for seed in range(200):
        problem = problem_of("gelu_mlp", seed)
        tally.add(problem.label, problem.judge("cpu"))
    tally.verdict()


def _gradients(rows: int, width: int):
    """Every output of every pass over a problem of that size, with a mask and a gate."""
    torch.manual_seed(3)
    x, residual, dy = torch.randn(3, rows, width)
    vector, mask = torch.randn(width), torch.rand(width) < 0.7
    leaves = [t.requires_grad_() for t in (x, vector, vector.clone(), residual)]
    with tinyclip.backend("cpu"):
        y, total = ops.layer_norm(*leaves[:3], residual=residual, channel_mask=mask)
    norm = [y, total, *torch.autograd.grad((y, total), leaves, (dy, dy))]
    extension = _extension.load()
    hidden, dpre = torch.empty_like(dy), dy.clone()
    sums = torch.empty(2, width)
    shape, threads = (rows, width), torch.get_num_threads()
    addresses = [t.data_ptr() for t in (x, vector, dpre, hidden, *sums)]
    extension.activation_backward("float32", "gelu", shape, *addresses, threads)
    return [*norm, hidden, dpre, sums]


@pytest.mark.parametrize("rows", [1, 15, 16, 33, 500, 513, 1031])
def test_every_number_of_threads_computes_the_same_bits(rows):
    """A block's sums are its own, and blocks are added up in their order."""
    usual, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(_gradients(rows, 259))
    finally:
        torch.set_num_threads(usual)
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)


@pytest.mark.parametrize("rows", [513, 4099])
def test_column_sums_of_many_rows(rows):
    """Integers, whose sums round nowhere: no block is left out, none counts twice."""
    pre, dhidden = torch.randint(1, 4, (rows, 300)).float(), torch.randint(-3, 4, (rows, 300))
    dpre, gate = dhidden.float(), torch.full((300,), 2.0)
    hidden, dbias, dgate = torch.empty_like(pre), torch.empty(300), torch.empty(300)
    addresses = [t.data_ptr() for t in (pre, gate, dpre, hidden, dbias, dgate)]
    _extension.load().activation_backward("float32", "relu", (rows, 300), *addresses, 2)
    assert torch.equal(hidden, 2 * pre)
    assert torch.equal(dpre, 2.0 * dhidden)
    assert torch.equal(dbias, 2.0 * dhidden.sum(0))
    assert torch.equal(dgate, (dhidden * pre).sum(0))


def _activation(kind: str, x: torch.Tensor, isa: str):
    """Value and slope as the extension computes them."""
    name = str(x.dtype).removeprefix("torch.")
    value, both, slope = torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    call, shape = _extension.load(), (1, len(x))
    call.activation_forward(name, kind, shape, x.data_ptr(), None, value.data_ptr(), 1, isa)
    addresses = (slope.data_ptr(), both.data_ptr(), None, None)
    call.activation_backward(name, kind, shape, x.data_ptr(), None, *addresses, 1, isa)
    assert torch.equal(value.nan_to_num(), both.nan_to_num())
    return value, slope


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "best"])
def test_activation_values_and_slopes(kind, dtype, isa):
    """Relative to the value, far into the tail; at infinity and far out x or 0, slope 1 or 0."""
    x = torch.linspace(-9, 9, 40_001, dtype=dtype)
    exact = x.double().requires_grad_()
    # PyTorch's own value loses the tail (1 + erf is 0 from -8.3 on), as does its tanh's.
    z = math.sqrt(8 / math.pi) * (exact + 0.044715 * exact**3)
    truth = {
        "gelu": exact * 0.5 * torch.erfc(-exact * math.sqrt(0.5)),
        "gelu_tanh": exact * torch.sigmoid(z),
    }.get(kind)
    truth = gelu_mlp.activation(kind, exact) if truth is None else truth
    (rise,) = torch.autograd.grad(truth.sum(), exact)
    value, slope = _activation(kind, x, isa)
    eps = torch.finfo(dtype).eps
    # An exponent's rounding counts as often as the exponent is large.
    error = (value.double() - truth).abs()
    assert (error <= 3 * eps * (1 + exact.square()) * truth.abs()).all()
    assert (error <= 2 * eps * (1 + exact.abs())).all()
    # In fp64 it is the truth whose 1 - sigmoid cancels.
    assert ((slope.double() - rise).abs() <= (4 if dtype == torch.float32 else 64) * eps).all()

    tiny = torch.finfo(dtype).smallest_normal / 4
    far = torch.tensor([500.0, -500.0, 3e38, -3e38, math.inf, -math.inf], dtype=dtype)
    value, slope = _activation(kind, far, isa)
    assert torch.equal(value, far.clamp(min=0))
    assert torch.equal(slope, (far > 0).to(dtype))
    small = torch.tensor([tiny, -tiny, 0.0, -0.0], dtype=dtype)
    value, slope = _activation(kind, small, isa)
    half = 0.5 * small if kind != "relu" else small.clamp(min=0)
    torch.testing.assert_close(value, half, rtol=1e-5, atol=0)
    assert _activation(kind, torch.tensor([math.nan], dtype=dtype), isa)[0].isnan()


def test_a_mean_far_from_zero_is_exact():
    """Equal numbers have no variance: what rounding leaves of their mean is made up for."""
    for value in (1e4 / 3, -7e7 / 11, 0.1):
        x = torch.full((3, 1000), value)
        with tinyclip.backend("cpu"):
            y = ops.layer_norm(x, None, None)
        assert y.abs().max() <= 1e-7 * abs(value) / math.sqrt(1e-5)


def test_what_is_masked_stays_out():
    """NaN in a masked channel of anything, and where it is masked beside NaN in a kept one."""
    mask = torch.arange(40) % 3 > 0
    tensors = [torch.randn(5, 40), torch.randn(40), torch.randn(40), torch.randn(5, 40)]
    found = []
    for value in (0.0, math.nan):
        x, weight, bias, dy = (t.masked_fill(~mask, value) for t in tensors)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        with tinyclip.backend("cpu"):
            y = ops.layer_norm(*leaves, channel_mask=mask)
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for clean, planted in zip(*found, strict=True):
        assert torch.equal(clean, planted)
    x = tensors[0].clone()
    x[2, 1] = math.nan  # a kept channel: of its row, all kept ones are lost
    leaf = x.requires_grad_()
    with tinyclip.backend("cpu"):
        y = ops.layer_norm(leaf, tensors[1], tensors[2], channel_mask=mask)
    (dx,) = torch.autograd.grad(y, leaf, tensors[3])
    for result in (y, dx):
        assert (result[:, ~mask] == 0).all()
        assert result[2, mask].isnan().all()
        assert not result[[0, 1, 3, 4]].isnan().any()


def test_rows_two_to_the_31_elements_apart():
    far, width = 2**31 + 5, 40
    base = torch.empty(far + width)  # never touched but at its ends
    x = base.as_strided((2, width), (far, 1))
    x.copy_(torch.randn(2, width))
    dy = torch.randn(2, width)
    results = []
    for rows in (x, x.contiguous()):
        leaf = rows.detach().requires_grad_()
        with tinyclip.backend("cpu"):
            y = ops.layer_norm(leaf, None, None)
        results.append((y, *torch.autograd.grad(y, leaf, dy)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [0, 3])
def test_rows_that_overlap(stride):
    x = torch.randn(64).as_strided((9, 8), (stride, 1))
    weight, mask = torch.randn(8), torch.rand(8) < 0.7
    found = []
    for rows in (x, x.clone()):
        leaf = rows.detach().requires_grad_()
        with tinyclip.backend("cpu"):
            y = ops.layer_norm(leaf, weight, None, channel_mask=mask)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
        found.append((y, dx))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_watches_sees_the_registered_ops():
    """In eager code the op is left out around the kernels, but for modes and fake tensors."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 6)
    with tinyclip.backend("cpu"):
        with Watch():
            y = ops.layer_norm(ops.gelu_mlp(x, weight, None, weight, None), None, None)
            y.sum().backward()
        for name in ("gelu_mlp_fwd", "gelu_mlp_bwd", "layer_norm_fwd", "layer_norm_bwd"):
            assert f"tinyclip.{name}.default" in seen
        plain = x.detach()
        with FakeTensorMode() as mode:
            fake, fake_weight = mode.from_tensor(plain), mode.from_tensor(weight)
        for told in (
            ops.gelu_mlp(fake, fake_weight, None, fake_weight, None),
            ops.layer_norm(fake, None, None),
        ):
            assert (told.shape, told.dtype) == (x.shape, x.dtype)


def test_auto_takes_what_was_measured():
    """Small norms without a mask are F.layer_norm's; the rest is ours."""

    def choice(op, *args, **kwargs):
        return tinyclip.explain(op, *args, **kwargs).backend

    small, large = torch.empty(100, 768), torch.empty(4096, 512)
    mask = torch.ones(768, dtype=torch.bool)
    assert choice("layer_norm", small, None, None) == "torch"
    assert choice("layer_norm", small, None, None, channel_mask=mask) == "cpu"
    assert choice("layer_norm", large, None, None) == "cpu"
    assert choice("layer_norm", large[:1024], None, None, residual=large[:1024]) == "cpu"
    assert choice("layer_norm", large.bfloat16(), None, None) == "torch"
    weight = torch.empty(768, 768)
    assert choice("gelu_mlp", small, weight, None, weight, None) == "cpu"
    assert choice("gelu_mlp", small.half(), weight.half(), None, weight.half(), None) == "torch"


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "optimised"])
def test_malformed_calls(flags):
    command = [sys.executable, *flags, "-m", "tests.ops.malformed_rows"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert int(done.stdout.split()[-3]) >= 300
