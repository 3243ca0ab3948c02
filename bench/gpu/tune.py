"""Part "tune": tiles timed on this device, those of our tables and a grid beyond them.

At CLIP's sizes, by the ops themselves: attention forward at the five lengths, which is least known,
then backward, the MLP fused or pointwise, the contrastive passes. What won is gated as the
benchmarks are and written as rows of triton_kernels/tables, every candidate's milliseconds beside
it; the tables change by hand.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from bench import gate, registry
from bench.case import Case, small
from bench.gpu import phases
from bench.gpu.part import Part, Run
from bench.measure import FAILED, MEASURED, NOT_RUN

_KERNELS = "tinyclip.triton_kernels"
_TUNED = ("attention_fwd", "attention_bwd", "gelu_mlp")  # the modules that ask for a tile
_LENGTHS = ("197x12h", "257x16h", "77 causal x8h", "577x16h", "50x12h")
_MLPS, _BOTH_WAYS = ("201728x768", "51200x768"), ("fwd", "bwd")
# (case, which of its launches), in the order of their worth
PLAN = (
    *((f"attention_qkv/{tower} b1024", kind) for kind in _BOTH_WAYS for tower in _LENGTHS),
    *((f"gelu_mlp/{rows} gelu", kind) for rows in _MLPS for kind in _BOTH_WAYS),
    *((f"contrastive_{kind}/32768", kind) for kind in ("stats", "grads")),
    *((f"contrastive_{kind}/32768 teacher", kind) for kind in ("stats", "grads")),
)
BACKENDS = {"cuda": "triton", "rehearsal": "auto"}  # a CPU runs no Triton: the plan alone
# Queries, keys, warps, stages of an attention tile.
_GRID = ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))


def grid(key: Any) -> list[Any]:
    """Tiles beyond the table's: of attention, all of _GRID that a length fills."""
    if key.op != "attention":
        return []
    longest = max(64, 1 << (key.length - 1).bit_length())
    tiles = (key.choice(*sizes) for sizes in itertools.product(*_GRID))
    # Four warps cannot hold the products of 128 x 128 in backward.
    return [
        tile
        for tile in tiles
        if max(tile[:2]) <= longest
        and not (key.kind == "bwd" and tile[:2] == (128, 128) and tile.num_warps == 4)
    ]


