"""Train the teacher and its students, and measure them on scenes that none has seen."""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyclip.data import Loader, Reader
from tinyclip.data.digits import PREPROCESS, DigitScenes, captions, vocabulary
from tinyclip.demo.recipe import TEACHER, VARIANTS, Recipe, student_config, teacher_config
from tinyclip.distill import AffinityMimicking, inherit
from tinyclip.eval import classification, encode_images, encode_texts, zero_shot_classifier
from tinyclip.eval.ranking import hits
from tinyclip.models import CLIP, Preprocess, Tokenizer, count_macs, create_model
from tinyclip.train import Contrastive, Run, Settings, fit

Row = dict[str, Any]
# With the teacher's own seed a new student would begin with a part of what the teacher began with.
_STUDENTS = 1_000


class Stopped(RuntimeError):
    """A signal ended a run before its last step: there is nothing to compare."""


class Scenes(NamedTuple):
    """Scenes as models read them: images (N, 3, 16, 32), labels (N,), what each one shows."""

    images: Tensor
    labels: Tensor


@lru_cache(maxsize=1)
def reader() -> Reader:
    """How all models of the demo read a scene."""
    tokens, merges = vocabulary()
    return Reader(Preprocess(**PREPROCESS), Tokenizer(tokens, merges, context_length=16))


def read_scenes(split: str, count: int | None = None) -> Scenes:
    """The fixed scenes of "validation" or "test"."""
    source = DigitScenes(split, count=count)
    batch = source.batch(range(len(source)), [reader()])
    return Scenes(batch.pairs[0].image, torch.from_numpy(source.labels))


def run_seed(
    seed: int, recipe: Recipe, folder: Path, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, CLIP]]:
    """Train everything for one seed.

    Args:
        seed: of weights and of the order of scenes.
        folder: where each run has a folder of its own.
        say: is told what comes next.

    Returns:
        A row of results.json a run, and the models that read right captions by name.

    Raises:
        Stopped: a signal came.
    """
    bench = Bench(seed, recipe, folder)
    count, place = 1 + len(VARIANTS) * len(recipe.noises), 1
    say(f"run 1 of {count}, seed {seed}: the teacher, {recipe.teacher_steps} steps")
    torch.manual_seed(seed)
    teacher = create_model(teacher_config())
    bench.train(TEACHER, teacher, Contrastive(), recipe.teacher_steps)
    models = {TEACHER: teacher}
    for noise in recipe.noises:
        for variant in VARIANTS:
            place += 1
            wrong = f", {noise:.0%} of the captions wrong" if noise else ""
            say(
                f"run {place} of {count}, seed {seed}: student {variant.name!r}, {variant.words},"
                f" {recipe.student_steps} steps{wrong}"
            )
            torch.manual_seed(_STUDENTS + seed)
            config = student_config()
            student = inherit(teacher, config) if variant.inherits else create_model(config)
            mimics = AffinityMimicking(
                teacher, alpha=recipe.alpha, teacher_scale=recipe.teacher_scale
            )
            objective = mimics if variant.mimics else Contrastive()
            bench.train(variant.name, student, objective, recipe.student_steps, noise)
            models.setdefault(variant.name, student)
    for name, rate in throughput(models, bench.test.images).items():
        for row in bench.rows:
            if row["name"] == name:
                row["pairs_per_second"] = rate
    return bench.rows, models


class Bench:
    """What the runs of a seed share, and their rows."""

    def __init__(self, seed: int, recipe: Recipe, folder: Path):
        self.seed, self.recipe, self.folder = seed, recipe, folder
        self.validation = read_scenes("validation")
        self.test = read_scenes("test", recipe.test_scenes)
        self.rows: list[Row] = []

    def train(self, name: str, model: CLIP, objective: Any, steps: int, noise: float = 0.0) -> None:
        """Train a model and add its row."""
        recipe, curve = self.recipe, []
        every = max(1, steps // recipe.curve_points)

        def at_step(step: int, model: CLIP) -> None:
            if step % every == 0 or step == steps:
                curve.append([step, zero_shot_exact(model, self.validation)])

        settings = Settings(
            steps=steps,
            lr=recipe.lr,
            wd=recipe.wd,
            beta2=recipe.beta2,
            warmup=steps // 10,
            grad_clip_norm=recipe.grad_clip_norm,
        )
        reading = reader()
        source = DigitScenes("train", noise=noise)
        loader = Loader(source, reading, batch_size=recipe.batch_size, seed=self.seed)
        folder = self.folder / f"{name}-{self.seed}{f'-noise{noise:g}' if noise else ''}"
        run = Run(
            folder,
            preprocess=reading.preprocess,
            tokenizer=reading.tokenizer,
            config={"settings": vars(settings), "model_cfg": model.config.to_dict()},
        )
        summary = fit(model, objective, loader, settings, run=run, at_step=at_step, title=name)
        if summary.stopped:
            raise Stopped(
                f"stopped by a signal after {summary.steps} of the {steps} steps of {name!r}: there"
                " is no report; the same command begins anew"
            )
        macs = count_macs(model.config, text_tokens=10)
        row = {
            "name": name,
            "seed": self.seed,
            "noise": noise,
            "steps": summary.steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs": macs.image + macs.text,
            "zero_shot_exact": zero_shot_exact(model, self.test),
            "recall_at_1": recall_at_1(model, self.test),
            "seconds": summary.seconds,
            "curve": curve,
            "losses": {term: list(ends) for term, ends in summary.losses.items()},
        }
        self.rows.append(row)


@contextmanager
def evaluating(model: CLIP):
    """Eval mode, and the mode that was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def zero_shot_exact(model: CLIP, scenes: Scenes) -> float:
    """The share of scenes whose caption is the first of all 1,600."""
    with evaluating(model), torch.no_grad():
        classifier = zero_shot_classifier(model, reader().tokenizer, captions())
        features = encode_images(model, scenes.images)
        return classification(features, classifier, scenes.labels)["acc1"]


def recall_at_1(model: CLIP, scenes: Scenes) -> float:
    """The share of captions, of those that some scene shows, that find such a scene first."""
    with evaluating(model), torch.no_grad():
        shown = scenes.labels.unique()
        texts = [captions()[label] for label in shown.tolist()]
        text = encode_texts(model, reader().tokenizer, texts)
        image = encode_images(model, scenes.images)
        return hits(text, image, shown, scenes.labels, (1,)).mean().item()


def throughput(models: dict[str, CLIP], images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Pairs a second, 1 / (1 / images + 1 / captions), at a batch of 256; medians of rounds in
    which the models take turns."""
    images = images[:256]
    text = reader().tokenizer(list(captions()[: len(images)]))[:, :10]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            with evaluating(model), torch.inference_mode():
                begun = time.perf_counter()
                model.encode_image(images)
                model.encode_text(text)
                taken = time.perf_counter() - begun
            if turn:  # the first round warms up
                seconds[name].append(taken)
    return {name: len(images) / statistics.median(taken) for name, taken in seconds.items()}
