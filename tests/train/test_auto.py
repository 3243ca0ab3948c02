"""`tinyclip distill --inherit auto`: masks, pruning and what follows, as a user gives them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tinyclip
from tests.train import tiny
from tests.train.test_ranks import run_all
from tinyclip import cli
from tinyclip.distill import inherit, sparsity_of
from tinyclip.train import distill_command, loop

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "width": 24, "layers": 2,
                   "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 558, "width": 24, "heads": 3, "layers": 2},
}  # fmt: skip
DATA = ("--train-data", "digits:train?count=96", "--batch-size", "8", "--workers", "0")
SHORT = (*DATA, "--device", "cpu", "--lr", "1e-3", "--logs", ".", "--log-every-n-steps", "1")
TEACHER = ("--teacher", "t/model")
AUTO = (*TEACHER, "--inherit", "auto", "--sparsity", "0.5", "--prune-at", "9", "--steps", "14",
        "--mask-lr", "1", "--save-every-n-steps", "3", "--keep", "9")  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a teacher that has made a few steps."""
    monkeypatch.chdir(tmp_path)
    Path("teacher.json").write_text(json.dumps(CONFIG))
    words = ("--model", "teacher.json", "--tokenizer", "digits", "--steps", "6", "--name", "t")
    assert cli.main(["train", *SHORT, *words]) == 0
    return tmp_path


def distill(*more: str) -> int:
    return cli.main(["distill", *SHORT, *more])


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


def test_a_student_by_learned_masks(place, capsys):
    assert distill(*AUTO, "--name", "s", "--ema", "0.9") == 0
    out = capsys.readouterr().out
    teacher, pruned, student, mean = (
        tinyclip.load(name)[0] for name in ("t/model", "s/masks/model", "s/model", "s/ema")
    )
    assert student.config == pruned.config == mean.config != teacher.config
    count = sum(p.numel() for p in student.parameters())
    assert f"pruned to {count:,} parameters: s/masks/model\n" in out
    assert out.endswith("model: s/model\nema: s/ema\n")
    assert tiny.weights(student) != tiny.weights(pruned)
    learning, after = rows("s/masks"), rows("s")
    assert [row["step"] for row in learning] == list(range(1, 10))
    assert [row["step"] for row in after] == list(range(10, 15))
    assert [row["lr"] for row in learning] == pytest.approx([1e-3 * k / 9 for k in range(1, 10)])
    assert after[0]["lr"] == 1e-3 > after[-1]["lr"]
    names = {"affinity", "target", "sparsity", "lambda_1", "lambda_2"}
    assert all(row["terms"].keys() == names for row in learning)
    assert learning[0]["terms"]["target"] == pytest.approx(
        sparsity_of(teacher.config, teacher.config)
    )
    assert [row["terms"]["target"] for row in learning[3:]] == [0.5] * 6
    assert all(row["terms"].keys() == {"affinity"} for row in after)
    assert learning[0]["terms"]["sparsity"] < 0.05 < learning[-1]["terms"]["sparsity"]
    for folder, what in (("s/masks", CONFIG), ("s", student.config.to_dict())):
        said = json.loads(Path(folder, "config.json").read_text())
        assert said["inherit"] == "auto"
        assert tinyclip.create_model(said["model_cfg"]).config == (
            tinyclip.create_model(what).config
        )


def test_the_student_begins_as_its_teacher(place, monkeypatch):
    """All of its weights and its scale; and the student of the one before where it is given."""
    begun = []

    def noting(model, *args, **kwargs):
        clip = getattr(model, "clip", model)
        begun.append(tiny.weights(clip))
        return loop.fit(model, *args, **kwargs)

    monkeypatch.setattr(distill_command, "fit", noting)
    assert distill(*AUTO, "--name", "a") == 0
    more = ("--model", "a/model", "--sparsity", "0.9")
    assert distill(*AUTO, *more, "--name", "b") == 0
    teacher, pruned, first, second = (
        tinyclip.load(name)[0] for name in ("t/model", "a/masks/model", "a/model", "b/model")
    )
    assert begun[:3] == [tiny.weights(model) for model in (teacher, pruned, first)]
    assert sparsity_of(second.config, teacher.config) > sparsity_of(first.config, teacher.config)
    start = rows("b/masks")[0]["terms"]
    assert start["target"] == pytest.approx(sparsity_of(first.config, teacher.config))
    assert start["sparsity"] == pytest.approx(start["target"], abs=0.02)