class Tuner:
    """Stands in for `tuning.choose` until `deadline`; `rows` are the present case's.

    Args:
        deadline: of time.monotonic.
        kind: which launches are raced; the others take the shipped tile.
        share: (n, count): race each count-th candidate from n on, to compile them beside others.
    """

    def __init__(self, deadline: float, kind: str, share: tuple[int, int] = (0, 1)):
        self.deadline, self.kind, self.share, self.rows = deadline, kind, share, []
        self._best: dict[Any, Any] = {}

    def choose(self, key: Any, milliseconds: Callable[[Any], float]) -> Any:
        """The fastest candidate of a key; rows do not count, so that the gate sees the same."""
        tuning = import_module(f"{_KERNELS}.tuning")
        if key.kind != self.kind:
            return tuning.shipped(key)
        known = key._replace(rows=0) if "rows" in key._fields else key
        if known not in self._best:
            row = key._asdict()
            if key.op == "gelu_mlp":
                row = {name: row[name] for name in ("kind", "arch", "bits")}
                row["at_least"] = [key.rows, key.k, key.f]
            tiles = dict.fromkeys([*tuning.candidates(key), *grid(key)])
            self._best[known] = self.race(row, tiles, milliseconds)
        return self._best[known] or tuning.shipped(key)

    def race(self, row: dict, candidates: Iterable, milliseconds: Callable[[Any], float]) -> Any:
        """The fastest of `candidates`, None if time was up before the first."""
        timed, failed = {}, {}
        number, count = self.share
        for tile in list(candidates)[number::count]:
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

    @contextlib.contextmanager
    def racing(self, backend: str) -> Iterator[None]:
        """Every tile that an op asks for is this object's to choose."""
        import tinyclip

        kernels = import_module(f"{_KERNELS}.contrastive")
        with contextlib.ExitStack() as stack:
            for module in (import_module(f"{_KERNELS}.{name}") for name in _TUNED):
                stack.enter_context(mock.patch.object(module, "choose", self.choose))
            stack.enter_context(mock.patch.dict(kernels.TILES))  # as it was, afterwards
            stack.enter_context(tinyclip.backend(backend))
            yield

    def launch(self, case: Case, device: str) -> None:
        """Call the op on the case's inputs, racing for the launches of `kind`."""
        from tinyclip import ops

        tensors, sizes, self.rows = case.draw(device), dict(case.sizes), []
        if case.op.startswith("contrastive"):
            self._race_contrastive(case, ops, tensors, sizes)
        else:
            out = case.call(ops, tensors, sizes)
            torch.autograd.grad(out, list(gate.leaves(tensors).values()), torch.ones_like(out))

    def _race_contrastive(self, case: Case, ops: Any, tensors: dict, sizes: dict) -> None:
        kernels, launch = (import_module(f"{_KERNELS}.{m}") for m in ("contrastive", "launch"))
        key = (self.kind, case.dtype.itemsize * 8, "teacher_image" in tensors)
        tiles = [tile for at, tile in kernels.TILES.items() if at[1] == key[1]]

        def milliseconds(tile: Any) -> float:
            with mock.patch.dict(kernels.TILES, {key: tile}):
                call = lambda: case.call(ops, tensors, sizes)  # noqa: E731
                return launch.time_call(call, tensors["image"])

        row = dict(zip(("kind", "bits", "teacher"), key, strict=True))
        best = self.race(row, dict.fromkeys([kernels.TILES[key], *tiles]), milliseconds)
        kernels.TILES[key] = best or kernels.TILES[key]

    def tune(self, case: Case, device: str, backend: str = "triton") -> list[dict]:
        """Race for what a case launches, judge it with what won; the rows."""
        from tinyclip import ops

        with self.racing(backend):
            self.launch(case, device)
            verdict = gate.check(case, device, lambda t, s: case.call(ops, t, s))
        judged = {"case": case.id, "gate": verdict.colour, "gate_detail": verdict.detail}
        return [{**row, **judged, "status": MEASURED} for row in self.rows]


def _call_once(call: Callable[[], object], on: torch.Tensor) -> float:
    """In the place of a clock."""
    call()
    return 0.0


def launches(cases: str, number: int, count: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """For `bench.gpu.warm`: of each sweep a share of the tiles, launched once on a small batch."""
    timers = [import_module(f"{_KERNELS}.{name}") for name in ("launch", "gelu_mlp")]
    device = "cuda" if cases == "cuda" else "cpu"

    def sweep(name: str, kind: str) -> None:
        tuner = Tuner(float("inf"), kind, (number, count))
        with contextlib.ExitStack() as stack:
            for module in timers:
                stack.enter_context(mock.patch.object(module, "time_call", _call_once))
            stack.enter_context(tuner.racing(BACKENDS[cases]))
            tuner.launch(small(registry.find(name, cases)), device)

    for name, kind in PLAN:
        yield f"{name} {kind}", partial(sweep, name, kind)


def _blank(name: str, kind: str) -> dict[str, Any]:
    return {"case": name, "kind": kind, "status": NOT_RUN, "gate": None}


def _notes() -> dict[str, Any]:
    return {**phases.preparation("tune"), "tiles": [_blank(*planned) for planned in PLAN]}


def _run(run: Run) -> bool:
    if not phases.prepare(run, "tune"):
        return True
    known = {case.id: case for case in registry.select(registry.cases(run.cases), run.patterns)}
    wrong = False
    for name, kind in PLAN:
        if name not in known or run.left <= 0:
            continue
        try:
            found = Tuner(run.deadline, kind).tune(known[name], run.device, BACKENDS[run.cases])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            found = [{**_blank(name, kind), "status": FAILED, "reason": reason}]
        for row in found:
            print(json.dumps(row), flush=True)
        wrong |= any(row["gate"] == "red" for row in found)
        others = [t for t in run.written.data["tiles"] if (t["case"], t["kind"]) != (name, kind)]
        run.written.note("tiles", others + (found or [_blank(name, kind)]))
    return wrong


PART = Part(lambda cases, patterns: [], _notes, _run)
