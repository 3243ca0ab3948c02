"""Learned masks: hard concrete, expected sizes, the constraint, against what is written out."""

import math

import pytest
import torch

from tests.distill.test_inherit import small
from tests.models import build
from tests.support.masked_block import NoSync
from tests.train import tiny
from tinyclip.distill import Masked, Masks, Ramp, prunable_parameters, prune, sparsity_of
from tinyclip.distill.masks import BOUNDS, keep_probability, sampled_gate, settled_gate
from tinyclip.models import get_config
from tinyclip.train.update import Update

IRREGULAR = small(heads=([2, None, 1, 3], [1, None, 2]), widths=([5, 0, None, 9], [None, 4, 30]))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def random_masks(config, original=None, seed=0) -> Masks:
    masks = Masks(config, original).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for a in masks.log_alphas():
            a.copy_((torch.randn(len(a)) * 2).clamp(-4, 4))
    return masks


@pytest.mark.parametrize(
    ("a", "kept"), [(math.log(100), 0.998), (0.0, 0.832), (math.log(0.01), 0.047)]
)
def test_keep_probability_at_known_places(a, kept):
    assert keep_probability(scalar(a)).item() == pytest.approx(kept, abs=5e-4)
    # TinyCLIP's form: 1 - cdf(0), with the cdf of the stretched gate.
    cdf = 1 / (1 + math.exp(-(2 / 3 * math.log((0.1 / 1.2) / (1 - 0.1 / 1.2)) - a)))
    assert keep_probability(scalar(a)).item() == pytest.approx(1 - cdf, rel=1e-12)


def test_keep_probability_is_never_certain():
    assert keep_probability(scalar(50.0)).item() == pytest.approx(1 - 1e-6, rel=1e-12)
    assert keep_probability(scalar(-50.0)).item() == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("a", [math.log(100), 2.0, 0.0, -1.5, math.log(0.01)])
def test_samples_are_hard_concrete(a):
    """Of 200,000 gates: how many are 0, and how many 1, within five standard deviations."""
    count = 200_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gates = sampled_gate(torch.full((count,), a, dtype=torch.float64), uniform)
    assert gates.min() >= 0 and gates.max() <= 1

    def below(value: float) -> float:
        """P(stretched gate < value), before it is clipped: the concrete distribution's."""
        t = (value + 0.1) / 1.2
        return 1 / (1 + math.exp(a - 2 / 3 * math.log(t / (1 - t))))

    for found, expected in (
        ((gates == 0).sum(), below(0.0)),
        ((gates == 1).sum(), 1 - below(1.0)),
        ((gates < 0.3).sum(), below(0.3)),
    ):
        spread = 5 * math.sqrt(count * expected * (1 - expected)) + 1
        assert abs(found.item() - count * expected) < spread
    kept = keep_probability(scalar(a)).item()
    assert (gates != 0).double().mean().item() == pytest.approx(kept, abs=6e-3)


def test_a_sample_by_hand():
    u, a = 0.37, 0.8
    u_ = 1e-6 + (1 - 2e-6) * u
    inner = 1 / (1 + math.exp(-(math.log(u_) - math.log(1 - u_) + a) * 1.5))
    wanted = min(max(inner * 1.2 - 0.1, 0), 1)
    assert sampled_gate(scalar(a), scalar(u)).item() == pytest.approx(wanted, rel=1e-12)
    assert sampled_gate(scalar(0.0), scalar(0.0)).item() == 0.0
    assert sampled_gate(scalar(0.0), scalar(1 - 2**-24)).item() == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_settled_gates_by_hand(seed):
    """TinyCLIP's loop: sort, zero the smallest round(n - sum s), the others keep a soft value."""
    torch.manual_seed(seed)
    a = torch.randn(23, dtype=torch.float64) * 2
    soft = [1 / (1 + math.exp(-0.8 * value * 1.5)) for value in a.tolist()]
    expected = sum(1 / (1 + math.exp(-(value + 2 / 3 * math.log(11)))) for value in a.tolist())
    gone = round(23 - expected)
    assert 0 < gone < 23
    smallest = sorted(range(23), key=lambda place: soft[place])[:gone]
    wanted = [0.0 if place in smallest else value for place, value in enumerate(soft)]
    assert settled_gate(a).tolist() == pytest.approx(wanted, rel=1e-12)


