"""A run's folder: what is in it, and that a run which was interrupted ends where it would have."""

import errno
import json
import logging
import os
import random
import sys
from pathlib import Path

import pytest
import torch

import tinyclip
from tests.train import tiny
from tinyclip import train
from tinyclip.data import digits
from tinyclip.models import CheckpointError, Tokenizer
from tinyclip.train import checkpoint, rng


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, precision):
    """Weights, AdamW, the mean, the scaler and every generator, by SHA-256; noise in each step."""
    changes = {"precision": precision, "grad_clip_norm": 1.0}
    _, whole = tiny.fit(tmp_path / "whole", **changes)
    tiny.interrupted(tmp_path / "cut", at=5, **changes)
    tiny.interrupted(tmp_path / "cut", at=10, resume="latest", **changes)
    random.seed(99)
    summary, model = tiny.fit(tmp_path / "cut", "latest", **changes)
    assert tiny.weights(model) == tiny.weights(whole)
    for step in (6, 9, 12):
        assert tiny.fingerprint(tmp_path / "cut", step) == tiny.fingerprint(
            tmp_path / "whole", step
        )
    assert summary.steps == 12 and summary.samples == 96
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 13))
    for ours, theirs in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        for times in ("samples_per_second", "data_wait"):
            del ours[times], theirs[times]
        assert ours == theirs


def test_the_scaler_goes_on(tmp_path):
    """The first step is left out and halves the scale: a resumed run has it still."""

    class Overflow(tiny.Noisy):
        factor = float("inf")

        def __call__(self, *args):
            terms = super().__call__(*args)
            terms["loss"], self.factor = terms["loss"] * self.factor, 1.0
            return terms

    changes = {"precision": "fp16"}
    tiny.fit(tmp_path / "whole", objective=Overflow(), **changes)
    tiny.interrupted(tmp_path / "cut", at=7, objective=Overflow(), **changes)
    summary, _ = tiny.fit(tmp_path / "cut", "latest", **changes)
    wanted = tiny.fingerprint(tmp_path / "whole", 12)
    assert wanted["update"]["scaler"]["scale"] == 65536 * 0.5**summary.skipped_steps
    assert wanted["update"]["left_out"][0] == summary.skipped_steps >= 1
    assert tiny.fingerprint(tmp_path / "cut", 12) == wanted


def test_steps_in_a_row_are_counted_over_a_resume(tmp_path):
    class Never(train.Contrastive):
        def __call__(self, *args):
            return {"loss": super().__call__(*args)["loss"] * float("nan")}

    tiny.interrupted(tmp_path, at=4, objective=Never(), max_skipped=7)
    seen = []
    with pytest.raises(train.TrainingError, match="7 steps in a row"):
        tiny.fit(
            tmp_path, "latest", objective=Never(), max_skipped=7,
            at_step=lambda step, m: seen.append(step),
        )  # fmt: skip
    assert seen == [4, 5, 6]


def test_broken_samples_are_counted_over_a_resume(tmp_path):
    def loader():
        return tiny.Memory(broken=lambda epoch, batch, row: row == batch)

    whole, _ = tiny.fit(tmp_path / "whole", loader=loader(), max_bad_fraction=0.5)
    tiny.interrupted(tmp_path / "cut", at=8, loader=loader(), max_bad_fraction=0.5)
    summary, _ = tiny.fit(tmp_path / "cut", "latest", loader=loader(), max_bad_fraction=0.5)
    assert summary._replace(seconds=0) == whole._replace(seconds=0)
    names = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("cut", "whole")]
    assert names[0] == names[1] and names[0].count("\n") == 12


def test_what_a_folder_holds(tmp_path, caplog):
    config = {"arguments": {"lr": 0.1}}
    tokens, merges = digits.vocabulary()
    described = json.loads(json.dumps(tiny.CONFIG))
    described["text_cfg"]["vocab_size"] = len(tokens)
    model = tinyclip.create_model(described)
    tokenizer = Tokenizer(tokens, merges, 6)
    preprocess = tinyclip.models.Preprocess(8, mean=(0.1, 0.2, 0.3))
    run = train.Run(tmp_path, preprocess=preprocess, tokenizer=tokenizer, keep=2, config=config)
    train.fit(model, tiny.Noisy(), tiny.Memory(), tiny.settings(), run=run, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoints", "config.json", "ema", "environment.json", "metrics.jsonl"),
        *("model", "tensorboard", ".lock"),
    }
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [9, 12]
    assert json.loads((tmp_path / "config.json").read_text()) == config
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert environment["backends"].keys() == {
        "attention", "gelu_mlp", "layer_norm", "contrastive_loss",
    }  # fmt: skip
    first = rows(tmp_path)[0]
    assert first["lr"] == pytest.approx(1e-2 / 3) and first["terms"].keys() == {"clip"}
    for folder in (tmp_path / "model", tmp_path / "checkpoints" / "step_00000012" / "model"):
        loaded, reading, words = tinyclip.load(folder)
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
        assert reading == preprocess
        assert words._merges == tokenizer._merges
    mean, *_ = tinyclip.load(tmp_path / "ema")
    assert not torch.equal(mean.visual.proj, model.visual.proj)
    for path in tmp_path.rglob("*"):
        assert path.suffix in ("", ".json", ".jsonl", ".safetensors", ".sha256", ".txt") or (
            path.parent.name == "tensorboard"
        )


def test_tensorboard_events(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    tiny.interrupted(tmp_path, at=8)
    tiny.fit(tmp_path, "latest")
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 13))
    assert [event.value for event in losses] == pytest.approx(
        [row["loss"] for row in rows(tmp_path)], rel=1e-6
    )


