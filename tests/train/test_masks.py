"""The phase that learns masks: what a run does with them, resumed, too; where the next begins."""

import json

import pytest
import torch

from tests.train import tiny
from tinyclip import train
from tinyclip.data import Loader
from tinyclip.data.digits import DigitScenes
from tinyclip.demo.runs import reader
from tinyclip.distill import AffinityMimicking, Masked, Masks, Ramp, Stage, sparsity_of
from tinyclip.models import CheckpointError, create_model, load_model
from tinyclip.train.optimizer import learning_rate


def masked(seed: int = 3, lr: float = 0.3) -> Masked:
    clip = tiny.model()
    return Masked(clip, Masks(clip.config), Ramp(0.0, 0.6, 6), lr=lr, seed=seed)


def fit(folder, resume=None, interrupted_at=None, **changes):
    """A run of twelve steps that learns masks; gives its summary and what was trained."""
    model = masked(changes.pop("seed", 3))
    options = {"model": model, "objective": model.constrained(tiny.Noisy()), "ema": None, **changes}
    if interrupted_at is not None:
        return tiny.interrupted(folder, interrupted_at, resume, **options)
    return tiny.fit(folder, resume, **options)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_masks_and_ends_with_the_pruned_model(tmp_path):
    seen = []
    summary, model = fit(tmp_path, at_step=lambda step, m: seen.append(type(m).__name__))
    assert seen == ["CLIP"] * 12 and summary.steps == 12
    assert tiny.weights(model.clip) != tiny.weights(tiny.model())
    said = [row["terms"] for row in rows(tmp_path)]
    assert all(
        terms.keys() == {"clip", "target", "sparsity", "lambda_1", "lambda_2"} for terms in said
    )
    assert [terms["target"] for terms in said[:7]] == pytest.approx([k / 10 for k in range(7)])
    sparsities = [terms["sparsity"] for terms in said]
    assert sparsities[0] < 0.05 < sparsities[-1] and sparsities == sorted(sparsities)
    multipliers = [terms["lambda_1"] for terms in said]
    assert multipliers[0] == 10 < multipliers[-1] and multipliers == sorted(multipliers)
    finished = load_model(tmp_path / "model").model
    wanted = model.finished()
    assert finished.config == wanted.config != model.clip.config
    assert tiny.weights(finished) == tiny.weights(wanted)
    kept = load_model(tmp_path / "checkpoints" / "step_00000012" / "model").model
    assert tiny.weights(kept) == tiny.weights(model.clip)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_run_draws_the_same_masks(tmp_path, precision):
    """Weights, log-alphas, multipliers and their moments, by SHA-256, after two interruptions."""
    _, whole = fit(tmp_path / "whole", precision=precision)
    fit(tmp_path / "cut", interrupted_at=2, precision=precision)
    fit(tmp_path / "cut", "latest", interrupted_at=8, precision=precision)
    _, model = fit(tmp_path / "cut", "latest", precision=precision)
    assert tiny.weights(model) == tiny.weights(whole)
    for step in (6, 9, 12):
        found = [tiny.fingerprint(tmp_path / name, step) for name in ("cut", "whole")]
        assert found[0] == found[1]
    ours, theirs = ([row["terms"] for row in rows(tmp_path / name)] for name in ("cut", "whole"))
    assert ours == theirs
    _, other = fit(tmp_path / "other", precision=precision, seed=4)
    assert tiny.weights(other) != tiny.weights(whole)


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    tiny.interrupted(tmp_path, at=4, ema=None)
    with pytest.raises(CheckpointError, match=r"it holds no value/masks\.image\.channels"):
        fit(tmp_path, "latest")