def test_settled_gates_at_the_ends():
    low, high = (torch.full((40,), bound) for bound in BOUNDS)
    assert (settled_gate(low[:8]) == 0).all()
    assert (settled_gate(low[:8], least=1) != 0).sum() == 1
    assert (settled_gate(high) != 0).all()
    assert (settled_gate(low) != 0).sum() == round(40 * 0.047)  # ties: as many as are due
    assert settled_gate(torch.empty(0)).shape == (0,)
    config = small((1, 1), 8, 16)
    masks = Masks(config)
    with torch.no_grad():
        for a in masks.log_alphas():
            a.fill_(BOUNDS[0])
    gates = masks.gates()
    assert [(tower.channels != 0).sum().item() for tower in gates] == [1, 1]  # of 8, of 16
    assert not any(gate.any() for gate in gates.image.heads)
    pruned = prune(build.model(config.to_dict()), gates).config
    assert (pruned.vision.width, pruned.vision.layers[0].heads) == (1, None)


def test_prunable_parameters():
    """85.0 M and 37.8 M of ViT-B-32; and counted from the state dict of an irregular model."""
    image, text = prunable_parameters(get_config("ViT-B-32"))
    assert (round(image / 1e6, 1), round(text / 1e6, 1)) == (85.0, 37.8)
    for config in (small(), get_config("TinyCLIP-ViT-8M-16-Text-3M")):
        for tower, count in zip(("visual.", ""), prunable_parameters(config), strict=True):
            blocks = tower + "transformer.resblocks."
            state = build.tinyclip.create_model(config, device="meta").state_dict()
            counted = [v.numel() for k, v in state.items() if k.startswith(blocks)
                       and (".attn." in k or ".mlp." in k)]  # fmt: skip
            assert count == sum(counted)


def explicit_size(masks, tower: str, config, original) -> float:
    """The formula, pair by pair."""
    d, heads = original.width, original.width // original.head_dim
    p_head = (4 * d * d + 4 * d) / heads
    of = getattr(masks, tower)
    channels, by_layer, hidden = (
        [1 / (1 + math.exp(-(a + 2 / 3 * math.log(11)))) for a in part.tolist()]
        for part in (of.channels, of.heads, of.hidden)
    )
    assert len(by_layer) == sum(layer.heads or 0 for layer in config.layers)
    total = 0.0
    for s_c in channels:
        for s_h in by_layer:
            total += p_head / d * s_c * s_h
        for s_i in hidden:
            total += 2 * s_c * s_i
    return total


@pytest.mark.parametrize(
    ("config", "original"),
    [(small(), None), (small((2, 3), 16, 8, ratio=2), None), (IRREGULAR, small())],
)
def test_expected_size_is_the_explicit_sum(config, original):
    masks, of = random_masks(config, original), original or config
    image = explicit_size(masks, "image", config.vision, of.vision)
    text = explicit_size(masks, "text", config.text, of.text)
    assert masks.image.size().item() == pytest.approx(image, rel=1e-6)
    assert masks.text.size().item() == pytest.approx(text, rel=1e-6)
    wanted = 1 - (image + text) / sum(prunable_parameters(of))
    assert masks.sparsity().item() == pytest.approx(wanted, abs=1e-7)


def test_expected_size_is_the_mean_of_samples():
    """Weights that are left, counted gate by gate in 4,000 draws."""
    config = small((2, 2), 16, 8)
    masks = random_masks(config, seed=3)
    counts = []
    for step in range(4000):
        gates = masks.sample(masks.uniform(1, step))
        left = 0.0
        for tower, of in zip(gates, (config.vision, config.text), strict=True):
            channels = (tower.channels != 0).sum().item()
            heads = sum((gate != 0).sum().item() for gate in tower.heads)
            hidden = sum((gate != 0).sum().item() for gate in tower.hidden)
            left += channels * (4 * of.head_dim * (1 + 1 / of.width) * heads + 2 * hidden)
        counts.append(left)
    counts = torch.tensor(counts)
    spread = 5 * counts.std().item() / math.sqrt(len(counts))
    expected = (masks.image.size() + masks.text.size()).item()
    assert counts.mean().item() == pytest.approx(expected, abs=spread)
    assert spread < 0.03 * expected


