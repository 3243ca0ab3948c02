"""`tinyclip train` and `tinyclip distill`: from a table and from shards, configs and folders."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import tinyclip
from tests.train import tiny
from tests.train.test_kills import CONFIG
from tinyclip import cli
from tinyclip.data import digits, open_data
from tinyclip.integrations.vocabulary import open_clip_vocabulary
from tinyclip.models import Tokenizer
from tinyclip.train import checkpoint, distill_command, loop


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: models, a table and shards of 48 digit scenes, and CLIP's vocabulary."""
    monkeypatch.chdir(tmp_path)
    source = open_data("digits:train?count=48")
    samples = [source.sample(index) for index in range(48)]
    Path("images").mkdir()
    lines = ["filepath,title"]
    with tarfile.open("shard-0.tar", "w") as first, tarfile.open("shard-1.tar", "w") as second:
        for index, sample in enumerate(samples):
            sample.image.save(f"images/{index}.png")
            lines.append(f"images/{index}.png,{sample.captions[0]}")
            picture = Path(f"images/{index}.png").read_bytes()
            for name, data in (("png", picture), ("txt", sample.captions[0].encode())):
                info = tarfile.TarInfo(f"{index:04d}.{name}")
                info.size = len(data)
                (first if index < 24 else second).addfile(info, io.BytesIO(data))
    Path("pairs.csv").write_text("\n".join(lines) + "\n")
    Path("tiny.json").write_text(CONFIG)
    large = json.loads(CONFIG)
    for tower in ("vision_cfg", "text_cfg"):
        large[tower] |= {"width": 32, "layers": 4}
    large["text_cfg"]["heads"] = 4
    Path("large.json").write_text(json.dumps(large))
    Tokenizer(*digits.vocabulary()).save("words")
    return tmp_path


SHORT = ("--batch-size", "8", "--workers", "0", "--device", "cpu", "--lr", "1e-3", "--logs", ".")


def start(command: str, *more: str) -> int:
    return cli.main([command, *SHORT, *more])


def trained(name: str, *more: str) -> None:
    """A run of the tiny model, or of what `more` says."""
    words = ("--train-data", "pairs.csv", "--model", "tiny.json", "--tokenizer", "words")
    assert start("train", *words, "--steps", "4", "--name", name, *more) == 0


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("data", ["pairs.csv", "shard-{0..1}.tar", "shard-0.tar::shard-1.tar"])
def test_train_on_a_table_and_on_shards(place, capsys, data):
    words = ("--model", "tiny.json", "--train-data", data, "--tokenizer", "words", "--name", "a")
    assert start("train", *words, "--epochs", "2", "--log-every-n-steps", "1") == 0
    assert capsys.readouterr().out.endswith("model: a/model\n")
    assert [row["step"] for row in rows("a")] == list(range(1, 13))
    assert rows("a")[-1]["samples"] == 96
    config = json.loads(Path("a", "config.json").read_text())
    assert config["arguments"]["train_data"] == data
    assert config["settings"]["steps"] == 12 and config["settings"]["warmup"] == 1
    model, preprocess, tokenizer = tinyclip.load("a/model")
    assert json.loads(json.dumps(model.config.to_dict())) == config["model_cfg"]
    assert preprocess.size == (16, 32)
    assert tokenizer(["a red seven left of a blue three"]).shape == (1, 16)


def test_train_resumes_and_says_what_changed(place, capsys, caplog):
    words = ("--model", "tiny.json", "--train-data", "pairs.csv", "--tokenizer", "words")
    short = (*words, "--save-every-n-steps", "4", "--keep", "9")
    assert start("train", *short, "--steps", "8", "--warmup", "0", "--name", "a") == 0
    assert start("train", *short, "--steps", "8", "--name", "a") == 1
    assert "a holds a run already: --resume latest goes on with it" in capsys.readouterr().err
    for step in (8,):
        checkpoint.remove(Path("a", "checkpoints", f"step_{step:08d}"))
    again = (*short, "--steps", "8", "--warmup", "0", "--resume", "latest", "--name", "a")
    before = tiny.weights(tinyclip.load("a/model")[0])
    assert start("train", *again) == 0
    assert tiny.weights(tinyclip.load("a/model")[0]) == before
    assert not [m for m in caplog.messages if " was " in m]
    assert start("train", *again, "--wd", "0.1", "--steps", "10") == 0
    changed = [m for m in caplog.messages if " was " in m]
    assert changed == ["--steps was 8 and is 10 now", "--wd was 0.2 and is 0.1 now"]
    assert rows("a")[-1]["step"] == 10


