"""Who computes an op: the only place that chooses a backend.

Each op registers an ordered tuple of candidates. A candidate looks at a `Spec`, a small record of
plain values, and answers None (it serves), `Cannot` (it is unable) or `Slower` (it is able, and
measured slower than a later one). ``auto`` takes the first that answers None. An explicit choice
overrides `Slower`, and on `Cannot` raises `BackendUnavailable`: it never falls back.
"""

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")


class Cannot(NamedTuple):
    """The backend is unable to run the problem."""

    reason: str


class Slower(NamedTuple):
    """The backend can run the problem and is not worth it: the reason carries the number."""

    reason: str


class Spec(NamedTuple):
    """What a candidate may look at: plain values, so that Dynamo can guard them.

    ``dtype`` is that of the leading tensor; ``has_fp64`` says whether any tensor of the call is
    fp64, parameters, gates, scales and a teacher's features included.
    """

    op: str
    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    needs_grad: bool
    sizes: dict[str, int]
    flags: tuple[str, ...]
    has_fp64: bool = False


class Candidate(NamedTuple):
    """One way to compute an op: ``run(*problem)`` with the problem as the op prepares it."""

    backend: str
    why_not: Callable[[Spec], Cannot | Slower | None]
    run: Callable[..., Any]


class Op(NamedTuple):
    """An entry of the table: ``prepare(*args, **kwargs) -> (spec, problem)`` validates a call."""

    name: str
    function: Callable[..., Any]
    prepare: Callable[..., tuple[Spec, tuple]]
    candidates: tuple[Candidate, ...]
    example: Callable[[torch.device], tuple[tuple, dict]]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for explicitly cannot run this problem; the text says why."""


_OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Enter an op into the table that `select` and `explain` read."""
    _OPS[op.name] = op


def always(spec: Spec) -> None:
    """The `why_not` of a candidate that serves every problem."""
    return None


def _checked_choice(name: str, source: str) -> str | None:
    """The backend `name` stands for, None for "auto"."""
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a string, got {type(name).__name__}")
    if name == "auto":
        return None
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source} must be 'auto' or one of {BACKENDS}, got {name!r}{hint}")
    return name


# A plain module global: Dynamo guards it, so a compiled model recompiles when the choice changes.
_choice: str | None = _checked_choice(
    os.environ.get("TINYCLIP_BACKEND") or "auto", "TINYCLIP_BACKEND"
)
_open: list[tuple[object, str | None]] = [(None, _choice)]  # the choices in force, innermost last


class backend:
    """Choose the backend of every op inside the block, for all threads of the process.

    Args:
        name: ``"auto"``, or one of ``cuda``, ``triton``, ``cpu``, ``torch``, ``reference``.

    Raises:
        ValueError: `name` is none of these.
        BackendUnavailable: raised by an op in the block that the backend cannot compute.

    The choice is made once, in an op's forward, and kept for its backward. Of blocks that are open
    at once in several threads, the one entered last counts.
    """

    def __init__(self, name: str):
        self._wanted = _checked_choice(name, "backend: name")

    def __enter__(self) -> None:
        global _choice
        _open.append((self, self._wanted))
        _choice = self._wanted

    def __exit__(self, *exc_info: object) -> None:
        global _choice
        # Its own entry, which need not be the last: threads may leave in another order.
        own = max(i for i, (opened_by, _) in enumerate(_open) if opened_by is self)
        del _open[own]
        _choice = _open[-1][1]