@pytest.mark.parametrize(("phase", "at"), [("masks", 2), ("masks", 5), ("", 10), ("", 13)])
def test_the_end_is_the_uninterrupted_one(place, monkeypatch, phase, at):
    """Failed before and after the first checkpoint of either phase, then resumed: bit for bit."""
    assert distill(*AUTO, "--name", "whole") == 0

    def failing(*args, title, **kwargs):
        def fail(step, model):
            if title.endswith("masks") is bool(phase) and step == at:
                raise OSError("the machine is gone")

        return loop.fit(*args, title=title, at_step=fail, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill_command, "fit", failing)
        assert distill(*AUTO, "--name", "cut") == 1
    assert distill(*AUTO, "--name", "cut", "--resume", "latest") == 0
    for folder, step in (("masks", 9), (".", 14)):
        found = [tiny.fingerprint(Path(run, folder), step) for run in ("cut", "whole")]
        assert found[0] == found[1]
    assert distill(*AUTO, "--name", "cut", "--resume", "latest") == 0  # nothing is left to do
    assert tiny.fingerprint(Path("cut"), 14) == tiny.fingerprint(Path("whole"), 14)


def test_a_signal_while_masks_are_learned(place, monkeypatch, capsys):
    def signalled(*args, **kwargs):
        def ask(step, model):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        return loop.fit(*args, at_step=ask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill_command, "fit", signalled)
        assert distill(*AUTO, "--name", "cut") == 0
    assert "stopped after 4 steps, all saved" in capsys.readouterr().out
    assert not Path("cut", "model").exists() and not Path("cut", "masks", "model").exists()
    assert distill(*AUTO, "--name", "cut", "--resume", "latest") == 0
    assert distill(*AUTO, "--name", "whole") == 0
    assert tiny.fingerprint(Path("cut"), 14) == tiny.fingerprint(Path("whole"), 14)


