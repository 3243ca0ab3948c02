"""Learned masks beside manual inheritance on scanned digits: equal steps, equal size or less.

    python -m tests.distill.auto_digits OUT.json [SEEDS]

The teacher is the demo's. The manual student has half of its width, heads and hidden units in
every layer, a quarter of the parameters of the blocks; the other one is made of the teacher by
masks whose target is that sparsity, in half of its steps. Both mimic the teacher as the demo's do.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tinyclip.data import Loader
from tinyclip.data.digits import DigitScenes
from tinyclip.demo.recipe import Recipe, config, teacher_config
from tinyclip.demo.runs import read_scenes, reader, zero_shot_exact
from tinyclip.distill import AffinityMimicking, Stage, inherit, sparsity_of
from tinyclip.models import CLIP, count_macs, create_model, get_config
from tinyclip.train import Contrastive, Settings, fit

RECIPE = Recipe()
STEPS, BATCH, PRUNE_AT, RISE, MASK_LR = 400, 128, 200, 150, 0.05
MANUAL = config(64, 4, 3)


def settings(**changes: Any) -> Settings:
    recipe = RECIPE
    wanted = {"lr": recipe.lr, "wd": recipe.wd, "beta2": recipe.beta2, "log_every": 50}
    return Settings(**{**wanted, "grad_clip_norm": recipe.grad_clip_norm, **changes})


def automatic(teacher: CLIP, sparsity: float, objective: Any, loader: Loader, seed: int) -> CLIP:
    """What `tinyclip distill --inherit auto` does."""
    stage = Stage(
        name="auto", inherit="auto", sparsity=sparsity, prune_at=PRUNE_AT, sparsity_warmup=RISE,
        mask_lr=MASK_LR,
    )  # fmt: skip
    masked = stage.masked(stage.start(teacher), teacher.config, seed)
    learning = settings(steps=PRUNE_AT, warmup=PRUNE_AT)
    fit(masked, masked.constrained(objective), loader, learning, title=f"masks {seed}")
    student = masked.finished()
    fit(student, objective, loader, settings(steps=STEPS, first=PRUNE_AT), title=f"auto {seed}")
    return student


def manual(teacher: CLIP, objective: Any, loader: Loader, seed: int) -> CLIP:
    student = inherit(teacher, MANUAL)
    fit(
        student,
        objective,
        loader,
        settings(steps=STEPS, warmup=STEPS // 10),
        title=f"manual {seed}",
    )
    return student


def measured(name: str, seed: int, model: CLIP, teacher: CLIP, test: Any) -> dict[str, Any]:
    macs = count_macs(model.config, text_tokens=10)
    return {
        "name": name,
        "seed": seed,
        "zero_shot_exact": zero_shot_exact(model, test),
        "sparsity": sparsity_of(model.config, teacher.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs.image + macs.text,
        "config": model.config.to_dict(),
    }


def run_seed(seed: int, test: Any) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    teacher = create_model(teacher_config())
    source, steps = DigitScenes("train"), RECIPE.teacher_steps
    loader = Loader(source, reader(), batch_size=RECIPE.batch_size, seed=seed)
    fit(teacher, Contrastive(), loader, settings(steps=steps, warmup=steps // 10), title="teacher")
    target = sparsity_of(get_config(MANUAL), teacher.config)
    loader = Loader(source, reader(), batch_size=BATCH, seed=seed)
    objective = AffinityMimicking(teacher, alpha=RECIPE.alpha, teacher_scale=RECIPE.teacher_scale)
    rows = [measured("teacher", seed, teacher, teacher, test)]
    torch.manual_seed(1000 + seed)
    student = manual(teacher, objective, loader, seed)
    rows.append(measured("manual", seed, student, teacher, test))
    student = automatic(teacher, target, objective, loader, seed)
    rows.append(measured("auto", seed, student, teacher, test))
    return rows


def main() -> None:
    out, seeds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    torch.set_num_threads(1)
    test, rows = read_scenes("test"), []
    for seed in range(seeds):
        rows += run_seed(seed, test)
        setup = {"steps": STEPS, "batch": BATCH, "prune_at": PRUNE_AT, "mask_lr": MASK_LR}
        out.write_text(
            json.dumps({**setup, "sparsity_warmup": RISE, "runs": rows}, indent=1) + "\n"
        )
        for row in rows[-3:]:
            print({key: value for key, value in row.items() if key != "config"}, flush=True)


if __name__ == "__main__":
    main()