def test_without_tensorboard_there_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING, "tinyclip"):
        tiny.fit(tmp_path)
    assert [m for m in caplog.messages if "TensorBoard" in m] == [
        "no TensorBoard events are written: pip install 'tinyclip[train]'"
    ]
    assert len(rows(tmp_path)) == 12


def test_two_runs_do_not_mix(tmp_path):
    tiny.interrupted(tmp_path, at=5)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run already: resume='latest' goes on with it"):
        tiny.fit(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl could not be written: No space left"):
        tiny.fit(tmp_path, "latest")

    def write_text(path, *args, **kwargs):
        raise full

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match=r"environment.json could not be written: No space left"):
        tiny.fit(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {".lock"}


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    tiny.interrupted(tmp_path, at=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    tiny.fit(tmp_path, "latest")
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


def test_resuming_what_never_saved_begins_anew(tmp_path):
    tiny.interrupted(tmp_path, at=2)
    _, model = tiny.fit(tmp_path, "latest")
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


FILES = (
    *("model/model.safetensors", "model/tinyclip.json", "ema/model.safetensors"),
    *("training.safetensors", "training.json", "manifest.sha256"),
)


DAMAGES = [(file, "flip") for file in FILES] + [
    ("training.safetensors", "cut"), ("training.json", "empty"), ("model/tinyclip.json", "gone"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, file, damage, caplog):
    tiny.interrupted(tmp_path, at=7)
    whole = tiny.weights(tiny.fit(None)[1])
    path = tmp_path / "checkpoints" / "step_00000006" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    keep = {"flip": len(data), "cut": len(data) // 2, "empty": 0, "gone": 0}[damage]
    path.unlink() if damage == "gone" else path.write_bytes(data[:keep])
    seen = []
    _, model = tiny.fit(tmp_path, "latest", at_step=lambda step, m: seen.append(step))
    assert seen[0] == 4
    (warning,) = (m for m in caplog.messages if "the checkpoint before it is used" in m)
    assert f"step_00000006/{file}" in warning or "manifest" in file
    assert tiny.weights(model) == whole
    checkpoint.verify(tmp_path / "checkpoints" / "step_00000006")


def test_leftovers_of_a_kill_do_not_matter(tmp_path):
    tiny.interrupted(tmp_path, at=5)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".step_00000006.part" / "model").mkdir(parents=True)
    (checkpoints / ".step_00000006.part" / "model" / "model.safetensors").write_bytes(b"half")
    (checkpoints / ".step_00000001.old").mkdir()
    _, model = tiny.fit(tmp_path, "latest")
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])
    assert list(checkpoint.steps(checkpoints)) == [6, 9, 12]
    assert len(list(checkpoints.iterdir())) == 3


def test_resuming_from_one_checkpoint(tmp_path):
    tiny.fit(tmp_path / "a", keep=9)
    step = tmp_path / "a" / "checkpoints" / "step_00000006"
    tiny.fit(tmp_path / "b", str(step), keep=9)
    assert tiny.fingerprint(tmp_path / "b", 12) == tiny.fingerprint(tmp_path / "a", 12)
    assert [row["step"] for row in rows(tmp_path / "b")] == list(range(7, 13))
    with pytest.raises(CheckpointError, match="2 checkpoints of this run come after it"):
        tiny.fit(tmp_path / "a", str(step))
    (tmp_path / "other").mkdir()
    around = tmp_path / "other" / ".." / "a" / "checkpoints"
    with pytest.raises(CheckpointError, match="2 checkpoints of this run come after it"):
        tiny.fit(tmp_path / "a", str(around / step.name))
    tiny.fit(tmp_path / "a", str(around / "step_00000012"))  # the newest may be named
    with pytest.raises(CheckpointError, match=r"manifest.sha256: cannot be read"):
        tiny.fit(tmp_path / "a", str(tmp_path / "nowhere"))


def test_a_finished_run_is_finished(tmp_path):
    first, model = tiny.fit(tmp_path)
    again, same = tiny.fit(tmp_path, "latest")
    assert again.steps == 12 and again.losses == first.losses
    assert tiny.weights(same) == tiny.weights(model)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"loader": tiny.Memory(count=56)}, "batches of the data was 6 and is 7 here"),
        ({"loader": tiny.Memory(count=24, global_batch=4)}, "global_batch of the data was 8 and"),
        ({"ema": None}, "ema: a mean of the weights is kept on one side only"),
        ({"precision": "fp16"}, "the precision is another"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, rule):
    tiny.interrupted(tmp_path, at=4)
    with pytest.raises(CheckpointError, match=rule):
        tiny.fit(tmp_path, "latest", **changes)


def test_another_model_is_refused(tmp_path):
    tiny.interrupted(tmp_path, at=4)
    config = json.loads(json.dumps(tiny.CONFIG))
    config["vision_cfg"]["layers"] = 2
    with pytest.raises(CheckpointError, match="is another model than the one to be trained"):
        tiny.fit(tmp_path, "latest", model=tinyclip.create_model(config))


def test_all_generators_go_on():
    tiny.seed()
    random.gauss(0, 1)  # leaves a second one for later
    states = json.loads(json.dumps(rng.snapshot()))

    def draw():
        import numpy as np

        return random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3)

    wanted = draw()
    tiny.seed(8)
    rng.restore(states)
    found = draw()
    assert found[:3] == wanted[:3] and torch.equal(found[3], wanted[3])
