"""The loop: what a run does, counts, leaves out and refuses."""

import math
import os
import re
import signal

import pytest
import torch

from tests.train import tiny
from tinyclip import train
from tinyclip.data import Batch, TooManyBroken


class Now(train.Contrastive):
    """CLIP's loss, times `factor` at some calls (from 1)."""

    def __init__(self, factor: float, *calls: int):
        self.factor, self.calls, self.called = factor, calls, 0

    def __call__(self, *args):
        self.called += 1
        loss = super().__call__(*args)["loss"]
        return {"loss": loss * self.factor if self.called in self.calls else loss}


def test_a_run_learns_and_says_what_it_did():
    seen = []
    summary, model = tiny.fit(
        None,
        objective=train.Contrastive(),
        loader=tiny.Memory(count=8),
        steps=40,
        at_step=lambda step, trained: seen.append((step, type(trained).__name__)),
    )
    assert seen == [(step, "CLIP") for step in range(1, 41)]
    assert (summary.steps, summary.samples, summary.stopped) == (40, 320, False)
    assert (summary.skipped_steps, summary.skipped_samples) == (0, 0)
    first, last = summary.losses["loss"]
    assert last < 0.5 * first < math.log(8)
    assert summary.seconds > 0
    assert model.training


def test_time_of_the_caller_is_not_counted():
    import time

    summary, _ = tiny.fit(None, steps=3, warmup=0, at_step=lambda *_: time.sleep(1.0))
    assert summary.seconds < 3.0


@pytest.mark.parametrize("precision", ["bf16", "fp16", "amp", "amp_bf16", "fp64"])
def test_precisions(precision):
    """16-bit runs end near the fp32 one, and not on it: they did compute in 16 bits."""
    plain, _ = tiny.fit(None, objective=train.Contrastive(), steps=20)
    other, model = tiny.fit(None, objective=train.Contrastive(), steps=20, precision=precision)
    wanted = torch.float64 if precision == "fp64" else torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert other.losses["loss"][1] == pytest.approx(plain.losses["loss"][1], rel=0.1)
    if precision != "fp64":
        assert other.losses["loss"][1] != plain.losses["loss"][1]


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["kept", "compiled"]
)
def test_another_way_to_compute_ends_in_the_same_place(compile):
    """Activation checkpointing, with torch.compile and without."""
    wanted = {"objective": train.Contrastive(), "steps": 5, "precision": "fp64"}
    plain, _ = tiny.fit(None, **wanted)
    model = tiny.model()
    model.set_grad_checkpointing()
    other, _ = tiny.fit(None, **wanted, model=model, compile=compile)
    assert other.losses["loss"][1] == pytest.approx(plain.losses["loss"][1], rel=1e-10)


def test_fixed_scale_stays():
    scales = []
    _, model = tiny.fit(
        None, logit_scale=50.0, at_step=lambda s, m: scales.append(m.logit_scale.item())
    )
    assert scales == [pytest.approx(math.log(50))] * 12
    assert model.logit_scale.requires_grad


def test_what_is_frozen_stays():
    model = tiny.model()
    model.visual.requires_grad_(False)
    before = {name: p.clone() for name, p in model.visual.named_parameters()}
    tiny.fit(None, model=model)
    assert all(torch.equal(p, before[name]) for name, p in model.visual.named_parameters())


@pytest.mark.parametrize("calls", [(2,), (1, 5, 6), (12,)])
def test_steps_that_are_not_finite_are_left_out(calls):
    """The run goes on as if AdamW had not been asked: the schedule is a function of the step."""
    trace = []
    summary, model = tiny.fit(
        None,
        objective=Now(math.nan, *calls),
        max_skipped=3,
        at_step=lambda step, m: trace.append(tiny.weights(m)),
    )
    assert summary.skipped_steps == len(calls)
    for call in calls:
        assert trace[call - 1] == (trace[call - 2] if call > 1 else tiny.weights(tiny.model()))
    assert len(set(trace)) == 12 - len(calls) + (1 in calls)
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_many_in_a_row_stop_the_run():
    seen = []
    with pytest.raises(train.TrainingError, match=r"was not finite 3 steps in a row \(4 in all"):
        tiny.fit(
            None,
            objective=Now(math.inf, 2, 5, 6, 7),
            max_skipped=3,
            at_step=lambda step, m: seen.append(step),
        )
    assert seen == [1, 2, 3, 4, 5, 6]


def a_third(epoch: int, batch: int, row: int) -> bool:
    return row % 3 == 0


def all_of_batch_2(epoch: int, batch: int, row: int) -> bool:
    return batch == 2


def test_broken_samples_are_left_out_and_counted(tmp_path):
    loader = tiny.Memory(broken=a_third)
    summary, _ = tiny.fit(tmp_path, loader=loader, max_bad_fraction=0.5)
    assert (summary.samples, summary.skipped_samples) == (12 * 5, 12 * 3)
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 36 and '"reason": "broken on purpose"' in lines[0]


def test_a_batch_of_none_is_passed_over():
    summary, _ = tiny.fit(None, loader=tiny.Memory(broken=all_of_batch_2), max_bad_fraction=0.5)
    assert (summary.steps, summary.samples, summary.skipped_samples) == (12, 10 * 8, 2 * 8)


