"""``tinyclip distill``: a TinyCLIP from a teacher (Wu et al. 2023), in one stage or in several."""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tinyclip import integrations
from tinyclip.distill import AffinityMimicking, Masked, Plan, Stage, read_plan
from tinyclip.models import CLIP, CheckpointError, load_model
from tinyclip.train import changes, checkpoint, options, start
from tinyclip.train.loop import Summary, fit
from tinyclip.train.ranks import Ranks
from tinyclip.train.run import Run
from tinyclip.train.settings import Settings

_OF_MASKS = ("sparsity", "prune_at", "start_sparsity", "sparsity_warmup", "mask_lr")
# What a recipe says of each stage, and the command line of the only one.
_OF_A_STAGE = ("model", "inherit", "through", "alpha", "logit_scale", "teacher_scale", *_OF_MASKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`tinyclip train`'s flags, and those of teacher and student."""
    group = parser.add_argument_group("teacher and student")
    group.add_argument(
        "--teacher", required=True, metavar="PATH", help="a folder or weight file of any layout"
    )
    group.add_argument("--teacher-model", metavar="NAME", help="the config of a bare weight file")
    group.add_argument(
        "--teacher-tokenizer", metavar="PATH", help="default: beside its weights, else CLIP's own"
    )
    group.add_argument(
        "--model", help="the student: a name, a config's JSON file, or a folder to go on from"
    )
    group.add_argument(
        "--inherit",
        nargs="?",
        const="teacher",
        choices=("teacher", "auto"),
        help="teacher, the default: begin with its leading layers, heads and channels; auto: with"
        " all of it (or of --model's weights), and learn which to keep",
    )
    group.add_argument(
        "--no-inherit", dest="inherit", action="store_const", const="none", help="begin anew"
    )
    group.add_argument(
        "--through",
        nargs="+",
        metavar="MODEL",
        help="choose the layers stage by stage, as if these students had come between",
    )
    group.add_argument(
        "--alpha", type=float, help="alpha x affinity + (1 - alpha) x CLIP's loss; default: 1"
    )
    group.add_argument(
        "--teacher-scale",
        type=float,
        help="of the teacher's similarities, fixed; default: --logit-scale, else its own",
    )
    group.add_argument(
        "--recipe", metavar="FILE", help="several students, one after the other: a TOML file"
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="the student's vocabulary, or 'digits'; default: the teacher's",
    )
    _add_masks(parser)
    options.add_data(parser)
    options.add_training(parser)
    options.add_run(parser)


def _add_masks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learned masks, with --inherit auto")
    group.add_argument(
        "--sparsity",
        type=float,
        help="the share of the teacher's attention and MLP parameters that is to be gone",
    )
    group.add_argument(
        "--prune-at", type=int, metavar="STEPS", help="of --steps, so many learn the masks"
    )
    group.add_argument("--start-sparsity", type=float, help="default: what the student begins with")
    group.add_argument(
        "--sparsity-warmup",
        type=int,
        metavar="STEPS",
        help="over which the target rises; default: a third of --prune-at",
    )
    group.add_argument("--mask-lr", type=float, help="of the masks; default: 0.02")


def run(args: argparse.Namespace) -> int:
    """Distill the student, or those of the recipe in turn, and say where each is."""
    plan = read_plan(args.recipe) if args.recipe else None
    _check(args)
    with start.process(args) as (device, ranks):
        folder = start.run_folder(args, args.model or args.recipe or args.teacher, ranks)
        teacher = _open_teacher(args)
        given = None
        if plan is None:
            given, plan = _only_stage(args)
        if given is None:
            plan.check(teacher.model.config)
        changes.say_overridden(args, plan)
        _check_masks(args, plan)
        teacher.model.to(device)
        previous = None
        for number, stage in enumerate(plan.stages):
            place = folder / stage.name if args.recipe else folder
            if (
                args.resume
                and number < len(plan.stages) - 1
                and (done := _finished(place, stage, changes.planned(args, stage)))
            ):
                previous = done.to(device)
                continue
            start.seed(args.seed)
            begins = given or _open_student(args, stage, teacher, previous)
            student = _Student(args, stage, begins, teacher, place, device, ranks)
            del begins  # the whole teacher's size, of which pruning keeps a part
            summary, run = student.train()
            start.report(summary, run, args, ranks)
            if summary.stopped:
                break
            previous = student.model
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.recipe is None:
        if args.model is None and args.inherit != "auto":
            raise ValueError("--model, the student, is missing (or --recipe, several of them)")
        return
    for name in _OF_A_STAGE:
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is said in the recipe, {args.recipe}, not beside it")
    if args.resume not in (None, "latest"):
        raise ValueError(f"--resume of a recipe must be latest, got {args.resume}")


def _check_masks(args: argparse.Namespace, plan: Plan) -> None:
    """What the command's own words may not be where a stage learns masks."""
    if not any(stage.inherit == "auto" for stage in plan.stages):
        return
    if args.resume not in (None, "latest"):
        raise ValueError(f"--resume of learned masks must be latest, got {args.resume}")
    if args.warmup is not None:
        raise ValueError(f"--warmup of learned masks is --prune-at: leave {args.warmup} out")


def _only_stage(args: argparse.Namespace) -> tuple[start.Start | None, Plan]:
    """The plan of one student; and the student itself, where --model brings its weights."""
    given, auto = None, args.inherit == "auto"
    config = None if args.model is None else start.config_of(args.model)
    if auto and config is not None:
        raise ValueError(f"--inherit auto begins with weights, and {args.model} has none: a folder")
    if config is None and args.model is not None:
        if args.inherit == "teacher" or args.through:
            raise ValueError(f"--inherit: {args.model} brings its own weights; give its config")
        model, preprocess, tokenizer = integrations.load(args.model)
        tokenizer = start.open_tokenizer(args.tokenizer, tokenizer, model.config)
        given = start.Start(model, preprocess, tokenizer)
        config = None if auto else model.config
    through = (
        start.config_of(name) or integrations.load(name)[0].config for name in args.through or ()
    )
    stage = Stage(
        name="student",
        config=config,
        inherit=args.inherit or ("none" if given else "teacher"),
        through=tuple(through),
        alpha=1.0 if args.alpha is None else args.alpha,
        logit_scale=args.logit_scale,
        teacher_scale=args.teacher_scale,
        **{name: getattr(args, name) for name in _OF_MASKS},
    )
    return given, Plan((stage,))


def _open_teacher(args: argparse.Namespace) -> start.Start:
    model, preprocess, tokenizer = integrations.load(args.teacher, model=args.teacher_model)
    tokenizer = start.open_tokenizer(args.teacher_tokenizer, tokenizer, model.config)
    return start.Start(model, preprocess, tokenizer)


def _open_student(
    args: argparse.Namespace, stage: Stage, teacher: start.Start, previous: CLIP | None
) -> start.Start:
    """A stage's student before its first step; it reads as the teacher does, where it can."""
    model = stage.start(teacher.model, previous)
    text = model.config.text
    tokenizer = None
    if text.vocab_size == teacher.model.vocab_size:
        tokenizer = teacher.tokenizer
        if tokenizer.context_length != text.context_length:
            tokenizer = copy.copy(tokenizer)
            tokenizer.context_length = text.context_length
    tokenizer = start.open_tokenizer(args.tokenizer, tokenizer, model.config)
    preprocess = replace(teacher.preprocess, size=model.config.vision.image_size)
    return start.Start(model, preprocess, tokenizer)


def _finished(folder: Path, stage: Stage, planned: dict[str, Any]) -> CLIP | None:
    """The student of a stage that has come to its end; None if it has not."""
    model = folder / "model"
    if not model.is_dir():
        return None
    changes.check_finished(folder, planned)
    checkpoint.verify(model)
    found = load_model(model).model
    if stage.config is not None and found.config != stage.config:
        raise CheckpointError(model, f"is another model than the recipe's stage {stage.name!r}")
    return found


class _Student:
    """A stage's student, and what its run, or its two runs, need."""

    def __init__(
        self,
        args: argparse.Namespace,
        stage: Stage,
        begins: start.Start,
        teacher: start.Start,
        folder: Path,
        device: torch.device,
        ranks: Ranks,
    ):
        self._args, self._stage, self._start, self._teacher = args, stage, begins, teacher
        self._folder, self._ranks = folder, ranks
        self.model = begins.model.to(device)
        self._loader = options.make_loader(args, [begins.reader, teacher.reader], ranks, device)
        said = {name: getattr(stage, name) for name in ("epochs", "steps", "lr", "warmup")}
        if stage.inherit == "auto":
            said["warmup"] = 0
        self._settings = options.make_settings(
            args, self._loader, device, **said, logit_scale=stage.logit_scale
        )
        self._objective = AffinityMimicking(
            teacher.model.to(self._settings.dtypes.parameters),
            alpha=stage.alpha,
            teacher_scale=stage.logit_scale if stage.teacher_scale is None else stage.teacher_scale,
        )

    def train(self) -> tuple[Summary, Run]:
        """Its one run; or that of its masks, and then that of the pruned student."""
        settings = self._settings
        if self._stage.inherit == "auto":
            stopped = self._learn_masks()
            if stopped:
                return stopped
            settings = replace(settings, first=self._stage.prune_at)
        return self._fit(self.model, self._objective, settings, self._folder)

    def _learn_masks(self) -> tuple[Summary, Run] | None:
        """Learn masks until `prune_at`, unless that is done, and prune; or what a signal ended."""
        stage, settings, folder = self._stage, self._settings, self._folder / "masks"
        if stage.prune_at >= settings.steps:
            raise ValueError(
                f"--prune-at must be below the {settings.steps} steps of the run, got"
                f" {stage.prune_at}"
            )
        if self._args.resume is None or not (folder / "model").is_dir():
            masked = stage.masked(self.model, self._teacher.model.config, self._args.seed)
            learning = replace(settings, steps=stage.prune_at, warmup=stage.prune_at, ema=None)
            objective = masked.constrained(self._objective)
            summary, run = self._fit(masked, objective, learning, folder, "masks")
            if summary.stopped:
                return summary, run
        checkpoint.verify(folder / "model")
        self.model = load_model(folder / "model").model.to(self.model.logit_scale.device)
        self._start = self._start._replace(model=self.model)
        if self._ranks.rank == 0:
            count = sum(parameter.numel() for parameter in self.model.parameters())
            print(f"pruned to {count:,} parameters: {folder / 'model'}")
        return None

    def _fit(
        self, model: CLIP | Masked, objective: Any, settings: Settings, folder: Path, what: str = ""
    ) -> tuple[Summary, Run]:
        args, stage = self._args, self._stage
        clip = model.clip if isinstance(model, Masked) else model
        clip.set_grad_checkpointing(args.grad_checkpointing)
        config = {
            "settings": vars(settings),
            "model_cfg": clip.config.to_dict(),
            "teacher_cfg": self._teacher.model.config.to_dict(),
            "alpha": stage.alpha,
            "teacher_scale": self._objective.teacher_scale,
            "inherit": stage.inherit,
            "stage": changes.planned(args, stage),
        }
        run = start.make_run(folder, self._start, args, config)
        start.seed(args.seed + self._ranks.rank)
        summary = fit(
            model,
            objective,
            self._loader,
            settings,
            run=run,
            resume=start.resume_from(args, folder),
            title=f"{'distill' if args.recipe is None else stage.name} {what}".strip(),
        )
        return summary, run