def test_resuming_with_other_data_of_the_same_size_is_refused(place, capsys):
    """A caption is another one; the same data elsewhere are the same data; and a checkpoint of
    before there were fingerprints goes on."""
    words = ("--model", "tiny.json", "--tokenizer", "words", "--steps", "6", "--name", "a")
    assert start("train", *words, "--train-data", "pairs.csv", "--save-every-n-steps", "4") == 0
    checkpoint.remove(Path("a", "checkpoints", "step_00000006"))
    table = Path("pairs.csv").read_text()
    Path("moved").mkdir()
    Path("images").rename("moved/images")
    Path("moved/pairs.csv").write_text(table)
    Path("moved/other.csv").write_text(table.replace("images/7.png,a ", "images/7.png,no ", 1))
    again = (*words, "--resume", "latest", "--train-data")
    assert start("train", *again, "moved/other.csv") == 1
    assert "the data lists other samples" in capsys.readouterr().err
    assert start("train", *again, "moved/pairs.csv") == 0
    kept = Path("a", "checkpoints", "step_00000004")
    checkpoint.remove(Path("a", "checkpoints", "step_00000006"))

    def without(part: Path) -> None:
        shutil.copytree(kept, part, dirs_exist_ok=True)
        (part / checkpoint.MANIFEST).unlink()
        training = json.loads((part / "training.json").read_text())
        del training["data"]["samples"]
        (part / "training.json").write_text(json.dumps(training))

    checkpoint.commit(Path("a", "checkpoints", "step_00000005"), without)
    checkpoint.remove(kept)
    Path("a/checkpoints/step_00000005").rename(kept)
    assert start("train", *again, "moved/other.csv") == 0


def test_train_goes_on_from_a_folder(place):
    words = ("--train-data", "pairs.csv", "--steps", "4")
    assert (
        start("train", *words, "--model", "tiny.json", "--tokenizer", "words", "--name", "a") == 0
    )
    assert start("train", *words, "--model", "a/model", "--lr", "0", "--name", "b") == 0
    first, second = (tinyclip.load(f"{name}/model")[0] for name in "ab")
    assert tiny.weights(first) == tiny.weights(second)
    pretrained = ("--model", "tiny.json", "--pretrained", "a/model", "--tokenizer", "words")
    assert start("train", *words, *pretrained, "--lr", "0", "--name", "c") == 0
    assert tiny.weights(tinyclip.load("c/model")[0]) == tiny.weights(first)


def test_train_flags_reach_the_run(place):
    assert start(
        *("train", "--model", "tiny.json", "--train-data", "digits:train?count=64"),
        *("--tokenizer", "digits", "--train-num-samples", "32", "--epochs", "1.5", "--name", "a"),
        *("--wd", "0.3", "--beta1", "0.8", "--beta2", "0.9", "--eps", "1e-7", "--warmup", "3"),
        *("--grad-clip-norm", "5", "--logit-scale", "50", "--ema", "0.5", "--grad-checkpointing"),
        *("--precision", "amp_bf16", "--max-skipped", "7", "--max-bad-fraction", "0.2"),
        *("--seed", "3", "--save-every-n-steps", "2", "--log-every-n-steps", "3", "--keep", "2"),
    ) == 0  # fmt: skip
    assert json.loads(Path("a", "config.json").read_text())["settings"] == {
        "steps": 6, "lr": 1e-3, "wd": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-7, "warmup": 3,
        "precision": "amp_bf16", "grad_clip_norm": 5.0, "logit_scale": 50.0, "ema": 0.5,
        "max_skipped": 7, "max_bad_fraction": 0.2, "log_every": 3, "save_every": 2, "first": 0,
        "compile": False,
    }  # fmt: skip
    assert [row["step"] for row in rows("a")] == [1, 3, 6]
    assert rows("a")[-1]["scale"] == pytest.approx(50.0)
    assert list(checkpoint.steps(Path("a", "checkpoints"))) == [4, 6]
    assert Path("a", "ema", "model.safetensors").is_file()


