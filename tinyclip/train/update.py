"""One step of the weights: unscale, judge, clip, AdamW, clamp, average.

Whether a step counts is decided on the device and never waited for: where the loss or a gradient
is not finite, the fused AdamW leaves everything as it is.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyclip.train.optimizer import clip_of, learning_rate, make_optimizer
from tinyclip.train.settings import Settings

MAX_LOG_SCALE = math.log(100)


class Update:
    """The optimizer, the gradient scaler, the mean of the weights, and a count of left-out steps.

    Args:
        model: a CLIP, or a module that holds one and adds parameters (`make_optimizer`), on the
            device it is trained on, in the parameters' dtype.
        settings: its precision says whether there is a scaler, its ema whether there is a mean.
        group: ranks that leave a step out together, or None.
    """

    def __init__(self, model: nn.Module, settings: Settings, group: object | None = None):
        self._clip, self._settings, self._group = clip_of(model), settings, group
        self._named = dict(model.named_parameters())
        of_clip = set(self._clip.parameters())
        # Saved here: a model's folder holds the CLIP.
        self._added = {name: p for name, p in self._named.items() if p not in of_clip}
        self.optimizer = make_optimizer(model, settings)
        device = self._clip.logit_scale.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtypes.scaled)
        self.ema = None
        if settings.ema is not None:
            if self._added:
                raise ValueError("ema must be None where more than a CLIP is trained, as masks are")
            self.ema = {name: p.detach().clone() for name, p in self._clip.named_parameters()}
        # Steps left out: altogether, in a row, and the longest such row.
        self._left_out = torch.zeros(3, dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)

    def __call__(self, step: int, loss: Tensor) -> None:
        """Differentiate `loss` and make step number `step` (from 0) of the run."""
        settings, optimizer, first = self._settings, self.optimizer, self._settings.first
        self.rate = learning_rate(
            step - first, settings.lr, settings.warmup, settings.steps - first
        )
        for group in optimizer.param_groups:
            if group.get("scheduled", True):
                group["lr"] = self.rate
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        bad = (~(self.norm.isfinite() & loss.detach().isfinite())).float()
        if self._group is not None:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._group)
        if settings.grad_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip_norm, self.norm)

        # What GradScaler.step sets, too: the fused AdamW reads both and makes no step if bad is 1.
        optimizer.grad_scale, optimizer.found_inf = None, bad
        optimizer.step()
        self.scaler.update()
        self._count(bad)
        with torch.no_grad():
            if settings.logit_scale is None:
                self._clip.logit_scale.clamp_(0, MAX_LOG_SCALE)
            for group in optimizer.param_groups:
                for parameter in group["params"] if "bounds" in group else ():
                    parameter.clamp_(*group["bounds"])
            if self.ema is not None:
                self._average(1 - bad)

    def _count(self, bad: Tensor) -> None:
        bad = bad.long()
        total, row, longest = self._left_out
        row = (row + 1) * bad
        self._left_out = torch.stack([total + bad, row, torch.maximum(longest, row)])

    def _average(self, good: Tensor) -> None:
        """Move the mean towards the weights by 1 - decay, or not at all if `good` is 0."""
        mean = list(self.ema.values())
        parameters = [p.detach() for p in self._clip.parameters()]
        distance = torch._foreach_sub(parameters, mean)
        torch._foreach_mul_(distance, (1 - self._settings.ema) * good.to(mean[0].dtype))
        torch._foreach_add_(mean, distance)

    def left_out(self) -> tuple[int, int, int]:
        """Steps that were left out: all, in a row until now, longest row. Waits for the device."""
        return tuple(self._left_out.tolist())

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's two moments and step counts, and the values of what is not in the CLIP; by
        the parameters' names."""
        state = self.optimizer.state
        return {
            f"{key}/{name}": value
            for name, parameter in self._named.items()
            for key, value in state.get(parameter, {}).items()
        } | {f"value/{name}": parameter.detach() for name, parameter in self._added.items()}

    def plain(self) -> dict[str, Any]:
        """What else there is to continue exactly, as JSON."""
        return {"left_out": self._left_out.tolist(), "scaler": self.scaler.state_dict()}

    def restore(
        self, tensors: dict[str, Tensor], plain: dict[str, Any], ema: dict[str, Tensor] | None
    ) -> None:
        """Continue from what `tensors` and `plain` gave, and from the mean of the weights.

        Raises:
            ValueError: the state is of another model, or of other settings.
        """
        named = {n: p for n, p in self._named.items() if p.requires_grad}
        state: dict[Tensor, dict[str, Tensor]] = {}
        missing = {f"value/{name}" for name in self._added} - tensors.keys()
        if missing:
            raise ValueError(f"it holds no {', '.join(sorted(missing))}")
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if name not in named or (kind != "step" and value.shape != named[name].shape):
                raise ValueError(f"the optimizer's {key!r} {tuple(value.shape)} fits no parameter")
            if kind == "value":
                named[name].data.copy_(value)
            else:
                state.setdefault(named[name], {})[kind] = value.to(named[name].device, copy=True)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        if bool(plain["scaler"]) != self.scaler.is_enabled():
            raise ValueError("the precision is another: one has a gradient scaler, one has none")
        if plain["scaler"]:
            self.scaler.load_state_dict(plain["scaler"])
        self._left_out = torch.tensor(plain["left_out"], device=self._left_out.device)
        if (ema is None) != (self.ema is None):
            raise ValueError("ema: a mean of the weights is kept on one side only")
        if ema is not None:
            for name, mean in self.ema.items():
                mean.copy_(ema[name])