def constant_when_compiled(function: Callable) -> Callable:
    """As torch.compiler.assume_constant_result, which imports a second and a half of compiler."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def make_spec(
    op: str,
    leading: torch.Tensor,
    differentiable: tuple[torch.Tensor | None, ...],
    sizes: dict[str, int],
    flags: tuple[str, ...] = (),
    others: tuple[torch.Tensor | None, ...] = (),
) -> Spec:
    """Build the spec of a call.

    Args:
        leading: gives device and dtype.
        differentiable: ask for gradients, where grad mode is on and any of them requires grad.
        sizes, flags: as the op's candidates want them.
        others: float tensors of the call beside `leading` and `differentiable`.
    """
    device = leading.device
    needs_grad = False
    if torch.is_grad_enabled():
        for tensor in differentiable:
            if tensor is not None and tensor.requires_grad:
                needs_grad = True
                break
    fp64 = torch.float64
    dtype = leading.dtype
    has_fp64 = dtype is fp64
    if not has_fp64:
        for tensor in differentiable + others:
            if tensor is not None and tensor.dtype is fp64:
                has_fp64 = True
                break
    return Spec(
        op=op,
        device=device.type,
        capability=_capability(device.index) if device.type == "cuda" else None,
        dtype=dtype,
        needs_grad=needs_grad,
        sizes=sizes,
        flags=flags,
        has_fp64=has_fp64,
    )


def fp64_why_not(spec: Spec) -> Cannot | None:
    """Why kernels without fp64 cannot run a call, or None.

    One fp64 tensor is enough: the op may promise an fp64 result for it, or a kernel read its bits
    as fp32.
    """
    if spec.dtype == torch.float64:
        return Cannot("no fp64 kernels")
    return Cannot("no fp64 kernels, and a tensor of the call is fp64") if spec.has_fp64 else None


def select(spec: Spec) -> Candidate:
    """The candidate that computes `spec` under the present choice.

    Raises:
        BackendUnavailable: the explicit choice cannot, with its reason.
    """
    candidates = _OPS[spec.op].candidates
    if _choice is None:
        for candidate in candidates:
            if candidate.why_not(spec) is None:
                return candidate
        raise BackendUnavailable(f"{spec.op}: no backend can run it:\n{_explain(spec)}")
    for candidate in candidates:
        if candidate.backend == _choice:
            verdict = candidate.why_not(spec)
            if isinstance(verdict, Cannot):
                raise BackendUnavailable(
                    f"{spec.op}: backend {_choice!r} was asked for and cannot: {verdict.reason}"
                )
            return candidate
    names = ", ".join(candidate.backend for candidate in candidates)
    raise BackendUnavailable(
        f"{spec.op}: backend {_choice!r} was asked for and does not implement it; it has {names}"
    )


class Explanation(NamedTuple):
    """Why an op runs where it runs; ``str()`` is a table.

    ``backend`` is the one that would run (None if the explicit choice cannot), ``rows`` holds
    (backend, "runs" | "able" | "slower" | "cannot", reason) in order of preference.
    """

    op: str
    choice: str
    backend: str | None
    rows: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op} (choice: {self.choice})"]
        lines += [f"  {name:<10} {state:<7} {reason}".rstrip() for name, state, reason in self.rows]
        return "\n".join(lines)


def _explain(spec: Spec) -> Explanation:
    runs: str | None = None
    rows = []
    for candidate in _OPS[spec.op].candidates:
        verdict = candidate.why_not(spec)
        wanted = _choice is None or candidate.backend == _choice
        if isinstance(verdict, Cannot):
            rows.append((candidate.backend, "cannot", verdict.reason))
        elif wanted and runs is None and (verdict is None or _choice is not None):
            runs = candidate.backend
            rows.append((candidate.backend, "runs", verdict.reason if verdict else ""))
        elif verdict is not None:
            rows.append((candidate.backend, "slower", verdict.reason))
        else:
            rows.append((candidate.backend, "able", "a backend above serves" if runs else ""))
    if _choice is not None and all(row[0] != _choice for row in rows):
        rows.insert(0, (_choice, "cannot", "does not implement this op"))
    return Explanation(spec.op, _choice or "auto", runs, tuple(rows))


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would compute this call, and why not the others.

    Args:
        op: the op, ``tinyclip.ops.attention`` or ``"attention"``.
        *args, **kwargs: what the op would be called with. With none, a typical training problem
            on this machine's best device is explained.

    Raises:
        ValueError: `op` is no op of this package. TypeError, ValueError: as the op itself raises.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        near = difflib.get_close_matches(name, _OPS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"explain: op must be one of {tuple(_OPS)}, got {name!r}{hint}")
    if not args and not kwargs:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        args, kwargs = _OPS[name].example(device)
    try:
        inspect.signature(_OPS[name].function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    spec, _ = _OPS[name].prepare(*args, **kwargs)
    return _explain(spec)