def test_broken_pictures_are_named(place, capsys):
    Path("images", "5.png").write_text("<html>not found</html>")
    words = ("--model", "tiny.json", "--train-data", "pairs.csv", "--tokenizer", "words")
    assert start("train", *words, "--epochs", "2", "--name", "a") == 1
    *_, said, sample, where = capsys.readouterr().err.splitlines()
    assert "1 of 48 samples are broken" in said and sample.startswith("  images/5.png: ")
    assert where == "all are listed in a/skipped.jsonl"
    more = ("--epochs", "2", "--name", "b", "--max-bad-fraction", "0.1")
    assert start("train", *words, *more) == 0
    skipped = [json.loads(line) for line in Path("b", "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 2 and "5.png" in skipped[0]["key"]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--model nowhere --tokenizer words", "'nowhere' is not known"),
        ("--model tiny.json --tokenizer nowhere", "'nowhere' is no path here"),
        ("--model tiny.json", "are more than the 558 of the model"),
        ("--model tiny.json --tokenizer words --epochs 1 --steps 3", "--epochs and --steps say"),
        ("--model tiny.json --tokenizer words --epochs 0", "--epochs must be a number above 0"),
        ("--model tiny.json --tokenizer words --train-num-samples 0", "must be a positive integer"),
        ("--model tiny.json --tokenizer words --train-num-samples -5", "positive integer, got -5"),
        ("--model tiny.json --tokenizer words --steps 3 --warmup 4", "warmup must be an integer"),
        ("--model tiny.json --tokenizer words --batch-size 64", "fewer than one batch of 64"),
        ("--model tiny.json --tokenizer words --resume latest", "--resume latest needs --name"),
        ("--model tiny.json --tokenizer words --resume gone --name a", "manifest.sha256"),
        ("--model tiny.json --tokenizer words --keep 0", "keep must be a positive integer"),
        ("--model tiny.json --tokenizer words --device cuda", "torch sees no GPU here"),
    ],
)
def test_wrong_calls_are_one_sentence(place, capsys, words, rule):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert start("train", "--train-data", "pairs.csv", *words.split()) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("tinyclip train: ") and rule in told


def test_distill_inherits_and_mimics(place, monkeypatch):
    objectives = []

    def noting(model, objective, *args, **kwargs):
        objectives.append((objective.alpha, objective.teacher_scale))
        return loop.fit(model, objective, *args, **kwargs)

    monkeypatch.setattr(distill_command, "fit", noting)
    data = ("--train-data", "pairs.csv")
    assert start("train", *data, "--model", "large.json", "--tokenizer", "words", "--steps", "6",
                 "--name", "teacher") == 0  # fmt: skip
    teacher = ("--teacher", "teacher/model", *data, "--model", "tiny.json")
    assert start("distill", *teacher, "--steps", "6", "--name", "student", "--alpha", "0.5",
                 "--log-every-n-steps", "1", "--logit-scale", "50") == 0  # fmt: skip
    assert rows("student")[0]["terms"].keys() == {"affinity", "clip"}
    assert rows("student")[0]["scale"] == pytest.approx(50.0)
    assert start("distill", *teacher, "--steps", "1", "--lr", "0", "--name", "start") == 0
    large, *_ = tinyclip.load("teacher/model")
    small, preprocess, tokenizer = tinyclip.load("start/model")
    assert torch.equal(small.visual.conv1.weight, large.visual.conv1.weight[:16])
    assert tokenizer.vocab_size == 558 and preprocess.size == (16, 32)
    assert start("distill", *teacher, "--steps", "1", "--lr", "0", "--name", "new",
                 "--no-inherit", "--logit-scale", "50", "--teacher-scale", "10") == 0  # fmt: skip
    assert objectives == [(0.5, 50.0), (1.0, None), (1.0, 10.0)]
    assert rows("new")[0]["scale"] == pytest.approx(50.0)
    fresh, *_ = tinyclip.load("new/model")
    assert not torch.equal(fresh.visual.conv1.weight, small.visual.conv1.weight)


def test_the_config_of_a_bare_teacher_is_a_file(place):
    trained("t", "--model", "large.json")
    Path("t/model/model.safetensors").rename("bare.safetensors")
    words = ("--teacher", "bare.safetensors", "--teacher-tokenizer", "words", "--steps", "1")
    words += ("--train-data", "pairs.csv", "--model", "tiny.json", "--name", "s")
    assert start("distill", *words, "--teacher-model", "large.json") == 0
    teacher = json.loads(Path("s", "config.json").read_text())["teacher_cfg"]
    assert teacher["vision_cfg"]["layers"] == 4


