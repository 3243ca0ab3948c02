"""How a model is trained: every number of it, checked once."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Under autocast; the parameters and the optimizer are fp32 then.
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISIONS = {
    "fp32": "fp32",
    "fp64": "fp64",
    "bf16": "bf16",
    "amp_bf16": "bf16",
    "amp_bfloat16": "bf16",
    "fp16": "fp16",
    "amp": "fp16",
}
PRECISIONS = tuple(_PRECISIONS)


class Precision(NamedTuple):
    """``parameters`` holds them, ``autocast`` computes with them (None: the same dtype)."""

    parameters: torch.dtype
    autocast: torch.dtype | None

    @property
    def scaled(self) -> bool:
        """Whether gradients need a scaler: fp16 has none of the small ones."""
        return self.autocast is torch.float16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `fit` does besides the model, the objective and the data.

    Args:
        steps: optimizer steps of the whole run.
        first: how many of them another run has made: this one begins there, in the data, too, and
            its schedule is that of the steps that are left.
        lr: the peak; rises linearly over `warmup` steps, then falls to 0 along a cosine.
        wd: decoupled weight decay of matrices; norms, biases and the scale have none.
        beta1, beta2, eps: AdamW's.
        warmup: steps.
        precision: "fp32", "fp64", "bf16" or "fp16" (autocast; the last with a gradient scaler).
            open_clip's "amp" is fp16, "amp_bf16" and "amp_bfloat16" are bf16.
        grad_clip_norm: the largest norm of all gradients together; None does not clip.
        logit_scale: a fixed multiplier of the similarities, as TinyCLIP's; None learns it,
            within 1 and 100.
        ema: decay of a running mean of the weights, such as 0.9999; None keeps none.
        max_skipped: stop after so many steps in a row with a loss or gradient that is not finite.
        max_bad_fraction: stop when more of the samples than this are broken.
        log_every: steps between lines of metrics.
        save_every: steps between checkpoints; None saves at the end, and when asked to stop.
        compile: run the model through torch.compile.

    Raises:
        ValueError: a value breaks a rule; the text names it.
    """

    steps: int
    first: int = 0
    lr: float = 5e-4
    wd: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 0
    precision: str = "fp32"
    grad_clip_norm: float | None = None
    logit_scale: float | None = None
    ema: float | None = None
    max_skipped: int = 100
    max_bad_fraction: float = 0.01
    log_every: int = 10
    save_every: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "max_skipped", "log_every", "save_every"):
            value = getattr(self, name)
            self._check(name, value, value is None or _whole(value, 1), "a positive integer")
        rule = f"an integer in 0..steps - 1 ({self.steps - 1})"
        self._check("first", self.first, _whole(self.first, 0, self.steps - 1), rule)
        left = self.steps - self.first
        what = "steps" if not self.first else "steps - first"
        rule = f"an integer in 0..{what} ({left})"
        self._check("warmup", self.warmup, _whole(self.warmup, 0, left), rule)
        self._check("lr", self.lr, _number(self.lr, 0.0), "a number >= 0")
        self._check("wd", self.wd, _number(self.wd, 0.0), "a number >= 0")
        self._check("eps", self.eps, _number(self.eps, 0.0), "a number >= 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._check(name, value, _number(value, 0.0) and value < 1, "a number in [0, 1)")
        for name in ("grad_clip_norm", "logit_scale"):
            value = getattr(self, name)
            good = value is None or (_number(value, 0.0) and value > 0)
            self._check(name, value, good, "a number > 0")
        good = self.ema is None or (_number(self.ema, 0.0) and self.ema < 1)
        self._check("ema", self.ema, good, "a number in [0, 1)")
        good = _number(self.max_bad_fraction, 0.0) and self.max_bad_fraction <= 1
        self._check("max_bad_fraction", self.max_bad_fraction, good, "a number in [0, 1]")
        good = self.precision in _PRECISIONS
        self._check("precision", self.precision, good, f"one of {', '.join(PRECISIONS)}")

    def _check(self, name: str, value: object, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(f"Settings: {name} must be {rule}, got {value!r}")

    @property
    def dtypes(self) -> Precision:
        """What the precision's name stands for."""
        kind = _PRECISIONS[self.precision]
        parameters = torch.float64 if kind == "fp64" else torch.float32
        return Precision(parameters, _HALVES.get(kind))


def _whole(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: object, low: float) -> bool:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good and math.isfinite(value) and value >= low
