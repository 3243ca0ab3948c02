"""No number without a right answer: the op against an fp64 oracle, outputs and every gradient.

On a smaller size of the same case, with fresh inputs, in Frobenius norm and per tensor:

    err(ours) <= 2 max(err(eager maths), err(PyTorch's fused op)) + 2 eps ||ref|| + 2 eps cond

all in the case's dtype against ``reference`` on fp64 copies of the same inputs. ``cond`` is there
for the contrastive ops alone, whose gradients are differences of two close numbers: nobody owes
less than the rounding of its terms.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import Case
from bench.peers import CannotRun, Maths, Tensors, contrastive

Outputs = Tensor | tuple[Tensor, ...]


class Verdict(NamedTuple):
    """``colour`` is "green" or "red"; ``detail`` names the worst tensor and its errors."""

    colour: str
    detail: str


def leaves(tensors: Tensors) -> Tensors:
    """Those of the inputs whose gradient is wanted."""
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """An op's outputs, however many it has."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(case: Case, device: str, candidate: Maths) -> Verdict:
    """The verdict on ``candidate(tensors, sizes)`` as an implementation of the case."""
    tensors = case.draw(device, seed=1, reduced=True)
    sizes = {**case.sizes, **case.reduced}
    oracle = _evaluate(case, lambda t, s: _oracle(case, t, s), _double(tensors), sizes)
    yardsticks, note = [_evaluate(case, case.eager, tensors, sizes)], ""
    if case.fused is not None:
        try:
            timed = case.peers[case.fused].build(tensors, sizes, device)
            with timed.context():
                yardsticks.append(_evaluate(case, lambda t, s: timed.call(), tensors, sizes))
        except (CannotRun, RuntimeError) as error:  # a fused op may not exist here
            reason = str(error).strip().partition("\n")[0]
            note = f"; without the yardstick {case.fused}: {reason}"
    found = _evaluate(case, candidate, tensors, sizes)
    eps = torch.finfo(case.dtype).eps if case.whole_model else 0.0
    verdict = _judge(found, yardsticks, oracle, _cond(case, tensors), eps)
    return verdict._replace(detail=verdict.detail + note)


def _oracle(case: Case, tensors: Tensors, sizes: dict) -> Outputs:
    if not case.has_ours:
        return case.eager(tensors, sizes)
    import tinyclip

    with tinyclip.backend("reference"):
        if case.ours is not None:
            return case.ours.build(tensors, sizes, _device(tensors)).call()
        return case.call(tinyclip.ops, tensors, sizes)


def _device(tensors: Tensors) -> str:
    return next(iter(tensors.values())).device.type


def _double(tensors: Tensors) -> Tensors:
    def copy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return {name: copy(tensor) for name, tensor in tensors.items()}


def _evaluate(case: Case, run: Maths, tensors: Tensors, sizes: dict) -> dict[str, Tensor]:
    """Outputs and, where the case times a backward, the gradient of every leaf."""
    outputs = as_tuple(run(tensors, sizes))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not case.has_backward:
        return found
    wanted = leaves(tensors)
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream(outputs))
    if case.whole_model:
        return found | {"gradient": torch.cat([g.flatten() for g in gradients])}
    return found | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}


def upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Incoming gradients: 1 for a loss, else random and the same values in every dtype."""
    drawn = []
    for i, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(100 + i)
        grad = torch.ones(output.shape, device=output.device)
        if output.dim():
            # bf16 holds few digits: rounded to it, the values are exact in every other dtype
            grad = grad.normal_(generator=generator).to(torch.bfloat16)
        drawn.append(grad.to(output.dtype))
    return drawn


def _cond(case: Case, tensors: Tensors) -> dict[str, float]:
    """The norm of each contrastive result with its cancelling terms added in absolute value.

    A logit s a.b carries about s roundings of its own, which every result inherits.
    """
    if not case.op.startswith("contrastive"):
        return {}
    t = {name: tensor.detach() for name, tensor in _double(tensors).items()}
    scale = float(t["logit_scale"])
    roundings = 8 + scale
    if case.op == "contrastive_stats":
        kept = contrastive.stats(t, dict(case.sizes))
        return {f"output {i}": roundings * float(stat.norm()) for i, stat in enumerate(kept)}
    cosines = t["image"] @ t["text"].T
    one = torch.eye(len(cosines), device=cosines.device, dtype=cosines.dtype)
    both = (scale * cosines).softmax(1) + (scale * cosines).softmax(0) + 2 * one
    if "teacher_image" in t:
        teacher = contrastive.TEACHER_SCALE * t["teacher_image"] @ t["teacher_text"].T
        both = both + teacher.softmax(1) + teacher.softmax(0)
    both = both / (2 * len(cosines))
    gradients = (
        roundings * float((scale * both @ t["text"].abs()).norm()),
        roundings * float((scale * both.T @ t["image"].abs()).norm()),
        roundings * float((both * cosines.abs()).sum()),
    )
    if case.op == "contrastive_grads":
        return {f"output {i}": cond for i, cond in enumerate(gradients)}
    wanted = ("dimage", "dtext", "dlogit_scale")
    return {"output 0": roundings, **dict(zip(wanted, gradients, strict=True))}


def _judge(
    ours: Tensors,
    yardsticks: list[Tensors],
    oracle: Tensors,
    cond: dict,
    coarsest: float = 0.0,
) -> Verdict:
    """`coarsest`: the eps of the precision that results of a finer dtype were computed in."""
    worst, detail = -1.0, "nothing was compared"
    for name, reference in oracle.items():
        if ours[name].shape != reference.shape:
            shapes = f"{tuple(ours[name].shape)}, not {tuple(reference.shape)}"
            return Verdict("red", f"{name} has shape {shapes}")
        error = float((ours[name].double() - reference).norm())
        norm = float(reference.norm())
        eps = max(torch.finfo(ours[name].dtype).eps, coarsest)
        errors = [float((other[name].double() - reference).norm()) for other in yardsticks]
        # a yardstick that overflowed excuses nothing
        lenience = max((e for e in errors if math.isfinite(e)), default=0.0)
        allowed = 2 * lenience + 2 * eps * (norm + cond.get(name, 0.0))
        # a NaN compares false with everything: it has to come out as the worst
        excess = error / max(allowed, 1e-300)
        if not excess <= worst:
            worst = excess if math.isfinite(excess) else math.inf
            detail = f"{name} error {error:.2e}, allowed {allowed:.2e} (norm {norm:.2e})"
    return Verdict("green" if worst <= 1 else "red", detail)
