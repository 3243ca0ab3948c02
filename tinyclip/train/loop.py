"""The training loop, whole.

A batch is fetched, the ranks tell each other what they met, the model and the objective give a
loss, `Update` makes a step of it, and now and then there is a row of metrics or a checkpoint. On a
GPU nothing here waits for it but the rows. All of it is a function of the settings, the data and
the step: a run that was stopped anywhere ends where it would have ended.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyclip.data import BadSamples, Batch, Skipped
from tinyclip.train.lock import locked
from tinyclip.train.optimizer import clip_of
from tinyclip.train.progress import Progress, backends
from tinyclip.train.ranks import Ranks
from tinyclip.train.run import Run
from tinyclip.train.settings import Settings
from tinyclip.train.state import Clock, State
from tinyclip.train.stop import Stop
from tinyclip.train.update import Update


class TrainingError(RuntimeError):
    """The run cannot go on; the text says why."""


class Summary(NamedTuple):
    """What a run did. ``losses`` holds the first and the last value of every term; ``stopped``
    says that a signal ended it before its last step."""

    steps: int
    samples: int
    seconds: float
    losses: dict[str, tuple[float, float]]
    stopped: bool
    skipped_steps: int
    skipped_samples: int


def fit(
    model: nn.Module,
    objective: Callable[..., dict[str, Tensor]],
    loader: Any,
    settings: Settings,
    *,
    run: Run | None = None,
    resume: str | None = None,
    at_step: Callable[[int, nn.Module], None] | None = None,
    progress: bool = True,
    title: str = "train",
) -> Summary:
    """Train `model` in place, on the device it is on, with the ranks of torch.distributed if any.

    Args:
        model: a CLIP, or what holds one and trains more with it, a `distill.Masked`; its parameters
            are converted to the settings' dtype. Of the second, ``begin(step)`` is called before
            each step, and ``finished()`` gives the model that the run ends with.
        objective: ``objective(image, text, scale, pair, group)`` of the student's L2-normalised
            features, its exp'd scale and ``batch.pairs[-1]``; gives named terms, of which "loss" is
            differentiated. Over a group its gradients must be W times the rank's share, as those
            of `ops.contrastive_loss` are.
        loader: ``len(loader)`` batches an epoch, ``loader.epoch(epoch, start)`` from batch `start`
            on. A batch has `pairs`, `keys` and `skipped`; it may be short, or empty.
        settings: how.
        run: a `Run`, which keeps metrics and checkpoints; None keeps nothing.
        resume: "latest", or a checkpoint's folder, of `run`; None begins at step 0.
        at_step: called with the number of steps done and the CLIP, after each; its time is not
            counted.
        progress: whether the first rank shows it, under `title`.

    Returns:
        `Summary`.

    Raises:
        ValueError: there is a run in the folder, and resume is None; or another process trains
            there.
        TrainingError: too many steps in a row were not finite; no sample was read; and on every
            rank, when the data of one of them raised.
        TooManyBroken (a RuntimeError): more than max_bad_fraction of the samples are broken, after
            1,000 of them, after an epoch, or at the end.
        CheckpointError (a ValueError): there is nothing sound to resume from.
        OSError: a checkpoint could not be written; those before it are as they were.
    """
    ranks, clip = Ranks.current(), clip_of(model)
    device, dtype = clip.logit_scale.device, settings.dtypes.parameters
    model.to(dtype).train()
    held = contextlib.nullcontext() if run is None else locked(run.folder, ranks)
    with _fixed_scale(clip, settings.logit_scale), Stop() as stop, held:
        update, state = Update(model, settings, ranks.group), State(settings.first)
        if resume is not None:
            state = run.restore(resume, clip, update, loader, ranks, settings.first)
        elif run is not None:
            run.check_new(ranks)
        forward = _wrapped(model, device, settings, ranks)
        half = settings.dtypes.autocast
        autocast = torch.autocast(device.type, half, enabled=half is not None)
        clock, before = Clock(), state.samples
        listed = None if run is None else run.folder / "skipped.jsonl"
        accepted = BadSamples(settings.max_bad_fraction, listed=listed)
        accepted.read, accepted.skipped = state.samples, state.skipped_samples
        with (
            run or contextlib.nullcontext(),
            Progress(state.step, settings.steps, progress and ranks.rank == 0, title) as bar,
            contextlib.closing(_batches(loader, state.step)) as batches,
        ):
            served = None
            while state.step < settings.steps:
                with clock.waiting():
                    batch, rows, skipped, asked = _fetch(batches, ranks, stop)
                if asked:
                    break
                state.samples += rows
                state.skipped_samples += skipped
                broken = _broken(batch, ranks) if skipped else ()
                if broken and run is not None:
                    run.skipped(state.step + 1, broken, ranks)
                accepted.count(Batch((), range(rows), broken))
                if model is not clip:
                    model.begin(state.step)
                if rows:
                    image, text, pair = _moved(batch, device, dtype)
                    with autocast:
                        if served is None:
                            served = backends(clip, image, text)
                            bar.serve(served)
                            if run is not None:
                                run.begin(clip, ranks, served)
                        terms = objective(*forward(image, text), pair, ranks.group)
                    update(state.step, terms["loss"])
                state.step += 1
                bar.step()
                if state.step % len(loader) == 0:
                    accepted.check()
                ends = (settings.first + 1, settings.steps)
                due = state.step in ends or state.step % settings.log_every == 0
                if device.type == "cpu" or due:
                    _check_finite(update, settings)
                if rows and due:
                    row = _row(state, terms, update, clip, loader)
                    seconds, row["data_wait"] = clock.look()
                    row["samples_per_second"] = (state.samples - before) / seconds
                    before, state.seconds = state.samples, state.seconds + seconds
                    bar.show(row)
                    if run is not None:
                        run.metrics(row, ranks)
                with clock.paused():
                    if at_step is not None:
                        at_step(state.step, clip)
                        model.train()
                if _save_now(state.step, settings) and run is not None:
                    run.save(state, clip, update, loader, ranks)
            state.seconds += clock.look()[0]
            stopped = state.step < settings.steps
            if not stopped:
                _check_read(state, accepted)
            if run is not None:
                run.save(state, clip, update, loader, ranks)
                if stopped:
                    bar.say(f"{title}: asked to stop; all {state.step} steps are in {run.folder}")
                else:
                    run.finish(clip if model is clip else model.finished(), update, ranks)
    losses = {name: tuple(values) for name, values in state.losses.items()}
    counts = (update.left_out()[0], state.skipped_samples)
    return Summary(state.step, state.samples, state.seconds, losses, stopped, *counts)


@contextlib.contextmanager
def _fixed_scale(model: nn.Module, logit_scale: float | None) -> Iterator[None]:
    """Set the multiplier and keep it, as TinyCLIP's --logit-scale does; None leaves it trained."""
    scale, trained = model.logit_scale, model.logit_scale.requires_grad
    if logit_scale is not None:
        scale.requires_grad_(False).fill_(math.log(logit_scale))
    try:
        yield
    finally:
        scale.requires_grad_(trained)