def test_under_checkpointing_the_step_is_the_same():
    wanted = {"steps": 4, "warmup": 0, "precision": "fp64"}
    _, plain = fit(None, **wanted)
    model = masked()
    model.clip.set_grad_checkpointing()
    _, other = tiny.fit(
        None, model=model, objective=model.constrained(tiny.Noisy()), ema=None, **wanted
    )
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.soak
def test_compiled_the_step_is_the_same():
    wanted = {"steps": 4, "warmup": 0, "precision": "fp64"}
    _, plain = fit(None, **wanted)
    _, other = fit(None, compile=True, **wanted)
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_run_that_another_has_begun(tmp_path):
    """Its steps, data, schedule and checkpoints go on from `first`, after an interruption, too."""
    seen = []

    class Look(tiny.Noisy):
        def __call__(self, image, text, scale, pair, group):
            seen.append(pair.image)
            return super().__call__(image, text, scale, pair, group)

    changes = {"first": 5, "warmup": 2, "objective": Look()}
    summary, whole = tiny.fit(tmp_path / "whole", **changes)
    assert (summary.steps, summary.samples) == (12, 7 * 8)
    wanted = [*tiny.Memory().epoch(0), *tiny.Memory().epoch(1)][5:12]
    assert all(torch.equal(a, b.pairs[0].image) for a, b in zip(seen, wanted, strict=True))
    found = rows(tmp_path / "whole")
    assert [row["step"] for row in found] == list(range(6, 13))
    assert [row["lr"] for row in found] == [learning_rate(k, 1e-2, 2, 7) for k in range(7)]
    tiny.interrupted(tmp_path / "cut", at=6, **changes)
    tiny.interrupted(tmp_path / "cut", at=8, resume="latest", **changes)
    assert not (tmp_path / "cut" / "checkpoints" / "step_00000009").exists()
    _, model = tiny.fit(tmp_path / "cut", "latest", **changes)
    assert tiny.weights(model) == tiny.weights(whole)
    assert tiny.fingerprint(tmp_path / "cut", 12) == tiny.fingerprint(tmp_path / "whole", 12)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"first": 12}, r"first must be an integer in 0..steps - 1 \(11\), got 12"),
        ({"first": -1}, "first must be an integer"),
        ({"first": 10}, r"warmup must be an integer in 0..steps - first \(2\), got 3"),
    ],
)
def test_first_is_checked(changes, rule):
    with pytest.raises(ValueError, match=rule):
        tiny.settings(**changes)


def test_the_target_is_reached():
    """On scanned digits: half of a small teacher goes, to 2 % of its parameters, and the student
    still knows what a new one does not."""
    tower = {"width": 32, "layers": 2}
    torch.manual_seed(0)
    teacher = create_model(
        {
            "embed_dim": 32,
            "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "head_width": 8, **tower},
            "text_cfg": {"context_length": 16, "vocab_size": 558, "heads": 4, **tower},
        }
    )
    loader = Loader(DigitScenes("train"), reader(), batch_size=16, seed=0)
    settings = train.Settings(steps=120, lr=3e-3, warmup=12)
    train.fit(teacher, train.Contrastive(), loader, settings, progress=False)
    stage = Stage(name="half", inherit="auto", sparsity=0.5, prune_at=300, sparsity_warmup=290)
    model = stage.masked(stage.start(teacher), teacher.config)
    objective = model.constrained(AffinityMimicking(teacher))
    settings = train.Settings(steps=300, lr=1e-3, warmup=300)
    summary = train.fit(model, objective, loader, settings, progress=False)
    first, last = summary.losses["sparsity"]
    assert first < 0.02 and last == pytest.approx(0.5, abs=0.02)
    left = sparsity_of(model.finished().config, teacher.config)
    assert left == pytest.approx(last, abs=0.02)
    begun, ended = summary.losses["affinity"]
    fresh = create_model(teacher.config)
    pair = next(loader.epoch(0)).pairs[0]
    unlearned = AffinityMimicking(teacher)(*fresh(*pair), pair)["affinity"].item()
    assert ended < begun + 0.5 * (unlearned - begun)