@pytest.mark.soak
def test_killed_in_either_phase(place):
    """SIGKILL of the command itself, once while masks are learned and once after the pruning."""
    longer = (*AUTO, "--steps", "90", "--prune-at", "45", "--mask-lr", "0.2")
    command = [sys.executable, "-m", "tinyclip", "distill", *SHORT, *longer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    whole = start("--name", "whole")
    for folder in ("cut/masks", "cut"):
        metrics, deadline = Path(folder, "metrics.jsonl"), time.monotonic() + 120
        cut = start("--name", "cut", "--resume", "latest")
        while not metrics.is_file() or metrics.read_text().count("\n") < 7:
            assert cut.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        cut.kill()
        cut.communicate()
        assert cut.returncode == -signal.SIGKILL
    for process in (start("--name", "cut", "--resume", "latest"), whole):
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    for folder, step in (("masks", 45), (".", 90)):
        found = [tiny.fingerprint(Path(run, folder), step) for run in ("cut", "whole")]
        assert found[0] == found[1]


def test_two_processes_prune_as_one(place):
    """torchrun's two of 4 and one of 8, in fp64: the same masks, shapes and, to 1e-10, weights."""
    words = ("-m", "tinyclip", "distill", *SHORT, *AUTO, "--precision", "fp64", "--eps", "1e-4")
    words = [word if word not in ("--logs",) else "--logs-dir" for word in words]
    here = ["--teacher", str(place / "t/model"), "--logs-dir", str(place)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out, _ = run_all(
        [
            [*torchrun, *words, *here, "--name", "two", "--batch-size", "4"],
            [sys.executable, *words, *here, "--name", "one"],
        ]
    )
    assert out.count("pruned to ") == out.count("model: ") == 1
    for folder in ("masks/model", "model"):
        two, one = (tinyclip.load(place / name / folder)[0] for name in ("two", "one"))
        assert two.config == one.config
        worst = max(
            (a - b).abs().max().item()
            for a, b in zip(two.parameters(), one.parameters(), strict=True)
        )
        print(f"{folder}: worst difference {worst:.1e}")
        assert worst <= 1e-10


RECIPE = """
[defaults]
inherit = "auto"
steps = 11

[[stage]]
name = "75"
sparsity = 0.25
prune_at = 8
mask_lr = 1.0

[[stage]]
name = "50"
sparsity = 0.6
prune_at = 8
mask_lr = 1.0
steps = 12

[[stage]]
name = "manual"
inherit = "previous"
model = "one.json"
"""


def test_a_recipe_in_stages(place, monkeypatch):
    """Each stage masks the student before, counted of the teacher; resumed in the second."""
    one = json.loads(json.dumps(CONFIG))
    for tower in ("vision_cfg", "text_cfg"):
        one[tower] |= {"width": 8, "layers": 1, "layer_heads": [None], "layer_mlp_widths": [4]}
        one[tower]["head_width"] = 8
    Path("one.json").write_text(json.dumps(one))
    Path("auto.toml").write_text(RECIPE)
    words = (*TEACHER, "--recipe", "auto.toml", "--name", "r")

    def failing(*args, title, **kwargs):
        def fail(step, model):
            if title == "50 masks" and step == 3:
                raise OSError("the machine is gone")

        return loop.fit(*args, title=title, at_step=fail, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill_command, "fit", failing)
        assert distill(*words) == 1
    assert Path("r", "75", "model").is_dir() and not Path("r", "50", "model").exists()
    assert distill(*words, "--resume", "latest") == 0
    teacher, first, second, last = (
        tinyclip.load(name)[0] for name in ("t/model", "r/75/model", "r/50/model", "r/manual/model")
    )
    found = [sparsity_of(model.config, teacher.config) for model in (teacher, first, second)]
    assert found == sorted(found) and found[1] > 0.2 and found[2] > 0.5
    target = [row["terms"]["target"] for row in rows("r/50/masks")]
    assert target == pytest.approx([found[1] + (0.6 - found[1]) * min(1, k / 2) for k in range(8)])
    assert last.config == inherit(second, last.config).config
    assert [row["step"] for row in rows("r/50")] == list(range(9, 13))


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--inherit auto --prune-at 4", "sparsity must be a number between 0 and 1, got None"),
        ("--inherit auto --sparsity 0.5", "prune_at must be an integer from 1 on, got None"),
        ("--inherit auto --sparsity 1.5 --prune-at 4", "sparsity must be a number between"),
        ("--inherit auto --sparsity 0.001 --prune-at 4", "above what the student begins with"),
        ("--inherit auto --sparsity 0.5 --prune-at 14", "--prune-at must be below the 14 steps"),
        ("--inherit auto --sparsity 0.5 --prune-at 4 --warmup 2", "--warmup of learned masks is"),
        ("--inherit auto --sparsity 0.5 --prune-at 4 --through t/model", "through must be empty"),
        ("--inherit auto --sparsity 0.5 --prune-at 4 --model teacher.json", "begins with weights"),
        ("--inherit auto --sparsity 0.5 --prune-at 4 --resume x --name n", "must be latest"),
        ("--model teacher.json --sparsity 0.5", "sparsity must be left out where inherit is not"),
        ("--recipe no.toml --prune-at 3", "no such file"),
    ],
)
def test_wrong_words_are_one_sentence(place, capsys, words, rule):
    assert distill(*TEACHER, "--steps", "14", *words.split()) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("tinyclip distill: ") and rule in told
