"""The README's commands for a user's own data, run in its words.

What they name is made here: a table, tar shards, a teacher as an open_clip folder. Only the size of
the work is changed, by flags that are added at the end of a command.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import tinyclip
from tests.test_readme import README, blocks
from tinyclip import cli, distill, models
from tinyclip.integrations.vocabulary import open_clip_vocabulary

pytestmark = pytest.mark.skipif(
    open_clip_vocabulary() is None, reason="needs open_clip_torch's vocabulary"
)

STEPS = 2
SMALLER = {
    "train": ["--batch-size", "4", "--epochs", "1", "--workers", "1"],
    "distill": ["--batch-size", "4", "--epochs", "1", "--workers", "1"],
    "eval": ["--workers", "0"],
    "convert": [],
}
# Large enough for the student of the README to inherit from, no larger.
TEACHER = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 320, "layers": 10},
    "text_cfg": {"width": 320, "heads": 5, "layers": 3},
}


def commands() -> list[str]:
    """The lines of the shell blocks that are about data, in the README's order."""
    lines = [line for _, text in blocks(README, "bash") for line in text.splitlines()]
    lines = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in lines if re.search(r"tinyclip (train|distill|eval|convert) ", line)]


def picture(number: int) -> bytes:
    colour = (40 * number % 256, 90 * number % 256, 17 * number % 256)
    written = io.BytesIO()
    Image.new("RGB", (40 + number, 48), colour).save(written, "jpeg")
    return written.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user has before the first command."""
    root = tmp_path_factory.mktemp("user")
    (root / "images").mkdir()
    (root / "shards").mkdir()
    count = 4 * STEPS
    for number in range(count):
        (root / "images" / f"{number}.jpg").write_bytes(picture(number))
    rows = [f"images/{number}.jpg,a photo of thing {number}" for number in range(count)]
    for name in ("pairs.csv", "pairs_val.csv"):
        (root / name).write_text("\n".join(["filepath,title", *rows]) + "\n")
    for shard in range(4):
        with tarfile.open(root / "shards" / f"{shard:05d}.tar", "w") as tar:
            for number in range(count):
                caption = f"thing {number} of shard {shard}".encode()
                for suffix, data in ((".jpg", picture(number)), (".txt", caption)):
                    entry = tarfile.TarInfo(f"{number:04d}{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    torch.manual_seed(0)
    tinyclip.save(tinyclip.create_model(TEACHER), root / "teachers" / "ViT-B-16", "open_clip")
    return root


def run(command: str, folder: Path) -> None:
    """Run a command as a user in that folder, with less work."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        place = words.index("--nproc-per-node") + 1
        words[place] = "2"
        launcher = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, *SMALLER["train"]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return
    assert cli.main([*words[1:], *SMALLER[words[1]]]) == 0


@pytest.fixture(scope="module")
def ran(folder):
    """All commands, in order, as a reader would give them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "200")
        for command in commands():
            run(command, folder)
    return folder


def steps(folder: Path, name: str) -> list[int]:
    rows = (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["step"] for row in rows]


def test_each_command_is_there():
    verbs = [re.search(r"tinyclip (\w+)", line)[1] for line in commands()]
    assert verbs == ["distill", "eval", "convert", "train", "train", "train"]


def test_the_student_is_the_published_model_and_has_learned(ran):
    student, _, tokenizer = tinyclip.load(ran / "logs" / "small" / "model")
    assert student.config == models.get_config("TinyCLIP-ViT-8M-16-Text-3M")
    assert tokenizer.vocab_size == student.vocab_size
    teacher, _, _ = tinyclip.load(ran / "teachers" / "ViT-B-16")
    inherited = distill.inherit(teacher, student.config)
    moved = {
        name: (value - inherited.state_dict()[name]).abs().max().item()
        for name, value in student.state_dict().items()
    }
    assert 0 < moved["visual.conv1.weight"] < 0.01  # began there, and went on
    assert steps(ran, "small")[-1] == STEPS
    row = json.loads((ran / "logs" / "small" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "affinity" in row["terms"]


def test_the_evaluation_has_the_benchmarks_names(ran):
    found = json.loads((ran / "small.json").read_text())
    assert found["task"] == "zeroshot_retrieval"
    names = {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)}
    assert names <= set(found["metrics"])


def test_the_converted_folder_is_the_same_model(ran):
    ours = tinyclip.load(ran / "logs" / "small" / "model")[0].state_dict()
    theirs = tinyclip.load(ran / "small-for-open-clip")[0].state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_training_ran_on_the_table_and_on_the_shards(ran):
    assert steps(ran, "from-a-table")[-1] == STEPS  # resuming a finished run adds nothing
    assert steps(ran, "from-shards")[-1] == 4 * STEPS / 2  # half as many: two processes
    for name in ("from-a-table", "from-shards"):
        model, _, _ = tinyclip.load(ran / "logs" / name / "model")
        assert model.config == models.get_config("TinyCLIP-ViT-8M-16-Text-3M")
