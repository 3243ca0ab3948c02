"""``python -m bench gpu --tune``: every tile that our tables hold, timed on this device.

At CLIP's sizes, by the ops themselves: attention both ways at the five lengths, the MLP fused or
pointwise, the contrastive passes. What won is gated as the benchmarks are, then printed and written
as rows of triton_kernels/tables with every candidate's milliseconds beside it; the tables change by
hand. Ends within ``TUNE_BUDGET_S`` seconds (240), with what was timed by then.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import BEGUN, gate, phases, registry, report
from bench.case import Case

_KERNELS = "tinyclip.triton_kernels"
_TUNED = ("attention_fwd", "attention_bwd", "gelu_mlp")  # the modules that ask for a tile
_OPS = ("attention_qkv", "gelu_mlp", "contrastive_stats", "contrastive_grads")


class Tuner:
    """Stands in for `tuning.choose` until `deadline`; `rows` are the present case's."""

    def __init__(self, deadline: float):
        self.deadline, self.rows = deadline, []
        self._best: dict[Any, Any] = {}

    def choose(self, key: Any, milliseconds: Callable[[Any], float]) -> Any:
        """The fastest candidate of a key; rows do not count, so that the gate sees the same."""
        tuning = import_module(f"{_KERNELS}.tuning")
        known = key._replace(rows=0) if "rows" in key._fields else key
        if known not in self._best:
            row = key._asdict()
            if key.op == "gelu_mlp":
                row = {name: row[name] for name in ("kind", "arch", "bits")}
                row["at_least"] = [key.rows, key.k, key.f]
            self._best[known] = self.race(row, tuning.candidates(key), milliseconds)
        return self._best[known] or tuning.shipped(key)

    def race(self, row: dict, candidates: Iterable, milliseconds: Callable[[Any], float]) -> Any:
        """The fastest of `candidates`, None if time was up before the first."""
        timed, failed = {}, {}
        for tile in candidates:
            if time.monotonic() > self.deadline:
                break
            try:
                timed[tile] = milliseconds(tile)
            except Exception as error:  # it does not fit the chip, or does not compile
                failed[json.dumps(tile)] = f"{type(error).__name__}: {error}"[:200]
        best = min(timed, key=timed.get, default=None)
        if best is not None:
            ms = {json.dumps(tile): round(taken, 4) for tile, taken in timed.items()}
            row = {**row, "tile": list(best), "source": "measured", "ms": ms, "failed": failed}
            self.rows.append(row)
        return best

    def tune(self, case: Case, device: str) -> list[dict]:
        """Race for all that a case launches, judge it with what won; the rows."""
        import tinyclip
        from tinyclip import ops

        tensors, sizes, self.rows = case.draw(device), dict(case.sizes), []
        kernels, launch = (import_module(f"{_KERNELS}.{m}") for m in ("contrastive", "launch"))
        with contextlib.ExitStack() as stack:
            for module in (import_module(f"{_KERNELS}.{name}") for name in _TUNED):
                stack.enter_context(mock.patch.object(module, "choose", self.choose))
            stack.enter_context(mock.patch.dict(kernels.TILES))  # as it was, afterwards
            stack.enter_context(tinyclip.backend("triton"))
            if case.op.startswith("contrastive"):
                kind, bits = case.op.removeprefix("contrastive_"), case.dtype.itemsize * 8
                key = (kind, bits, "teacher_image" in tensors)
                tiles = [tile for at, tile in kernels.TILES.items() if at[1] == bits]

                def milliseconds(tile: Any) -> float:
                    with mock.patch.dict(kernels.TILES, {key: tile}):
                        call = lambda: case.call(ops, tensors, sizes)  # noqa: E731
                        return launch.time_call(call, tensors["image"])

                row = dict(zip(("kind", "bits", "teacher"), key, strict=True))
                best = self.race(row, dict.fromkeys([kernels.TILES[key], *tiles]), milliseconds)
                kernels.TILES[key] = best or kernels.TILES[key]
            else:
                out = case.call(ops, tensors, sizes)
                torch.autograd.grad(out, list(gate.leaves(tensors).values()), torch.ones_like(out))
            verdict = gate.check(case, device, lambda t, s: case.call(ops, t, s))
        judged = {"case": case.id, "gate": verdict.colour, "gate_detail": verdict.detail}
        return [{**row, **judged} for row in self.rows]


def main(patterns: list[str], base: Path, begun: float = BEGUN, device: str = "cuda") -> int:
    """Tune; 0 unless a gate was red."""
    if not torch.cuda.is_available():
        print("No CUDA device is available, so nothing was tuned.")
        return 0
    phases.reach()
    tuner = Tuner(begun + float(os.environ.get("TUNE_BUDGET_S") or 240))
    env = report.environment(device)
    path = report.results_file(base, env).with_suffix(".tiles.json")
    written = report.Report(path, env, [])
    cases = [case for case in registry.cases(device) if case.op in _OPS]
    large = [case for case in cases if not case.name.endswith((" b64", "quick_gelu"))]
    tiles: list[dict] = []
    for case in registry.select(large, patterns):
        try:
            found = tuner.tune(case, device) if time.monotonic() < tuner.deadline else []
        except Exception as error:
            print(f"{case.id}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        print(*map(json.dumps, found or [f"{case.id}: the budget was used up"]), sep="\n")
        tiles += found
        written.note("tiles", tiles)
    written.note("complete", True)
    print(f"tiles: {path}")
    return 1 if any(row["gate"] == "red" for row in tiles) else 0