def test_expected_size_has_the_right_gradients():
    masks = random_masks(small((2, 1), 16, 8))
    inputs = tuple(masks.log_alphas())

    def sparsity(*values):
        return torch.func.functional_call(
            masks, dict(zip([n for n, p in masks.named_parameters() if "lambda" not in n], values,
                            strict=True)), (), strict=False,
        )  # fmt: skip

    masks.forward = masks.sparsity
    assert torch.autograd.gradcheck(sparsity, inputs)


def test_a_smaller_model_counts_as_its_padded_twin():
    """TinyCLIP's next stage: the pruned student in front of a full-size model, -10 where nothing
    is. What an absent slot of s(-10) = 2e-4 adds to that model's size is all the difference."""
    original, config = small(), IRREGULAR
    ours = random_masks(config, original)
    padded = Masks(original).double()
    with torch.no_grad():
        for mine, full, was, now in (
            (ours.image, padded.image, original.vision, config.vision),
            (ours.text, padded.text, original.text, config.text),
        ):
            for a in full.parameters():
                a.fill_(-10.0)
            full.channels[: len(mine.channels)] = mine.channels
            for kind, size in (("heads", "heads"), ("hidden", "mlp_width")):
                wide, narrow = (
                    [getattr(layer, size) or 0 for layer in tower.layers] for tower in (was, now)
                )
                parts = zip(
                    getattr(full, kind).split(wide), getattr(mine, kind).split(narrow), strict=True
                )
                for theirs, part in parts:
                    theirs[: len(part)] = part
    s = keep_probability(scalar(-10.0)).item()
    assert 2.2e-4 < s < 2.3e-4
    for mine, full in ((ours.image, padded.image), (ours.text, padded.text)):
        slots = [len(a) - len(b) for a, b in zip(full.parameters(), mine.parameters(), strict=True)]
        c, h, i = (keep_probability(a).sum().item() for a in mine.parameters())
        extra_c, extra_h, extra_i = (s * count for count in slots)
        extra = (c + extra_c) * (full._per_head * (h + extra_h) + 2 * (i + extra_i))
        extra -= c * (full._per_head * h + 2 * i)
        assert full.size().item() - mine.size().item() == pytest.approx(extra, rel=1e-9)
    assert 0 < ours.sparsity() - padded.sparsity() < 1e-3
    # The settled masks are the same, too, as no absent slot is among those that stay.
    ours, padded = ours.gates(), padded.gates()
    for mine, full in zip(ours, padded, strict=True):
        width = len(mine.channels)
        assert abs((full.channels != 0).sum() - (mine.channels != 0).sum()) <= 1
        assert (full.channels[width:] == 0).all()


@pytest.mark.parametrize("config", [small(), IRREGULAR])
def test_sparsity_of_a_config(config):
    """What the masks begin with where nothing is masked: certain to EPSILON."""
    masks = Masks(config, small()).double()
    with torch.no_grad():
        for a in masks.log_alphas():
            a.fill_(40.0)
    assert sparsity_of(config, small()) == pytest.approx(masks.sparsity().item(), abs=3e-6)
    b32 = get_config("ViT-B-32")
    assert 0 < sparsity_of(b32, b32) < 1e-3  # the MLPs' biases are in P and not in R


def test_masks_are_a_function_of_seed_and_step():
    masks, other = random_masks(small(), seed=1), random_masks(small(), seed=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = masks.uniform(7, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, drawn, other.uniform(7, 3)))
    for seed, step in ((7, 4), (8, 3), (3, 7), (-7, 3)):
        assert not torch.equal(torch.cat(drawn), torch.cat(masks.uniform(seed, step)))
    everything = torch.cat([torch.cat(masks.uniform(0, step)) for step in range(200)])
    assert everything.min() >= 0 and everything.max() < 1
    assert everything.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * len(everything)))
    assert [len(u) for u in drawn] == [len(a) for a in masks.log_alphas()]
    assert {u.dtype for u in drawn} == {torch.float64}
    # The same numbers in every precision.
    single = Masks(small()).uniform(7, 3)
    assert all(torch.equal(a, b.double()) for a, b in zip(drawn, single, strict=True))


def masked(config=None, target=0.5, **options) -> Masked:
    config = config or get_config(tiny.CONFIG)
    torch.manual_seed(0)
    clip = build.model(config.to_dict())
    return Masked(clip, random_masks(config).float(), Ramp(target, target, 0), **options)