def test_distill_goes_through_a_stage_between(place):
    layers = {"large.json": 4, "three.json": 3, "two.json": 2}
    for name, count in layers.items():
        config = json.loads(Path("large.json").read_text())
        for tower in ("vision_cfg", "text_cfg"):
            config[tower]["layers"] = count
        Path(name).write_text(json.dumps(config))
    data = ("--train-data", "pairs.csv", "--steps", "1", "--lr", "0")
    assert (
        start("train", *data, "--model", "large.json", "--tokenizer", "words", "--name", "t") == 0
    )
    student = (*data, "--teacher", "t/model", "--model", "two.json")
    assert start("distill", *student, "--name", "once") == 0
    assert start("distill", *student, "--name", "through", "--through", "three.json") == 0
    teacher, once, through = (tinyclip.load(f"{n}/model")[0] for n in ("t", "once", "through"))
    for layer, (direct, between) in enumerate([(0, 0), (2, 1)]):
        for model, source in ((once, direct), (through, between)):
            ours = model.visual.transformer.resblocks[layer].state_dict()
            theirs = teacher.visual.transformer.resblocks[source].state_dict()
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


RECIPE = """
[defaults]
steps = 6
lr = 2e-3

[[stage]]
name = "half"
model = "half.json"

[[stage]]
name = "small"
model = "tiny.json"
steps = 8
warmup = 2
alpha = 0.5
logit_scale = 50
"""


@pytest.fixture
def staged(place):
    half = json.loads(Path("large.json").read_text())
    for tower in ("vision_cfg", "text_cfg"):
        half[tower]["layers"] = 2
    Path("half.json").write_text(json.dumps(half))
    Path("recipe.toml").write_text(RECIPE)
    words = ("--model", "large.json", "--tokenizer", "words", "--steps", "4", "--name", "t")
    assert start("train", "--train-data", "pairs.csv", *words) == 0
    return ("--teacher", "t/model", "--train-data", "pairs.csv", "--recipe", "recipe.toml")


def test_distill_in_stages(staged, capsys, monkeypatch):
    begun = {}

    def noting(model, *args, title, **kwargs):
        begun[title] = model.visual.conv1.weight.detach().clone()
        return loop.fit(model, *args, title=title, **kwargs)

    monkeypatch.setattr(distill_command, "fit", noting)
    assert start("distill", *staged, "--name", "r") == 0
    teacher, half = (tinyclip.load(f"{name}/model")[0] for name in ("t", "r/half"))
    assert torch.equal(begun["half"], teacher.visual.conv1.weight)
    assert torch.equal(begun["small"], half.visual.conv1.weight[:16])
    assert not torch.equal(half.visual.conv1.weight, teacher.visual.conv1.weight)
    assert capsys.readouterr().out.endswith("model: r/small/model\n")
    settings = [
        json.loads(Path("r", name, "config.json").read_text())["settings"]
        for name in ("half", "small")
    ]
    assert [(s["steps"], s["lr"], s["warmup"], s["logit_scale"]) for s in settings] == [
        (6, 2e-3, 0, None),
        (8, 2e-3, 2, 50.0),
    ]
    assert [row["terms"].keys() for row in (rows("r/half")[0], rows("r/small")[0])] == [
        {"affinity"},
        {"affinity", "clip"},
    ]


@pytest.mark.parametrize(("stage", "at"), [("half", 5), ("small", 1), ("small", 5)])
def test_distill_resumes_in_the_middle_of_a_stage(staged, monkeypatch, stage, at):
    """Stopped in either stage, also before its first checkpoint: the end is that of the
    uninterrupted recipe, bit for bit."""
    often = (*staged, "--save-every-n-steps", "2")
    assert start("distill", *often, "--name", "whole") == 0

    def failing(*args, title, **kwargs):
        def fail(step, model):
            if title == stage and step == at:
                raise OSError("the machine is gone")

        return loop.fit(*args, title=title, at_step=fail, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill_command, "fit", failing)
        assert start("distill", *often, "--name", "cut") == 1
    assert start("distill", *often, "--name", "cut", "--resume", "latest") == 0
    for name, step in (("half", 6), ("small", 8)):
        found = [tiny.fingerprint(Path(run, name), step) for run in ("cut", "whole")]
        assert found[0] == found[1]
    assert [row["step"] for row in rows("cut/small")] == [
        row["step"] for row in rows("whole/small")
    ]


def edited(old: str, new: str) -> None:
    text = Path("recipe.toml").read_text()
    assert text.count(old) == 1
    Path("recipe.toml").write_text(text.replace(old, new))


