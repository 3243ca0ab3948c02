"""A plan of distillation in stages, read from TOML. Only a plan: `tinyclip.train` runs it.

Wu et al. 2023 (TinyCLIP), section 3.3: a student is made smaller step by step, each stage starting
from the one before and learning from the same teacher.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tinyclip.distill.inherit import inherit as inherit_weights
from tinyclip.models import CLIP, CLIPConfig, create_model, get_config

INHERIT = ("previous", "teacher", "none")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One student of a plan, and how it is trained; None is as the command says.

    Args:
        name: of the stage, and of its folder: letters, digits, ``.``, ``_``, ``-``.
        config: the student's.
        inherit: whose weights it starts from: ``"previous"`` is the student of the stage before (in
            the first stage the teacher), ``"teacher"`` the teacher, ``"none"`` nobody's.
        through: configs between the two: the layers are chosen stage by stage (see `inherit`).
        epochs, steps: how long; not both.
        lr: the peak. warmup: steps.
        alpha: the weight of affinity mimicking, in [0, 1].
        logit_scale: fixed for student and teacher; None: each has its own.
        teacher_scale: fixed for the teacher alone.

    Raises:
        ValueError: a value breaks a rule; the text names it.
    """

    name: str
    config: CLIPConfig
    inherit: str = "previous"
    through: tuple[CLIPConfig, ...] = ()
    epochs: float | None = None
    steps: int | None = None
    lr: float | None = None
    warmup: int | None = None
    alpha: float = 1.0
    logit_scale: float | None = None
    teacher_scale: float | None = None

    def __post_init__(self) -> None:
        rules = (
            (
                "name",
                _is_name(self.name),
                "letters, digits, '.', '_', '-', the first no '.' or '-'",
            ),
            ("config", isinstance(self.config, CLIPConfig), "a CLIPConfig"),
            ("inherit", self.inherit in INHERIT, f"one of {INHERIT}"),
            ("through", not self.through or self.inherit != "none", "empty where nobody inherits"),
            ("epochs", self.epochs is None or _above(self.epochs), "a number above 0"),
            ("steps", self.steps is None or _whole(self.steps, 1), "an integer from 1 on"),
            ("lr", self.lr is None or _above(self.lr), "a number above 0"),
            ("warmup", self.warmup is None or _whole(self.warmup, 0), "an integer from 0 on"),
            ("alpha", _number(self.alpha) and 0 <= self.alpha <= 1, "a number from 0 to 1"),
            ("logit_scale", self.logit_scale is None or _above(self.logit_scale), "above 0"),
            ("teacher_scale", self.teacher_scale is None or _above(self.teacher_scale), "above 0"),
        )
        for name, good, rule in rules:
            if not good:
                raise ValueError(f"Stage: {name} must be {rule}, got {getattr(self, name)!r}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"Stage: epochs or steps, not both, got {self.epochs!r} and {self.steps!r}"
            )

    def start(
        self, teacher: CLIP, previous: CLIP | None = None, dtype: torch.dtype | None = None
    ) -> CLIP:
        """The student before its first step.

        Args:
            teacher: the plan's.
            previous: the student of the stage before, if there is one.
            dtype: of the parameters, by default those of the model it starts from.

        Raises:
            ValueError: the weights cannot be inherited; as `inherit`.
        """
        if self.inherit == "none":
            scale = teacher.logit_scale
            return create_model(self.config, device=scale.device, dtype=dtype or scale.dtype)
        source = teacher if self.inherit == "teacher" or previous is None else previous
        return inherit_weights(source, self.config, through=self.through, dtype=dtype)


@dataclass(frozen=True)
class Plan:
    """Stages, in order.

    Raises:
        ValueError: there is none, or two have one name.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"Plan: stages must be one at least, each of its own name, got {names}"
            )

    def check(self, teacher: CLIPConfig) -> None:
        """Raise now what a later stage would raise: every start is made without its values.

        Raises:
            ValueError: a stage cannot inherit what it is to inherit; the text names it.
        """
        original = previous = create_model(teacher, device="meta")
        for stage in self.stages:
            try:
                previous = stage.start(original, previous)
            except ValueError as error:
                raise ValueError(f"stage {stage.name!r}: {error}") from error


def read_plan(path: str | Path) -> Plan:
    """Read a plan: an array ``stage`` of tables, and ``defaults`` for all of them.

    Keys are `Stage`'s arguments, with ``model`` instead of ``config``: a name of `list_models`, a
    JSON file (beside the plan), or a table in open_clip's vocabulary; ``through`` is a list of
    such. ``inherit`` may also be true ("previous") or false ("none"), ``logit_scale`` also
    "learned".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or a key or value breaks a rule; the text names them.
    """
    path = Path(path)
    data = _read_toml(path)
    _known(path, data, ("defaults", "stage"))
    defaults, tables = data.get("defaults", {}), data.get("stage") or None
    keys = ["model", *(field.name for field in fields(Stage) if field.name != "config")]
    if not isinstance(defaults, Mapping):
        raise ValueError(f"{path}: defaults must be a table, [defaults]")
    _known(f"{path}: [defaults]", defaults, [k for k in keys if k not in ("name", "model")])
    if (
        not isinstance(tables, list)
        or not all(isinstance(t, Mapping) for t in tables)
        or not tables
    ):
        raise ValueError(f"{path}: stage must be an array of tables, each [[stage]]")
    stages = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: stage {number}"
        _known(where, table, keys)
        if "model" not in table:
            raise ValueError(f"{where}: key 'model' is missing")
        inherited = dict(defaults)
        if "epochs" in table or "steps" in table:
            inherited = {k: v for k, v in inherited.items() if k not in ("epochs", "steps")}
        try:
            stages.append(_stage({"name": f"stage-{number}", **inherited, **table}, path.parent))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
    try:
        return Plan(tuple(stages))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stage(values: dict[str, Any], folder: Path) -> Stage:
    values["config"] = _model(values.pop("model"), folder)
    through = values.get("through", [])
    if not isinstance(through, list):
        raise ValueError(f"through must be a list of models, got {through!r}")
    values["through"] = tuple(_model(one, folder) for one in through)
    if isinstance(values.get("inherit"), bool):
        values["inherit"] = "previous" if values["inherit"] else "none"
    if values.get("logit_scale") == "learned":
        values["logit_scale"] = None
    return Stage(**values)


def _model(model: object, folder: Path) -> CLIPConfig:
    if isinstance(model, str) and model.endswith(".json"):
        file = folder / model
        if not file.is_file():
            raise FileNotFoundError(f"model: {file}: no such file")
        data = json.loads(file.read_text(encoding="utf-8"))
        model = data.get("model_cfg", data) if isinstance(data, dict) else data
    return get_config(model)


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML: {error}") from error


def _known(where: object, table: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; keys are {', '.join(keys)}"
            raise ValueError(f"{where}: key {key!r} is not known{hint}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value, re.ASCII) is not None


def _number(value: object) -> bool:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and math.isfinite(value)


def _above(value: object) -> bool:
    return _number(value) and value > 0


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