def pair():
    return next(tiny.Memory().epoch(0)).pairs[0]


def test_a_step_has_random_masks_and_evaluation_has_settled_ones():
    model, (image, text) = masked(), pair()
    model.train().begin(3)
    first = model(image, text)[0]
    assert torch.equal(first, model(image, text)[0])
    model.begin(4)
    assert not torch.equal(first, model(image, text)[0])
    model.begin(3)
    assert torch.equal(first, model(image, text)[0])
    wanted = model.clip(image, text, model.masks.sample(model.masks.uniform(0, 3)))[0]
    assert torch.equal(first, wanted)
    model.eval()
    settled = model(image, text)
    assert torch.equal(settled[0], model.clip(image, text, model.masks.gates())[0])
    finished = model.finished()
    assert build.relative(finished(image, text)[0], settled[0]) < 1e-5
    assert finished.config.vision.width < model.clip.config.vision.width


def test_a_step_waits_for_nothing():
    model, (image, text) = masked(target=0.9), pair()
    objective = model.constrained(lambda image, text: {"loss": image.sum() + text.sum()})
    with NoSync():
        model.begin(3)
        objective(*model(image, text)[:2])["loss"].backward()
        model.eval()(image, text)
    assert all(p.grad is not None for p in model.masks.parameters())


def test_the_constraint():
    """lambda_1 m + lambda_2 m^2 where the sparsity is below its target, nothing above it."""
    model = masked(target=0.9)
    model.masks.lambda_2.data.fill_(4.0)
    missing = 0.9 - model.masks.sparsity().item()
    assert 0.1 < missing < 0.9
    base = torch.tensor(2.0)
    objective = model.constrained(lambda *args: {"loss": base, "affinity": base})
    terms = objective("image", "text", "scale", "pair", None)
    wanted = 2 + 10 * missing + 4 * missing**2
    assert terms["loss"].item() == pytest.approx(wanted, rel=1e-5)
    assert set(terms) == {"loss", "affinity", "target", "sparsity", "lambda_1", "lambda_2"}
    assert [terms[k].item() for k in ("affinity", "target", "lambda_1", "lambda_2")] == (
        pytest.approx([2.0, 0.9, 10.0, 4.0])
    )
    assert terms["sparsity"].item() == pytest.approx(model.masks.sparsity().item())
    terms["loss"].backward()
    assert model.masks.lambda_1.grad.item() == pytest.approx(missing, rel=1e-5)
    assert model.masks.lambda_2.grad.item() == pytest.approx(missing**2, rel=1e-5)
    assert all((a.grad > 0).all() for a in model.masks.log_alphas())  # descent makes them smaller

    above = masked(target=0.05)
    terms = above.constrained(lambda *args: {"loss": base})()
    assert terms["loss"].item() == 2.0
    terms["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in above.masks.parameters())


def test_the_target_rises():
    ramp = Ramp(0.1, 0.5, 8)
    assert [ramp(step) for step in (0, 2, 4, 8, 9, 1000)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.5, 0.5, 0.5]
    )
    assert Ramp(0.1, 0.5, 0)(0) == 0.5


def test_steps_of_masks_and_multipliers():
    """Log-alphas descend and multipliers ascend, each by lr at the first AdamW step whatever the
    schedule says; no decay; log-alphas stay within their bounds."""
    model = masked(target=0.9, lr=0.3)
    with torch.no_grad():
        model.masks.image.hidden.fill_(BOUNDS[0] + 0.1)
    update = Update(model, tiny.settings(ema=None, lr=1e-3, wd=0.5, eps=1e-12))
    before = {name: p.detach().clone() for name, p in model.masks.named_parameters()}
    objective = model.constrained(lambda *args: {"loss": model.clip(*pair())[0].sum()})
    update(0, objective()["loss"])
    assert update.rate == pytest.approx(1e-3 / 3)
    for name, parameter in model.masks.named_parameters():
        moved = parameter.detach() - before[name]
        if "lambda" in name:
            assert moved.item() == pytest.approx(0.3, rel=1e-4)
        elif name == "image.hidden":
            assert (parameter == torch.tensor(BOUNDS[0])).all()
        else:
            torch.testing.assert_close(moved, torch.full_like(moved, -0.3), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="ema must be None where more than a CLIP is trained"):
        Update(model, tiny.settings())