def test_an_edited_recipe_is_said_or_refused(staged, capsys, caplog):
    """Of the stage that runs it is said; one that is finished was made as it was."""
    often = (*staged, "--name", "r", "--resume", "latest", "--save-every-n-steps", "2")
    assert start("distill", *often) == 0
    for step in (6, 8):
        checkpoint.remove(Path("r", "small", "checkpoints", f"step_{step:08d}"))
    caplog.clear()
    edited("alpha = 0.5", "alpha = 0.25")
    assert start("distill", *often) == 0
    assert [m for m in caplog.messages if " was " in m] == [
        "alpha of the stage was 0.5 and is 0.25 now"
    ]
    whole = tiny.weights(tinyclip.load("r/half/model")[0])
    for old, new, rule in (
        ("lr = 2e-3", "lr = 1e-3", "trained with lr 0.002 (now 0.001): say that again, or remove"),
        ('model = "half.json"', 'model = "half.json"\nalpha = 0.7', "alpha 1.0 (now 0.7)"),
        ("steps = 6", "epochs = 1", "epochs None (now 1), steps 6 (now None)"),
        ('model = "half.json"', 'model = "half.json"\ninherit = "none"', "inherit previous (now"),
    ):
        edited(old, new)
        assert start("distill", *often) == 1
        told = capsys.readouterr().err
        assert "r/half: this stage is finished" in told and rule in told
        edited(new, old)
    assert tiny.weights(tinyclip.load("r/half/model")[0]) == whole
    assert start("distill", *often) == 0


def test_flags_that_the_recipe_overrides_are_said(staged, caplog):
    edited("steps = 6\n", "")
    words = ("--steps", "2", "--warmup", "1", "--name", "r")
    assert start("distill", *staged, *words) == 0
    assert [m for m in caplog.messages if "the recipe says it" in m] == [
        "--steps 2 is not for 'small': the recipe says it",
        "--lr 0.001 is not for 'half', 'small': the recipe says it",
        "--warmup 1 is not for 'small': the recipe says it",
    ]
    settings = json.loads(Path("r", "half", "config.json").read_text())["settings"]
    assert (settings["steps"], settings["warmup"]) == (2, 1)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("", "--model, the student, is missing"),
        ("--model t/model --inherit", "brings its own weights"),
        ("--model tiny.json --alpha 2", "alpha must be a number from 0 to 1"),
        ("--model bigger.json", "nowhere larger than the teacher's"),
        ("--recipe recipe.toml --alpha 0.5", "--alpha is said in the recipe"),
        ("--recipe recipe.toml --resume x --name n", "--resume of a recipe must be latest"),
        ("--recipe gone.toml", "no such file"),
    ],
)
def test_wrong_distillations_are_one_sentence(staged, capsys, words, rule):
    bigger = json.loads(Path("large.json").read_text())
    bigger["vision_cfg"]["width"] = 64
    Path("bigger.json").write_text(json.dumps(bigger))
    assert start("distill", *staged[:4], *words.split()) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("tinyclip distill: ") and rule in told


@pytest.mark.skipif(open_clip_vocabulary() is None, reason="needs open_clip_torch's vocabulary")
def test_the_teacher_is_an_open_clip_folder(place):
    """Its own vocabulary, image size and width; the student reads in another way, and learns."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2},
        "text_cfg": {"context_length": 77, "width": 64, "heads": 1, "layers": 2},
    }
    torch.manual_seed(0)
    teacher = tinyclip.create_model(config)
    tinyclip.save(teacher, "theirs", "open_clip")
    words = ("--teacher", "theirs", "--train-data", "shard-{0..1}.tar", "--steps", "6")
    other = ("--model", "tiny.json", "--tokenizer", "words", "--no-inherit", "--name", "other")
    assert start("distill", *words, *other) == 0
    _, preprocess, tokenizer = tinyclip.load("other/model")
    assert preprocess.size == (16, 32) and tokenizer.vocab_size == 558
    small = {**config, "vision_cfg": {**config["vision_cfg"], "layers": 1}}
    small["text_cfg"] = {**config["text_cfg"], "layers": 1, "context_length": 20}
    Path("small.json").write_text(json.dumps(small))
    assert start("distill", *words, "--model", "small.json", "--name", "inherited") == 0
    _, _, tokenizer = tinyclip.load("inherited/model")
    assert tokenizer(["two"]).shape == (1, 20) and tokenizer.vocab_size == 49408
    assert rows("inherited")[-1]["step"] == 6
