"""What a run was told before and is told now; what a recipe says beside its command."""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tinyclip.distill import Plan, Stage
from tinyclip.models import CheckpointError
from tinyclip.models.files import read_json

_LOG = logging.getLogger("tinyclip")
# Of one start of the run, not of what it computes.
_PASSING = ("resume", "logs", "name", "workers", "device", "keep")
_LENGTHS = ("epochs", "steps")


def planned(args: argparse.Namespace, stage: Stage) -> dict[str, Any]:
    """All that a stage is to be trained with, as config.json holds it: the recipe's word, and the
    command's where the recipe says nothing."""
    said = {field.name: getattr(stage, field.name) for field in fields(stage)}
    del said["name"], said["config"]
    if all(said[name] is None for name in _LENGTHS):
        said |= {name: getattr(args, name) for name in _LENGTHS}
    for name in ("lr", "warmup"):
        if said[name] is None:
            said[name] = getattr(args, name)
    return json.loads(json.dumps(said, default=lambda config: config.to_dict()))


def say(folder: Path, given: Mapping[str, Any], stage: Mapping[str, Any] | None) -> None:
    """Warn of each argument, and each setting of a recipe's stage, that is not as it was."""
    before = folder / "config.json"
    if not before.is_file():
        return
    was = read_json(before)
    told = []
    for name, old, new in _differing(was.get("arguments"), json.loads(json.dumps(given))):
        if name not in _PASSING:
            told.append(name)
            _LOG.warning("--%s was %s and is %s now", name.replace("_", "-"), old, new)
    for name, old, new in _differing(was.get("stage"), stage):
        if name not in told:
            _LOG.warning("%s of the stage was %s and is %s now", name, _short(old), _short(new))


def check_finished(folder: Path, stage: Mapping[str, Any]) -> None:
    """Refuse a stage that came to its end with other settings than it is planned with now.

    Raises:
        CheckpointError: it did; the text names what was changed, and how to go on.
    """
    before = folder / "config.json"
    was = read_json(before).get("stage") if before.is_file() else None
    if changed := list(_differing(was, stage)):
        shown = ", ".join(f"{name} {_short(old)} (now {_short(new)})" for name, old, new in changed)
        raise CheckpointError(
            folder,
            f"this stage is finished, and was trained with {shown}: say that again, or remove its"
            " folder and those of the stages after it to train them anew",
        )


def say_overridden(args: argparse.Namespace, plan: Plan) -> None:
    """Warn of flags that do not hold for stages, because the recipe says it for them."""
    for name in (*_LENGTHS, "lr", "warmup"):
        if getattr(args, name) is None:
            continue
        alike = _LENGTHS if name in _LENGTHS else (name,)
        stages = [
            repr(stage.name)
            for stage in plan.stages
            if any(
                getattr(stage, other) is not None
                and (other, getattr(stage, other)) != (name, getattr(args, name))
                for other in alike
            )
        ]
        if stages:
            _LOG.warning(
                "--%s %s is not for %s: the recipe says it", name, getattr(args, name),
                ", ".join(stages),
            )  # fmt: skip


def _differing(
    was: Mapping[str, Any] | None, now: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of what differs; what was not kept before is no difference."""
    for name, old in (was or {}).items() if now is not None else ():
        if old != now.get(name):
            yield name, old, now.get(name)


def _short(value: Any) -> str:
    """A value in a sentence; configs, as of `through`, would be pages."""
    return str(value) if not isinstance(value, list) else f"{len(value)} models"
