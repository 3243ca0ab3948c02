"""The figures of the report, from runs whose figures are known."""

import pytest

from tinyclip.demo import report, summary
from tinyclip.demo.recipe import VARIANTS


def row(name: str, seed: int = 0, accuracy: float = 0.5, noise: float = 0.0, **more) -> dict:
    curve = more.pop("curve", [[10, accuracy / 2], [20, accuracy]])
    return {
        "name": name,
        "seed": seed,
        "noise": noise,
        "steps": 20,
        "parameters": 1000 if name == "teacher" else 150,
        "macs": 2_000_000,
        "zero_shot_exact": accuracy,
        "recall_at_1": accuracy,
        "pairs_per_second": 100.0,
        "seconds": 3.0,
        "curve": curve,
        "losses": {"loss": [5.0, 1.0]},
        **more,
    }


def runs(accuracies: dict[str, list[float]], noise: float = 0.0) -> list[dict]:
    return [
        row(name, seed, value, 0.0 if name == "teacher" else noise)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]


TWO_SEEDS = {
    "teacher": [0.95, 0.93],
    "scratch": [0.50, 0.60],
    "affinity": [0.52, 0.61],
    "inherited": [0.70, 0.72],
    "both": [0.71, 0.75],
}


def test_gains_are_paired_by_seed():
    shuffled = runs(TWO_SEEDS)[::-1]
    found = {(g.better, g.than): g for g in summary.gains(shuffled)}
    assert found["affinity", "scratch"].points == pytest.approx((2.0, 1.0))
    assert found["both", "inherited"].points == pytest.approx((1.0, 3.0))
    assert found["both", "scratch"].mean == pytest.approx(18.0)


def test_noise_is_kept_apart():
    rows = runs(TWO_SEEDS) + runs({k: [v[0] / 2] for k, v in TWO_SEEDS.items()}, noise=0.3)[1:]
    assert [r["zero_shot_exact"] for r in summary.select(rows, "both", 0.3)] == [0.355]
    assert summary.gains(rows, 0.3)[0].points == pytest.approx((1.0,))


def test_the_mean_of_curves():
    rows = [
        row("both", 0, curve=[[5, 0.2], [10, 0.4]]),
        row("both", 1, curve=[[5, 0.4], [10, 1.0]]),
    ]
    assert summary.mean_curve(rows) == [(5, pytest.approx(0.3)), (10, pytest.approx(0.7))]


def test_the_first_step_that_reaches_a_score():
    curve = [(5, 0.1), (10, 0.6), (15, 0.5), (20, 0.7)]
    assert summary.steps_to_reach(curve, 0.5) == 10
    assert summary.steps_to_reach(curve, 0.6) == 10
    assert summary.steps_to_reach(curve, 0.8) is None


def verdicts(**accuracies: float) -> list[bool]:
    rows = [row(name, accuracy=value) for name, value in accuracies.items()]
    return [good for good, _ in summary.verdicts(rows)]


def test_verdicts():
    # "both" is at half of its accuracy after half of the steps.
    assert verdicts(teacher=0.95, scratch=0.30, both=0.70) == [True, True, True]
    assert verdicts(teacher=0.89, scratch=0.65, both=0.70) == [False, False, False]
    big = [row("teacher"), row("scratch", accuracy=0.1), row("both", parameters=201)]
    assert [good for good, _ in summary.verdicts(big)] == [False, False, True]


def test_a_score_that_is_never_reached_is_said():
    _, _, (good, text) = summary.verdicts(runs({**TWO_SEEDS, "both": [0.1, 0.2]}))
    assert not good
    assert "not reached" in text


def test_tables():
    rows = runs(TWO_SEEDS)
    header, *lines = report.table(rows)
    assert [line[0] for line in lines] == ["teacher", *(variant.name for variant in VARIANTS)]
    assert {len(line) for line in lines} == {len(header)}
    assert lines[1][1] == "55.0%"
    header, first, *_ = report.gain_table(rows)
    assert header == ["gain in points", "seed 0", "seed 1", "mean"]
    assert first == ["affinity − scratch", "+2.0", "+1.0", "+1.5"]
