"""The demo as a user types it, made small; the claim itself is in the soak tier."""

import json
import os
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import tinyclip
from tinyclip import cli, train
from tinyclip.data.digits import captions
from tinyclip.demo import command, runs, summary
from tinyclip.demo.recipe import VARIANTS, Recipe, student_config, teacher_config

NAMES = ["teacher", *(variant.name for variant in VARIANTS)]
TINY = Recipe(
    teacher_steps=4,
    student_steps=3,
    curve_points=3,
    batch_size=16,
    test_scenes=60,
    noises=(0.0, 0.5),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo of a few steps, with noise."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "quick", lambda self: TINY)
        words = ["demo", "--quick", "--noise", "0.5", "--out", str(folder)]
        assert cli.main(words) == 0
    return folder


def test_results(demo):
    results = json.loads((demo / "results.json").read_text())
    rows = results["runs"]
    assert [(row["noise"], row["name"]) for row in rows] == [
        (noise, name) for noise, names in ((0.0, NAMES), (0.5, NAMES[1:])) for name in names
    ]
    for row in rows:
        steps = 4 if row["name"] == "teacher" else 3
        assert row["steps"] == steps
        assert [step for step, _ in row["curve"]] == [*range(1, steps + 1)]
        assert all(0 <= value <= 1 for _, value in row["curve"])
        assert 0 <= row["zero_shot_exact"] <= 1
        assert row["seconds"] > 0
        assert row["pairs_per_second"] > 0
        mimics = row["name"] in ("affinity", "both")
        assert set(row["losses"]) == ({"loss", "affinity"} if mimics else {"loss"})
    sizes = {row["name"]: row["parameters"] for row in rows}
    assert len({sizes[name] for name in NAMES[1:]}) == 1
    assert sizes["both"] <= 0.2 * sizes["teacher"]
    assert results["environment"]["packages"]["torch"]


def test_the_models_load_and_score_what_was_reported(demo):
    rows = json.loads((demo / "results.json").read_text())["runs"]
    model, preprocess, tokenizer = tinyclip.load(demo / "both-0" / "model")
    assert preprocess.size == (16, 32)
    assert torch.equal(
        tokenizer(list(captions()[:3])), runs.reader().tokenizer(list(captions()[:3]))
    )
    scenes = runs.read_scenes("test", TINY.test_scenes)
    (row,) = summary.select(rows, "both")
    assert runs.zero_shot_exact(model, scenes) == pytest.approx(row["zero_shot_exact"])
    assert runs.recall_at_1(model, scenes) == pytest.approx(row["recall_at_1"])


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.cells, self.open, self.text = [], 0, [], []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.cells += tag == "td"

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file(demo):
    page = Page()
    text = (demo / "report.html").read_text()
    page.feed(text)
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "<script" not in text
    assert "@import" not in text
    assert text.count("<svg") == 2  # a curve each for right and wrong captions
    words = " ".join(page.text)
    for name in NAMES:
        assert name in words
    assert words.count(" left of ") >= 8 * 3


def test_the_markdown_shows_the_same(demo):
    text = (demo / "report.md").read_text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (demo / name).stat().st_size > 1000
    assert len(re.findall(r"^\| both \|", text, re.MULTILINE)) == 2
    assert "50% of the students' training captions are wrong" in text


def test_the_four_begin_alike_where_they_should(monkeypatch, tmp_path):
    """scratch and affinity from the same new weights, inherited and both from the teacher's."""
    begun = {}
    monkeypatch.setattr(
        runs.Bench,
        "train",
        lambda self, name, model, objective, steps, noise=0.0: begun.update(
            {name: {k: v.clone() for k, v in model.state_dict().items()}}
        ),
    )
    monkeypatch.setattr(runs, "throughput", lambda models, images: {})
    runs.run_seed(0, Recipe(test_scenes=10), tmp_path, lambda text: None)

    def same(a, b):
        return all(torch.equal(begun[a][key], begun[b][key]) for key in begun[a])

    assert same("scratch", "affinity")
    assert same("inherited", "both")
    key = "visual.conv1.weight"
    assert torch.equal(begun["both"][key], begun["teacher"][key][:64])
    assert not torch.equal(begun["scratch"][key], begun["both"][key])


def test_recall_counts_any_scene_of_a_caption(monkeypatch):
    scenes = runs.Scenes(torch.zeros(3, 3, 16, 32), torch.tensor([7, 9, 7]))
    image = torch.eye(3)
    # Caption 7 finds scene 2 first, which shows it; caption 9 finds scene 0, which does not.
    text = {captions()[7]: [0.1, 0.0, 0.9], captions()[9]: [0.9, 0.5, 0.0]}
    monkeypatch.setattr(runs, "encode_images", lambda model, images: image)
    monkeypatch.setattr(
        runs, "encode_texts", lambda model, tokenizer, texts: torch.tensor([text[t] for t in texts])
    )
    model = tinyclip.create_model(student_config())
    assert runs.recall_at_1(model, scenes) == pytest.approx(0.5)
    assert model.training


def test_sizes():
    count = {
        name: sum(p.numel() for p in tinyclip.create_model(config, device="meta").parameters())
        for name, config in (("teacher", teacher_config()), ("student", student_config()))
    }
    assert count["student"] <= 0.2 * count["teacher"]


def test_a_folder_of_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "holds files that are no demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_signal_ends_the_demo_without_a_report(tmp_path, monkeypatch, capsys):
    """In the second of five runs; and what is left does not stand in the way of the next demo."""
    out, asked = tmp_path / "out", []

    def fit(*args, title, at_step, **kwargs):
        def ask(step, model):
            at_step(step, model)
            if title == "scratch" and step == 2 and not asked:
                asked.append(step)
                os.kill(os.getpid(), signal.SIGTERM)

        return train.fit(*args, title=title, at_step=ask, **kwargs)

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(Recipe, "quick", lambda self: replace(TINY, noises=(0.0,)))
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert "stopped by a signal after 2 of the 3 steps of 'scratch'" in told.err
    assert told.out == "" and not (out / "results.json").exists()
    assert sorted(path.name for path in out.iterdir()) == ["scratch-0", "teacher-0"]
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    assert (out / "report.html").is_file()
    command._make_room(out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--noise", "0"], "--noise must be above 0"),
        (["--noise", "1.5"], "--noise must be above 0"),
    ],
)
def test_malformed(words, rule, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *words]) == 1
    assert rule in capsys.readouterr().err


@pytest.mark.soak
def test_the_claim(tmp_path):
    """One seed, as `make demo` runs it; over three the affinities' own gain is measured too."""
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["runs"]
    assert [text for good, text in summary.verdicts(rows) if not good] == []
