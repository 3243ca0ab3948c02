"""``tinyclip distill``: a TinyCLIP from a teacher (Wu et al. 2023), in one stage or in several."""

import argparse
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyclip import integrations
from tinyclip.distill import AffinityMimicking, Plan, Stage, read_plan
from tinyclip.models import CLIP, CheckpointError, load_model
from tinyclip.train import changes, checkpoint, options, start
from tinyclip.train.loop import fit

# What a recipe says of each stage, and the command line of the only one.
_OF_A_STAGE = ("model", "inherit", "through", "alpha", "logit_scale", "teacher_scale")


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
        action=argparse.BooleanOptionalAction,
        help="begin with the teacher's leading layers, heads and channels; default: yes",
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
    options.add_data(parser)
    options.add_training(parser)
    options.add_run(parser)


def run(args: argparse.Namespace) -> int:
    """Distill the student, or those of the recipe in turn, and say where each is."""
    plan = read_plan(args.recipe) if args.recipe else None
    _check(args)
    with start.process(args) as (device, ranks):
        folder = start.run_folder(args, args.model or args.recipe, ranks)
        teacher = _open_teacher(args)
        given = None
        if plan is None:
            given, plan = _only_stage(args)
        if given is None:
            plan.check(teacher.model.config)
        changes.say_overridden(args, plan)
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
            student = given or _open_student(args, stage, teacher, previous)
            summary, run = _distill(args, stage, student, teacher, place, device, ranks)
            start.report(summary, run, args, ranks)
            if summary.stopped:
                break
            previous = student.model
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.recipe is None:
        if args.model is None:
            raise ValueError("--model, the student, is missing (or --recipe, several of them)")
        return
    for name in _OF_A_STAGE:
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is said in the recipe, {args.recipe}, not beside it")
    if args.resume not in (None, "latest"):
        raise ValueError(f"--resume of a recipe must be latest, got {args.resume}")


def _only_stage(args: argparse.Namespace) -> tuple[start.Start | None, Plan]:
    """The plan of one student; and the student itself, where --model brings its weights."""
    config, given = start.config_of(args.model), None
    if config is None:
        if args.inherit or args.through:
            raise ValueError(f"--inherit: {args.model} brings its own weights; give its config")
        model, preprocess, tokenizer = integrations.load(args.model)
        tokenizer = start.open_tokenizer(args.tokenizer, tokenizer, model.config)
        given, config = start.Start(model, preprocess, tokenizer), model.config
    through = (
        start.config_of(name) or integrations.load(name)[0].config for name in args.through or ()
    )
    inherit = "none" if given or args.inherit is False else "teacher"
    stage = Stage(
        name="student",
        config=config,
        inherit=inherit,
        through=tuple(through),
        alpha=1.0 if args.alpha is None else args.alpha,
        logit_scale=args.logit_scale,
        teacher_scale=args.teacher_scale,
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
    if found.config != stage.config:
        raise CheckpointError(model, f"is another model than the recipe's stage {stage.name!r}")
    return found


def _distill(args, stage, student, teacher, folder, device, ranks):
    model = student.model.to(device)
    model.set_grad_checkpointing(args.grad_checkpointing)
    loader = options.make_loader(args, [student.reader, teacher.reader], ranks, device)
    said = {name: getattr(stage, name) for name in ("epochs", "steps", "lr", "warmup")}
    settings = options.make_settings(args, loader, device, **said, logit_scale=stage.logit_scale)
    objective = AffinityMimicking(
        teacher.model.to(settings.dtypes.parameters),
        alpha=stage.alpha,
        teacher_scale=stage.logit_scale if stage.teacher_scale is None else stage.teacher_scale,
    )
    config = {
        "settings": vars(settings),
        "model_cfg": model.config.to_dict(),
        "teacher_cfg": teacher.model.config.to_dict(),
        "alpha": stage.alpha,
        "teacher_scale": objective.teacher_scale,
        "inherit": stage.inherit,
        "stage": changes.planned(args, stage),
    }
    run = start.make_run(folder, student, args, config)
    start.seed(args.seed + ranks.rank)
    summary = fit(
        model,
        objective,
        loader,
        settings,
        run=run,
        resume=start.resume_from(args, folder),
        title="distill" if args.recipe is None else stage.name,
    )
    return summary, run