def test_too_many_broken_samples_stop_the_run(tmp_path):
    """At the end of the first epoch, six steps, as these are too few to judge before."""
    with pytest.raises(
        TooManyBroken, match=r"(?s)18 of 48 samples .*sample \d+: broken on purpose"
    ):
        tiny.fit(tmp_path, loader=tiny.Memory(broken=a_third), max_bad_fraction=0.3)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 18
    loader = tiny.Memory(count=1600, global_batch=8, broken=a_third)
    seen = []
    with pytest.raises(TooManyBroken, match="375 of 1000 samples are broken"):
        tiny.fit(
            None,
            loader=loader,
            steps=200,
            max_bad_fraction=0.3,
            at_step=lambda s, m: seen.append(s),
        )
    assert seen[-1] == 124


@pytest.mark.parametrize("steps", [3, 8], ids=["before an epoch's end", "in the second epoch"])
def test_a_short_run_is_judged_at_its_end(tmp_path, steps):
    """And a signal, which ends it earlier, does not judge: the run is to go on."""

    def late(epoch: int, batch: int, row: int) -> bool:
        return epoch * 6 + batch >= steps - 2

    changes = {"loader": tiny.Memory(broken=late), "steps": steps, "max_bad_fraction": 0.2}
    with pytest.raises(TooManyBroken, match=f"16 of {8 * steps} samples are broken"):
        tiny.fit(tmp_path / "a", **changes)
    assert not (tmp_path / "a" / "model").exists()

    def ask(step, model):
        if step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    changes["max_bad_fraction"] = 0.0
    summary, _ = tiny.fit(tmp_path / "b", at_step=ask, **changes)
    assert summary.stopped and summary.skipped_samples == 8


def test_a_run_that_read_nothing_trained_nothing(tmp_path):
    nothing = tiny.Memory(broken=lambda epoch, batch, row: True)
    with pytest.raises(
        train.TrainingError, match=r"(?s)no sample could be read in 12 steps.*broken"
    ):
        tiny.fit(tmp_path, loader=nothing, max_bad_fraction=1.0)
    assert not (tmp_path / "model").exists()
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 96


def test_an_error_of_the_data_is_raised():
    class Failing(tiny.Memory):
        def epoch(self, epoch, start=0):
            yield from list(super().epoch(epoch, start))[:2]
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        tiny.fit(None, loader=Failing())


def test_an_epoch_has_the_batches_it_promised():
    class Short(tiny.Memory):
        def epoch(self, epoch, start=0):
            yield from list(super().epoch(epoch, start))[:-1]

    with pytest.raises(train.TrainingError, match="epoch 0 ended after 5 of 6 batches"):
        tiny.fit(None, loader=Short())


@pytest.mark.parametrize("cut", [None, 4, 7])
def test_batches_come_in_the_loaders_order(tmp_path, cut):
    """Eight of epochs of six, each once, also over a resume."""
    seen = {}

    class Look(train.Contrastive):
        def __call__(self, image, text, scale, pair, group):
            seen[len(seen)] = pair.image
            return super().__call__(image, text, scale, pair, group)

    changes = {"objective": Look(), "steps": 8, "save_every": 1}
    if cut is not None:
        tiny.interrupted(tmp_path, at=cut, **changes)
        del seen[cut - 1]  # made again: it was not saved
    tiny.fit(tmp_path, "latest", **changes)
    loader = tiny.Memory()
    wanted = [*loader.epoch(0), *loader.epoch(1)][:8]
    assert len(seen) == 8
    for number, batch in enumerate(wanted):
        assert torch.equal(seen[number], batch.pairs[0].image)


def test_a_teacher_reads_the_last_pair():
    class Two(tiny.Memory):
        def epoch(self, epoch, start=0):
            for batch in super().epoch(epoch, start):
                (pair,) = batch.pairs
                yield Batch((pair, pair._replace(image=pair.image + 7)), batch.keys, batch.skipped)

    means = []

    class Look(train.Contrastive):
        def __call__(self, image, text, scale, pair, group):
            means.append(pair.image.mean().item())
            return super().__call__(image, text, scale, pair, group)

    tiny.fit(None, loader=Two(), objective=Look(), steps=2, warmup=0)
    assert all(6 < mean < 8 for mean in means) and len(means) == 2


def test_lines_of_progress(capsys):
    """Where there is no terminal: the backends, and the first and the last step at least."""
    tiny.seed()
    train.fit(tiny.model(), tiny.Noisy(), tiny.Memory(), tiny.settings(), title="trial")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("trial: ") and "contrastive_loss on" in lines[0]
    assert lines[1].startswith("trial 1/12  loss ") and lines[-1].startswith("trial 12/12  loss ")
    for word in ("samples/s", "data ", "lr ", "scale ", "clip "):
        assert word in lines[-1]
    named = set(re.findall(r" on (\w+)", lines[0]))
    assert all(line.endswith(f"  on {'+'.join(sorted(named))}") for line in lines[1:])


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train.fit(tiny.model(), tiny.Noisy(), tiny.Memory(), tiny.settings(), title="trial")
    told = capsys.readouterr().err
    assert "trial: " in told and "12/12" in told and "\r" in told and "samples/s" in told
    assert re.search(r"scale [\d.]+  on (cpu|torch)", told)