def _wrapped(model: nn.Module, device: torch.device, settings: Settings, ranks: Ranks) -> nn.Module:
    forward = torch.compile(model) if settings.compile else model
    if ranks.group is None:
        return forward
    places = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(forward, device_ids=places)


def _batches(loader: Any, step: int) -> Iterator[Any]:
    """The batches from `step` on, epoch after epoch."""
    epoch, start = divmod(step, len(loader))
    while True:
        number = start
        with contextlib.closing(loader.epoch(epoch, start)) as batches:
            for batch in batches:
                number += 1
                yield batch
        if number != len(loader):
            raise TrainingError(f"epoch {epoch} ended after {number} of {len(loader)} batches")
        epoch, start = epoch + 1, 0


def _fetch(batches: Iterator[Any], ranks: Ranks, stop: Stop) -> tuple[Any, int, int, bool]:
    """The next batch; rows and skipped samples of all ranks; whether any rank was asked to stop.

    An error of one rank's data is raised on all: the others would wait for it for ever.
    """
    batch, error = None, None
    try:
        batch = next(batches)
    except Exception as caught:
        error = caught
    mine = (0, 0) if batch is None else (len(batch.keys), len(batch.skipped))
    told = ranks.tell(*mine, stop.asked is not None, error is not None)
    if error is not None:
        raise error
    rows, skipped, asked, failing = zip(*told, strict=True)
    if any(failing):
        rank = failing.index(True)
        raise TrainingError(f"the data of rank {rank} failed: its own message says why")
    return batch, sum(rows), sum(skipped), any(asked)


def _broken(batch: Any, ranks: Ranks) -> tuple[Skipped, ...]:
    """The skipped samples of all ranks."""
    lists = map(json.loads, ranks.tell_text(json.dumps(batch.skipped)))
    return tuple(Skipped(*sample) for listed in lists for sample in listed)


def _moved(batch: Any, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """The student's image and text, and the pair for the objective, on the device."""

    def move(pair: Any) -> Any:
        image = pair.image.to(device, dtype, non_blocking=True)
        return pair._replace(image=image, text=pair.text.to(device, non_blocking=True))

    student = move(batch.pairs[0])
    return *student, student if len(batch.pairs) == 1 else move(batch.pairs[-1])


def _check_read(state: State, accepted: BadSamples) -> None:
    """At the end: a run that is shorter than an epoch has not been judged, and one that read
    nothing has trained nothing, whatever it was told to accept."""
    accepted.check()
    if not state.samples:
        raise TrainingError(
            f"no sample could be read in {state.step} steps, and nothing was trained;"
            f" {accepted.report()}"
        )


def _check_finite(update: Update, settings: Settings) -> None:
    total, _, longest = update.left_out()
    if longest >= settings.max_skipped:
        raise TrainingError(
            f"the loss or a gradient was not finite {longest} steps in a row ({total} in all):"
            " lower lr, raise warmup, set grad_clip_norm, or train in bf16 or fp32"
        )


def _row(state, terms, update, model, loader) -> dict[str, Any]:
    """The figures of a step: those that are not times."""
    values = {name: term.item() for name, term in terms.items()}
    state.note(values)
    return {
        "step": state.step,
        "epoch": (state.step - 1) // len(loader),
        "loss": values.pop("loss"),
        "terms": values,
        "lr": update.rate,
        "scale": model.logit_scale.exp().item(),
        "gradient_norm": update.norm.item(),
        "samples": state.samples,
        "skipped_samples": state.skipped_samples,
        "skipped_steps": update.left_out()[0],
    }


def _save_now(step: int, settings: Settings) -> bool:
    return settings.save_every is not None and step % settings.save_every == 0
