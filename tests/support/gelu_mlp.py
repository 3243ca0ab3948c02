"""GELU-MLP problems: rows, widths, activations, gates, missing biases, layouts, regimes."""

import torch
import torch.nn.functional as F

from tests.support.draw import LAYOUTS, REGIMES, UPSTREAM, Draw
from tests.support.problem import Problem
from tinyclip import ops
from tinyclip.ops.gelu_mlp import ACTIVATIONS

ROWS = (1, 2, 7, 31, 50, 77)
WIDTHS = (1, 8, 21, 32, 48, 64, 100)


def activation(kind: str, x: torch.Tensor) -> torch.Tensor:
    """As a PyTorch user writes it."""
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _fused(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation, hidden_gate=None):
    w1, b1, w2, b2 = (
        None if t is None else t.to(x.dtype) for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    )
    hidden = globals()["activation"](activation, F.linear(x, w1, b1))
    if hidden_gate is not None:
        hidden = hidden * hidden_gate.to(x.dtype)
    return F.linear(hidden, w2, b2)


def _cond(problem: Problem, tensors, douts):
    """Every product in absolute value; the pre-activation's rounding passes through the slope."""
    kind, (dy,) = problem.options["activation"], douts
    x = tensors["x"].reshape(-1, tensors["x"].shape[-1])
    dy = dy.reshape(-1, dy.shape[-1]).abs()
    w1, w2 = tensors["fc1_weight"], tensors["fc2_weight"]
    b1, b2, gate = (tensors[n] for n in ("fc1_bias", "fc2_bias", "hidden_gate"))
    pre = F.linear(x, w1, b1).requires_grad_()
    act = activation(kind, pre)
    (slope,) = torch.autograd.grad(act.sum(), pre)
    act, pre = act.detach(), pre.detach()
    pre_terms = F.linear(x.abs(), w1.abs(), None if b1 is None else b1.abs())
    act_terms = act.abs() + slope.abs() * pre_terms
    g = 1.0 if gate is None else gate.abs()
    y = F.linear(act_terms * g, w2.abs(), None if b2 is None else b2.abs())
    dhidden = dy @ w2.abs()
    # The slope's own slope is at most 1.2, and 0 for relu but at the corner.
    curve = 0.0 if kind == "relu" else 1.2 * torch.exp(-0.1 * pre.abs())
    dpre = dhidden * g * (slope.abs() + curve * pre_terms)
    return {
        "out": y.reshape(*tensors["x"].shape[:-1], -1),
        "dx": (dpre @ w1.abs()).reshape(tensors["x"].shape),
        "dfc1_weight": dpre.T @ x.abs(),
        "dfc1_bias": dpre.sum(0),
        "dfc2_weight": dy.T @ (act_terms * g),
        "dfc2_bias": dy.sum(0),
        "dhidden_gate": (dhidden * act_terms).sum(0),
    }


def make(seed: int, *, device: str = "cpu", **choices) -> Problem:
    """The problem of a seed; `choices` narrows any drawn value: rows=, widths=, dtypes=, ..."""
    draw = Draw(seed, device)

    def pick(name, values):
        return draw.one_of(choices.get(name, values))

    dtype = pick("dtypes", (torch.float32, torch.bfloat16, torch.float16))
    regime, kind = pick("regimes", REGIMES), pick("activations", ACTIVATIONS)
    rows, c, f, c_out = pick("rows", ROWS), *(pick("widths", WIDTHS) for _ in range(3))
    layout, upstream = pick("layouts", LAYOUTS), pick("upstream", UPSTREAM)
    leading = (rows,) if draw.chance(0.5) else (2, rows)
    parameter_dtype = torch.float32 if draw.chance(0.3) else dtype

    x = draw.values(regime, *leading, c, dtype=dtype)
    if regime == "confident":
        x = 20 * x

    def parameter(*shape):
        value = draw.normal(*shape) / shape[-1] ** 0.5
        if regime == "integers":
            value = draw.values(regime, *shape, dtype=dtype)
        return draw.tensor(value, parameter_dtype)

    gate = draw.tensor(draw.normal(f), draw.one_of((dtype, torch.float32)))
    tensors = {
        "x": draw.tensor(x, dtype, layout),
        "fc1_weight": parameter(f, c),
        "fc1_bias": parameter(f) if draw.chance(0.7) else None,
        "fc2_weight": parameter(c_out, f),
        "fc2_bias": parameter(c_out) if draw.chance(0.7) else None,
        "hidden_gate": gate if draw.chance(0.4) else None,
    }
    like = torch.empty(*leading, c_out, dtype=dtype, device=device)
    return Problem(
        label=f"seed {seed} {dtype}/{parameter_dtype} {regime} {kind} {layout} {upstream}"
        f" {leading} C{c}-F{f}-O{c_out}",
        op=ops.gelu_mlp,
        tensors=tensors,
        fused=_fused,
        cond=_cond,
        options={"activation": kind},
        frozen=frozenset(n for n in tensors if draw.chance(0.2)),
        douts=[draw.upstream(like, upstream)],
    )


def beyond_fp16(activation: str, device: str = "cpu") -> Problem:
    """The gradient of the hidden channels passes 65504, and those made of it do not.

    The gate takes it back, and for the gate's own gradient the activation does.
    """
    one = {"dtypes": [torch.float16], "rows": [7], "widths": [48], "activations": [activation]}
    problem = make(0, device=device, regimes=["normal"], layouts=["contiguous"], **one)
    x, w1, w2 = (problem.tensors[n] for n in ("x", "fc1_weight", "fc2_weight"))
    problem.tensors |= {
        "x": x / 100,
        "fc1_bias": torch.zeros_like(w1[:, 0]),
        "fc2_weight": 64 * w2.sign(),
        "hidden_gate": 0.001 * torch.ones(48, device=device),
    }
    problem.douts = [64 * w2.sign().to(x.dtype)[:, 0].expand(*x.shape[:-1], -1)]
    problem.frozen = frozenset()
    problem.label = f"an fp16 gradient beyond 65504, {activation}"
    dhidden = problem.douts[0].double() @ problem.tensors["fc2_weight"].double()
    assert dhidden.abs().max() > 2 * 65504
    assert all(truth.to(torch.float16).isfinite().all() for truth in problem.truth().values())
    return problem
