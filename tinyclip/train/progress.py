"""What a person sees: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tinyclip import ops

_SECONDS = 5.0  # between lines where there is no terminal


class Progress:
    """Steps on stderr: tqdm where it is a terminal, else a line every few seconds.

    Args:
        first, steps: done already, and of the whole run.
        shown: False prints nothing, as on ranks but the first.
        title: what begins each line.
    """

    def __init__(self, first: int, steps: int, shown: bool, title: str = "train"):
        self._steps, self._shown, self._title, self._said = steps, shown, title, -_SECONDS
        self._bar, self._served = None, ""
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, initial=first, desc=title, dynamic_ncols=True, unit="step"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def serve(self, served: Mapping[str, str | None]) -> None:
        """Say which backend serves each operation, at length now and in short after each row."""
        self.say(f"{self._title}: {described(served)}")
        self._served = "  on " + "+".join(sorted({name or "none" for name in served.values()}))

    def show(self, row: Mapping[str, Any]) -> None:
        """The figures of a row of metrics, and the backends in use."""
        shown = figures(row) + self._served
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            return
        now = time.monotonic()
        if now - self._said >= _SECONDS or row["step"] == self._steps:
            self._said = now
            self.say(f"{self._title} {row['step']}/{self._steps}  {shown}")


def figures(row: Mapping[str, Any]) -> str:
    """A row of metrics, short."""
    terms = ", ".join(f"{name} {value:.3f}" for name, value in row["terms"].items())
    shown = [
        f"loss {row['loss']:.4f}" + (f" ({terms})" if terms else ""),
        f"{row['samples_per_second']:,.0f} samples/s",
        f"data {row['data_wait']:.0%}",
        f"lr {row['lr']:.2e}",
        f"scale {row['scale']:.1f}",
    ]
    if row["skipped_steps"]:
        shown.append(f"{row['skipped_steps']} steps left out")
    if row["skipped_samples"]:
        shown.append(f"{row['skipped_samples']} samples skipped")
    return "  ".join(shown)


def backends(model: Any, image: torch.Tensor, text: torch.Tensor) -> dict[str, str | None]:
    """Which backend serves each operation of a batch: asked with its shapes, without its memory.

    To be called under the autocast of the run.
    """
    config, device = model.config, image.device
    parameter = model.logit_scale.dtype
    autocast = torch.is_autocast_enabled(device.type)
    half = torch.get_autocast_dtype(device.type) if autocast else parameter
    vision, rows = config.vision, len(image)
    with FakeTensorMode():

        def made(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

        found = {}
        layer = next((x for x in vision.layers if x.heads), None)
        if layer is not None:
            qkv = made(rows, vision.tokens, 3, layer.heads, vision.head_dim)
            found["attention"] = ops.explain("attention_qkv", qkv)
        layer = next((x for x in vision.layers if x.mlp_width), None)
        x = made(rows, vision.tokens, vision.width)
        if layer is not None:
            wide, narrow = layer.mlp_width, vision.width
            weights = [
                made(*shape, dtype=parameter)
                for shape in ((wide, narrow), (wide,), (narrow, wide), (narrow,))
            ]
            found["gelu_mlp"] = ops.explain("gelu_mlp", x, *weights, activation=config.activation)
        norm = made(vision.width, dtype=parameter), made(vision.width, dtype=parameter)
        found["layer_norm"] = ops.explain("layer_norm", x, *norm)
        features = made(rows, config.embed_dim), made(rows, config.embed_dim)
        found["contrastive_loss"] = ops.explain("contrastive_loss", *features, 10.0)
    return {name: explanation.backend for name, explanation in found.items()}


def described(served: dict[str, str | None]) -> str:
    """Operations by backend, in words."""
    by_backend: dict[str, list[str]] = {}
    for name, backend in served.items():
        by_backend.setdefault(backend or "none", []).append(name)
    return "; ".join(f"{', '.join(names)} on {backend}" for backend, names in by_backend.items())
