"""One step: the schedule, the groups, AdamW, clipping, left-out steps, the mean, the scaler."""

import math
import re

import pytest
import torch

import tinyclip
from tests.train import tiny
from tinyclip import train
from tinyclip.train.optimizer import decays
from tinyclip.train.update import Update

scheduler = pytest.importorskip("open_clip_train.scheduler")


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (3, 12), (12, 12), (100, 2000)])
def test_schedule_is_open_clips(warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = scheduler.cosine_lr(optimizer, 3e-4, warmup, steps)
    for step in range(steps):
        assert train.learning_rate(step, 3e-4, warmup, steps) == pytest.approx(
            theirs(step), rel=1e-15
        )


def test_schedule_at_known_places():
    rate = [train.learning_rate(step, 1.0, 4, 12) for step in range(12)]
    assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rate[4] == 1.0
    assert rate[8] == pytest.approx(0.5)
    assert rate[11] == pytest.approx(0.5 * (1 + math.cos(7 / 8 * math.pi)))


@pytest.mark.parametrize("nonscalar", [False, True])
def test_groups_are_open_clips(nonscalar):
    """What open_clip's own rule, written out here, leaves without weight decay."""
    model = tinyclip.create_model("ViT-B-32", nonscalar_logit_scale=nonscalar, device="meta")

    def excluded(name, p):
        words = ("bn", "ln", "bias", "logit_scale")
        return p.ndim < 2 or any(word in name for word in words)

    found = {name for name, p in model.named_parameters() if not decays(name, p)}
    assert found == {name for name, p in model.named_parameters() if excluded(name, p)}
    assert {"logit_scale", "visual.class_embedding", "ln_final.weight"} <= found
    assert "positional_embedding" not in found


def test_optimizer_takes_what_is_trained():
    model = tiny.model()
    model.visual.requires_grad_(False)
    optimizer = train.make_optimizer(model, tiny.settings(wd=0.3, beta1=0.8, beta2=0.9, eps=1e-3))
    trained = [p for p in model.parameters() if p.requires_grad]
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in taken} == {id(p) for p in trained} and len(taken) == len(trained)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-3


def losses_of(model, pair):
    image, text, scale = model(pair.image.to(model.logit_scale.dtype), pair.text)
    return train.Contrastive()(image, text, scale, pair, None)["loss"]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_are_adamws(clip):
    """Against AdamW written out in plain fp64, eight steps, with and without clipping.

    eps is large: a key's bias has gradient 0, and AdamW makes steps even of its rounding.
    """
    settings = tiny.settings(precision="fp64", grad_clip_norm=clip, ema=0.7, wd=0.4, eps=1e-4)
    model, twin = tiny.model().double(), tiny.model().double()
    update = Update(model, settings)
    named = dict(twin.named_parameters())
    mean = {name: p.detach().clone() for name, p in named.items()}
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = {name: torch.zeros_like(p) for name, p in named.items()}
    for step, batch in zip(range(8), tiny.Memory(count=64).epoch(0), strict=True):
        update(step, losses_of(model, batch.pairs[0]))
        grads = torch.autograd.grad(losses_of(twin, batch.pairs[0]), list(named.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        assert update.norm.item() == pytest.approx(norm, rel=1e-9)
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        rate = train.learning_rate(step, settings.lr, settings.warmup, settings.steps)
        with torch.no_grad():
            for (name, p), g in zip(named.items(), grads, strict=True):
                g = g * factor
                if p.ndim >= 2:
                    p -= rate * 0.4 * p
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.98 * second[name] + 0.02 * g * g
                m = first[name] / (1 - 0.9 ** (step + 1))
                v = second[name] / (1 - 0.98 ** (step + 1))
                p -= rate * m / (v.sqrt() + 1e-4)
                mean[name] = 0.7 * mean[name] + 0.3 * p
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), named[name].detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(update.ema[name], mean[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing(bad, precision):
    model = tiny.model()
    update = Update(model, tiny.settings(precision=precision))
    (pair,) = next(tiny.Memory().epoch(0)).pairs
    update(0, losses_of(model, pair))
    weights = tiny.weights(model)
    tensors = {name: value.clone() for name, value in update.tensors().items()}
    mean = {name: value.clone() for name, value in update.ema.items()}
    scale = update.scaler.get_scale()

    update(1, losses_of(model, pair) * bad)
    assert tiny.weights(model) == weights
    assert all(torch.equal(value, tensors[name]) for name, value in update.tensors().items())
    assert all(torch.equal(value, mean[name]) for name, value in update.ema.items())
    assert update.left_out() == (1, 1, 1)
    assert update.scaler.get_scale() == (scale / 2 if precision == "fp16" else 1.0)

    update(2, losses_of(model, pair) * bad)
    update(3, losses_of(model, pair))
    assert update.left_out() == (2, 0, 2)
    assert tiny.weights(model) != weights
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_noticed_under_a_finite_loss():
    model = tiny.model()
    update = Update(model, tiny.settings())
    before = tiny.weights(model)
    scale = model.logit_scale
    update(0, torch.sqrt((scale - scale.detach()).square()))  # 0, of slope 0/0
    assert update.left_out() == (1, 1, 1)
    assert tiny.weights(model) == before


@pytest.mark.parametrize(("sign", "bound"), [(-1, math.log(100)), (1, 0.0)])
def test_scale_is_clamped(sign, bound):
    model = tiny.model()
    update = Update(model, tiny.settings(lr=10.0, warmup=0))
    update(0, sign * model.logit_scale)
    assert model.logit_scale.item() == pytest.approx(bound)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("steps", 0, "a positive integer"),
        ("steps", 2.0, "a positive integer"),
        ("save_every", 0, "a positive integer"),
        ("warmup", 13, "an integer in 0..steps (12)"),
        ("warmup", -1, "an integer in 0..steps (12)"),
        ("lr", float("nan"), "a number >= 0"),
        ("lr", True, "a number >= 0"),
        ("beta2", 1.0, "a number in [0, 1)"),
        ("ema", 1.0, "a number in [0, 1)"),
        ("grad_clip_norm", 0.0, "a number > 0"),
        ("logit_scale", -1.0, "a number > 0"),
        ("max_bad_fraction", 1.5, "a number in [0, 1]"),
        ("precision", "fp8", "one of fp32, fp64, bf16"),
    ],
)
def test_settings_are_checked(name, value, rule):
    with pytest.raises(ValueError, match=f"Settings: {name} must be {re.escape(rule)}.*, got "):
        tiny.settings(**{name: value})


def test_precisions_of_open_clip():
    names = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}
    for name, dtype in names.items():
        assert tiny.settings(precision=name).dtypes == (torch.float32, dtype)
    assert tiny.settings(precision="fp64").dtypes == (torch.float64, None)
