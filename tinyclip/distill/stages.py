"""A plan of distillation in stages, read from TOML. Only a plan: `tinyclip.train` runs it.

Wu et al. 2023 (TinyCLIP), section 3.3: a student is made smaller step by step, each stage starting
from the one before and learning from the same teacher.
"""

import copy
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
from tinyclip.distill.masks import Masked, Masks, Ramp, sparsity_of
from tinyclip.models import CLIP, CLIPConfig, create_model, get_config

INHERIT = ("previous", "teacher", "none", "auto")
_OF_MASKS = ("sparsity", "prune_at", "start_sparsity", "sparsity_warmup", "mask_lr")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One student of a plan, and how it is trained; None is as the command says.

    Args:
        name: of the stage, and of its folder: letters, digits, ``.``, ``_``, ``-``.
        config: the student's; None where masks choose it.
        inherit: whose weights it starts from: ``"previous"`` is the student of the stage before (in
            the first stage the teacher), ``"teacher"`` the teacher, ``"none"`` nobody's; ``"auto"``
            is all of the one before, under masks that are learned and then cut away.
        through: configs between the two: the layers are chosen stage by stage (see `inherit`).
        epochs, steps: how long; not both.
        lr: the peak. warmup: steps; of learned masks the steps until `prune_at`.
        alpha: the weight of affinity mimicking, in [0, 1].
        logit_scale: fixed for student and teacher; None: each has its own.
        teacher_scale: fixed for the teacher alone.
        sparsity: with learned masks, the share of the teacher's attention and MLP parameters that
            is to be gone, in (0, 1). prune_at: how many steps learn the masks. Both must be given.
        start_sparsity: where the target begins; by default with what the student begins with.
        sparsity_warmup: steps over which the target rises; by default a third of `prune_at`.
        mask_lr: of the masks; by default 0.02.

    Raises:
        ValueError: a value breaks a rule; the text names it.
    """

    name: str
    config: CLIPConfig | None = None
    inherit: str = "previous"
    through: tuple[CLIPConfig, ...] = ()
    epochs: float | None = None
    steps: int | None = None
    lr: float | None = None
    warmup: int | None = None
    alpha: float = 1.0
    logit_scale: float | None = None
    teacher_scale: float | None = None
    sparsity: float | None = None
    prune_at: int | None = None
    start_sparsity: float | None = None
    sparsity_warmup: int | None = None
    mask_lr: float | None = None

    def __post_init__(self) -> None:
        rules = (
            (
                "name",
                _is_name(self.name),
                "letters, digits, '.', '_', '-', the first no '.' or '-'",
            ),
            ("inherit", self.inherit in INHERIT, f"one of {INHERIT}"),
            *(self._mask_rules() if self.inherit == "auto" else self._manual_rules()),
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

    def _manual_rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("config", isinstance(self.config, CLIPConfig), "a CLIPConfig"),
            ("through", not self.through or self.inherit != "none", "empty where nobody inherits"),
            *(
                (name, getattr(self, name) is None, "left out where inherit is not 'auto'")
                for name in _OF_MASKS
            ),
        ]

    def _mask_rules(self) -> list[tuple[str, bool, str]]:
        start, rise, lr = self.start_sparsity, self.sparsity_warmup, self.mask_lr
        return [
            ("config", self.config is None, "left out where masks choose it"),
            ("through", not self.through, "empty where masks choose"),
            ("warmup", self.warmup is None, "left out where masks are learned: it is prune_at"),
            ("sparsity", _above(self.sparsity) and self.sparsity < 1, "a number between 0 and 1"),
            ("prune_at", _whole(self.prune_at, 1), "an integer from 1 on"),
            ("start_sparsity", start is None or (_number(start) and 0 <= start < 1), "in [0, 1)"),
            ("sparsity_warmup", rise is None or _whole(rise, 0), "an integer from 0 on"),
            ("mask_lr", lr is None or _above(lr), "a number above 0"),
        ]

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
        if self.inherit == "auto":
            return copy.deepcopy(source).to(dtype=dtype).requires_grad_().train()
        return inherit_weights(source, self.config, through=self.through, dtype=dtype)

    def masked(self, student: CLIP, teacher: CLIPConfig, seed: int = 0) -> Masked:
        """The student of an automatic stage, with masks to be learned.

        Args:
            student: what `start` gave.
            teacher: the sparsity is counted of its parameters.
            seed: of the masks.

        Raises:
            ValueError: the student is as small as the stage is to make it.
        """
        had = sparsity_of(student.config, teacher)
        if self.sparsity <= had:
            raise ValueError(
                f"Stage: sparsity must be above what the student begins with, {had:.4f}, got"
                f" {self.sparsity!r}"
            )
        start = had if self.start_sparsity is None else self.start_sparsity
        rise = self.prune_at // 3 if self.sparsity_warmup is None else self.sparsity_warmup
        masks = Masks(student.config, teacher).to(student.logit_scale.device)
        lr = {} if self.mask_lr is None else {"lr": self.mask_lr}
        return Masked(student, masks, Ramp(start, self.sparsity, rise), seed=seed, **lr)


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
        reached = 0.0
        for stage in self.stages:
            try:
                previous = stage.start(original, previous)
                if stage.inherit == "auto":
                    stage.masked(previous, teacher)
                    if stage.sparsity <= reached:
                        raise ValueError(
                            f"Stage: sparsity must be above that of the stage before, {reached},"
                            f" got {stage.sparsity}"
                        )
                reached = stage.sparsity or 0.0
            except ValueError as error:
                raise ValueError(f"stage {stage.name!r}: {error}") from error


def read_plan(path: str | Path) -> Plan:
    """Read a plan: an array ``stage`` of tables, and ``defaults`` for all of them.

    Keys are `Stage`'s arguments, with ``model`` instead of ``config``: a name of `list_models`, a
    JSON file (beside the plan), or a table in open_clip's vocabulary; ``through`` is a list of
    such. A stage that learns masks has no ``model``. ``inherit`` may also be true ("previous") or
    false ("none"), ``logit_scale`` also "learned".

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
        if "model" not in table and {**defaults, **table}.get("inherit") != "auto":
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
    if "model" in values:
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
