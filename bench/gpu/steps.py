"""Part "steps": training, distillation and inference compared with open_clip.

Whole steps and inference, eager and as one CUDA graph; the masks phase compared with TinyCLIP's
formula; convergence of 200 training steps compared with PyTorch's own ops; the commands on scanned
digits; finally both sides under torch.compile.
"""

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import registry
from bench.case import BOTH, FORWARD, FORWARD_GRAPHED, GRAPHED
from bench.gpu import phases
from bench.gpu.part import LEAST, Part, Run
from bench.measure import FAILED, NOT_RUN
from bench.run import Entry

_LARGE, _SMALL = "ViT-B-32", "TinyCLIP-ViT-8M-16-Text-3M"
_TRAINING, _ENCODING = (BOTH, GRAPHED), (FORWARD, FORWARD_GRAPHED)
# What is worth most comes first. Two graphs at batch 1024 do not fit 80 GB, and hide no launches.
_ORDER = (
    (f"train_step/{_LARGE} b256", "open_clip", _TRAINING),
    (f"encode_image/{_LARGE} b1", "open_clip", _ENCODING),
    (f"distill_step/{_SMALL} b256", "open_clip", _TRAINING),
    (f"train_step/{_LARGE} b64", "open_clip", _TRAINING),
    (f"train_step/{_LARGE} b1024", "open_clip", (BOTH,)),
    (f"train_step/{_SMALL} b256", "open_clip", _TRAINING),
    ("block/50x12h masked b256", "tinyclip-masked", (BOTH,)),
    ("block/197x12h masked b256", "tinyclip-masked", (BOTH,)),
    (f"encode_image/{_LARGE} b32", "open_clip", _ENCODING),
    (f"encode_image/{_LARGE} b256", "open_clip", _ENCODING),
    (f"train_step/{_SMALL} b1024", "open_clip", (BOTH,)),
    (f"distill_step/{_SMALL} b1024", "open_clip", (BOTH,)),
    (f"train_step/{_SMALL} b64", "open_clip", _TRAINING),
    (f"distill_step/{_SMALL} b64", "open_clip", _TRAINING),
    *((f"encode_image/{_SMALL} b{batch}", "open_clip", _ENCODING) for batch in (1, 32, 256)),
)
_COMPILED = tuple(
    (f"{step} b256", peer, (BOTH,))
    for step in (f"train_step/{_LARGE}", f"train_step/{_SMALL}", f"distill_step/{_SMALL}")
    for peer in ("open_clip-compile", "ours-compile")
)
_ROWS, _UNTIMED = 0.55, 0.5  # of what is left when they begin
_TOWER = {"layers": 2, "width": 64}
_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "head_width": 32, **_TOWER},
    "text_cfg": {"context_length": 16, "vocab_size": 558, "heads": 2, **_TOWER},
}
CURVES = ("clip fp32", "clip bf16", "affinity fp32", "affinity bf16")  # of bench.gpu.convergence
_OUTPUT_LINES = 6  # kept of each command's output: eval prints one metric a line
_RUN_STEPS = {"cuda": 250, "rehearsal": 2}


def _plan(rows: tuple, cases: str, patterns: list[str]) -> list[Entry]:
    found = {case.id: case for case in registry.select(registry.cases(cases), patterns)}
    return [
        Entry(found[name], mode, peer)
        for name, peer, modes in rows
        if name in found
        for mode in modes
    ]


def _entries(cases: str, patterns: list[str]) -> list[Entry]:
    return _plan(_ORDER + _COMPILED, cases, patterns)


def _notes() -> dict[str, Any]:
    blank = {"status": NOT_RUN, "seconds": 0.0}
    commands = {name: dict(blank) for name in ("train", "distill", "eval")}
    curves = {name: dict(blank) for name in CURVES}
    return {**phases.preparation("steps"), "convergence": curves, "commands": commands}


def _run(run: Run) -> bool:
    entries = _entries(run.cases, run.patterns)
    if not phases.prepare(run, "steps"):
        run.give_up(entries)
        return True
    run.runner.measure_machine(run.share(0.1))
    wrong = run.measure(_plan(_ORDER, run.cases, run.patterns), run.share(_ROWS))
    run.runner.release()  # what follows wants the device to itself
    if run.left >= LEAST:
        untimed(run, run.share(_UNTIMED))
    wrong |= run.measure(_plan(_COMPILED, run.cases, run.patterns), run.deadline)
    ended = [*run.written.data["convergence"].values(), *run.written.data["commands"].values()]
    return wrong or any(phase["status"].startswith(FAILED) for phase in ended)


def untimed(run: Run, deadline: float) -> None:
    """Run what is not timed concurrently: one convergence process per curve, and the commands."""
    more = ["--steps", "4"] if run.rehearsal else []
    command = [sys.executable, "-m", "bench.gpu.convergence", run.device]
    started = {}
    for name in CURVES:
        log = run.written.path.with_suffix(f".{name.replace(' ', '-')}.log")
        started[name] = phases.Logged([*command, name, *more], log)
    commands(run, deadline)
    for name, process in started.items():
        ended = process.end(deadline)
        with contextlib.suppress(ValueError):  # stopped before it printed its result
            ended |= json.loads(ended["output"])
        del ended["output"]
        run.written.note("convergence", {**run.written.data["convergence"], name: ended})
        print(f"convergence, {name}: {ended['status']}, {ended['seconds']} s", flush=True)


def commands(run: Run, deadline: float) -> None:
    """Run `tinyclip train`, `distill` and `eval` on digits in turn, recording each as it ends."""
    with tempfile.TemporaryDirectory(prefix="tinyclip-digits-") as folder:
        model = Path(folder) / "model.json"
        model.write_text(json.dumps(_CONFIG))
        shared = ["--train-data", "digits:train", "--batch-size", "256", "--lr", "1e-3"]
        shared += ["--steps", str(_RUN_STEPS[run.cases]), "--model", str(model)]
        shared += ["--tokenizer", "digits"]
        for name, words in (
            ("train", [*shared, "--name", "teacher"]),
            ("distill", [*shared, "--teacher", "logs/teacher/model", "--name", "student"]),
            ("eval", ["--model", "logs/student/model", "--data", "digits:validation"]),
        ):
            if deadline - time.monotonic() < LEAST:
                return
            log = run.written.path.with_suffix(f".{name}.log")
            command = [sys.executable, "-m", "tinyclip", name, *words]
            process = phases.Logged(command, log, Path(folder))
            ended = process.end(deadline)
            ended["output"] = process.text.strip().splitlines()[-_OUTPUT_LINES:]
            run.written.note("commands", {**run.written.data["commands"], name: ended})
            print(f"{name}: {ended}", flush=True)
            if ended["status"] != phases.ENDED:
                return


PART = Part(_entries, _notes, _run)
