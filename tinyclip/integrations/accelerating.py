"""``tinyclip.accelerate(model)``: the model of another library, in place, on this package's ops."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyclip.integrations.report import Check, Report, replaced_rows, skipped_rows
from tinyclip.integrations.swaps import Known
from tinyclip.integrations.swaps.base import (
    MARK,
    Session,
    Swap,
    install,
    is_covered,
    is_swapped,
    remove,
)
from tinyclip.integrations.swaps.masks import Masks

PAIRS = 3


def accelerate(
    model: nn.Module,
    attention: bool = True,
    mlp: bool = True,
    norm: bool = True,
    strict: bool = False,
    check: Tensor | tuple | Mapping[str, Any] | None = None,
) -> Report:
    """Let a model of Hugging Face, open_clip, timm or torch.nn compute with `tinyclip.ops`.

    Modules are found by their class and swapped one by one, in place: parameters, buffers, hooks
    and names stay the same objects, so that state dicts, optimizers and wrappers notice nothing.
    Nothing outside the model changes. `restore` undoes it. docs/accelerate.md lists the classes.

    Args:
        model: any module. Modules that an earlier call swapped stay as they are.
        attention: swap attention.
        mlp: swap the MLPs whose activation is one of `ops.gelu_mlp`'s.
        norm: swap LayerNorms, and let the block add its residual inside the second one.
        strict: raise where a module cannot be swapped, and later where a call cannot be computed,
            instead of leaving it to the host.
        check: an input, as a tensor, a tuple of arguments or a mapping of keyword arguments: the
            model runs on it both ways, in eval mode and without gradients.

    Returns:
        A `Report`; print it. It names all that was left alone, with the reason.

    Raises:
        TypeError: `model` is no module, or an option no bool.
        ValueError: under strict, a module cannot be swapped, or there is none to swap; the model
            is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    options = {"attention": attention, "mlp": mlp, "norm": norm}
    for name, value in [*options.items(), ("strict", strict)]:
        if not isinstance(value, bool):
            raise TypeError(f"accelerate: {name} must be a bool, got {type(value).__name__}")
    known = Known()
    swaps, left, already = _plan(model, known, {name for name, value in options.items() if value})
    if strict:
        left += [
            (path, type(module).__name__, limit)
            for path, module, swap in swaps
            if module.training and (limit := swap.limit(module))
        ]
        if left or not (swaps or already):
            reasons = "; ".join(str(row).strip() for row in skipped_rows(left))
            raise ValueError(
                "accelerate: strict is True, and "
                + (reasons or f"nothing of {type(model).__name__} is known")
            )
    rows, not_used = replaced_rows((swap, module) for _, module, swap in swaps)
    session = Session(Masks(model), strict)
    sessions = {id(session): session}
    for module in already:
        sessions.setdefault(id(vars(module)[MARK].session), vars(module)[MARK].session)

    def swap_all() -> None:
        for _, module, swap in swaps:
            install(module, swap, session)
        for module in model.modules():
            inner = known.weights_unread(module)
            if inner is not None and is_swapped(inner):
                vars(inner)[MARK].weights_read = False

    def undo() -> None:
        for _, module, _ in swaps:
            remove(module)

    checked = None if check is None else _compare(model, check, swap_all, undo)
    swap_all()
    return Report(
        type(model).__name__,
        rows,
        skipped_rows(left),
        not_used,
        len(already),
        checked,
        tuple(sessions.values()),
    )


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every swapped module of the model is its host's again.

    Returns:
        How many modules were swapped.

    Raises:
        RuntimeError: a wrapper such as fully_shard has put a class of its own over a swapped one.
    """
    swapped = [module for module in model.modules() if is_swapped(module)]
    covered = sorted({type(module).__name__ for module in swapped if is_covered(module)})
    if covered:
        raise RuntimeError(
            f"restore: {', '.join(covered)} was put over a swapped class since: restore before that"
        )
    for module in swapped:
        remove(module)
    return len(swapped)


Found = tuple[str, nn.Module, type[Swap]]
Left = tuple[str, str, str]


def _plan(
    model: nn.Module, known: Known, options: set[str]
) -> tuple[list[Found], list[Left], list[nn.Module]]:
    """(what to swap, what stays with its reason, what is swapped already); changes nothing."""
    swaps: list[Found] = []
    left: list[Left] = []
    already: list[nn.Module] = []
    understood: set[str] = set()
    for path, module in model.named_modules():
        if is_swapped(module):
            already.append(module)
            option = module._parts[0].option
        else:
            verdict = known.judge(module)
            if verdict is None:
                continue
            option = verdict.option
            if option in options:
                if verdict.swap is None:
                    left.append((path, type(module).__name__, verdict.reason))
                else:
                    swaps.append((path, module, verdict.swap))
        if option != "norm":
            understood.update(_paths_to(path))
    if options & {"attention", "mlp"}:
        left += _strangers(model, understood)
    return swaps, left, already


def _paths_to(path: str) -> Iterator[str]:
    """The module's path and those of all that it is in."""
    yield ""
    parts = path.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _strangers(model: nn.Module, understood: set[str]) -> Iterator[Left]:
    """Modules of two linears or more in which nothing is known: attention and MLPs of others."""
    for path, module in model.named_modules():
        linears = sum(isinstance(child, nn.Linear) for child in module.children())
        if linears >= 2 and path not in understood and not is_swapped(module):
            yield path, type(module).__name__, "its class is not known"


def _compare(
    model: nn.Module, inputs: Any, swap_all: Callable[[], None], undo: Callable[[], None]
) -> Check:
    """Both ways in turn: the outputs' worst relative error, the ratio of the best times."""
    if isinstance(inputs, Mapping):
        run = partial(model, **inputs)
    else:
        run = partial(model, *(inputs if isinstance(inputs, tuple) else (inputs,)))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    outputs = {}
    try:
        with torch.no_grad():
            for _ in range(PAIRS):
                outputs["theirs"], seconds = _timed(run)
                times["theirs"].append(seconds)
                swap_all()
                try:
                    outputs["ours"], seconds = _timed(run)
                finally:
                    undo()
                times["ours"].append(seconds)
    finally:
        for module, mode in modes:
            module.training = mode
    pairs = zip(_tensors(outputs["ours"]), _tensors(outputs["theirs"]), strict=True)
    error = max((_relative(ours, theirs) for ours, theirs in pairs), default=0.0)
    return Check(error, min(times["ours"]) / min(times["theirs"]))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The second of two runs: the first pays for what is new."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    start = now()
    output = run()
    return output, now() - start


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    distance = torch.linalg.vector_norm(ours.double() - theirs.double()).item()
    size = torch.linalg.vector_norm(theirs.double()).item()
    return distance / size if size else distance
