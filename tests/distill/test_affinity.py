"""Affinity mimicking against its formula, written out in fp64; and what the teacher may be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.contrastive.test_ranks import launch
from tests.models import build
from tinyclip import ops
from tinyclip.distill import AffinityMimicking

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
STUDENT = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
# Another width, another input size, another vocabulary and context.
TEACHER = {
    "embed_dim": 20,
    "vision_cfg": {**VISION, "image_size": [4, 12], "width": 24},
    "text_cfg": {**TEXT, "vocab_size": 50, "context_length": 9, "width": 24, "heads": 3},
}
PAIRS = 7


def student_and_features(dtype=torch.float64):
    model = build.model(STUDENT, seed=3).to(dtype)
    image = torch.randn(PAIRS, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return model, model(image.to(dtype), build.captions(30, 6, PAIRS))


def teacher_and_pair(dtype=torch.float64, scale=21.0):
    model = build.model(TEACHER, seed=8).to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(scale).log_()
    image = torch.randn(PAIRS, 3, 4, 12, generator=torch.Generator().manual_seed(5))
    return model, (image, build.captions(50, 9, PAIRS, seed=6))


def soft_cross_entropy(logits, target):
    """Mean over the rows of ``-sum_j p_ij log q_ij``, both softmaxes written out."""
    p = target.exp() / target.exp().sum(1, keepdim=True)
    return -(p * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()


def formula(image, text, scale, t_image, t_text, t_scale):
    """(affinity, clip) of whole matrices."""
    s, t = scale * image @ text.T, t_scale * t_image @ t_text.T
    affinity = (soft_cross_entropy(s, t) + soft_cross_entropy(s.T, t.T)) / 2
    rows = -(s.diagonal() - s.exp().sum(1).log()).mean()
    columns = -(s.diagonal() - s.exp().sum(0).log()).mean()
    return affinity, (rows + columns) / 2


@pytest.mark.parametrize("teacher_scale", [None, 50.0])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_formula(alpha, teacher_scale):
    """Loss, terms, and the gradients of every parameter of the student, the scale's included."""
    model, features = student_and_features()
    teacher, pair = teacher_and_pair()
    with torch.no_grad():
        t_image, t_text, t_scale = teacher(pair[0].double(), pair[1])
    affinity, clip = formula(*features, t_image, t_text, teacher_scale or t_scale)
    wanted_loss = (1 - alpha) * clip + alpha * affinity
    wanted = torch.autograd.grad(wanted_loss, list(model.parameters()), retain_graph=True)

    objective = AffinityMimicking(teacher, alpha=alpha, teacher_scale=teacher_scale)
    terms = objective(*features, pair)
    terms["loss"].backward()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(terms["loss"], wanted_loss, **close)
    named = {"affinity": affinity} if alpha else {}
    named |= {"clip": clip} if alpha < 1 else {}
    assert set(terms) == {"loss", *named}
    for name, value in named.items():
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], value.detach(), **close)
    for parameter, truth in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, truth, **close)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_teacher_that_is_the_student_teaches_nothing():
    """Equal features and scales: the cross-entropy is at its least, the gradient is zero."""
    _, (image, text, scale) = student_and_features()
    same = build.model(STUDENT, seed=3).double()
    pair = (
        torch.randn(PAIRS, 3, 8, 8, generator=torch.Generator().manual_seed(4)),
        build.captions(30, 6, PAIRS),
    )
    terms = AffinityMimicking(same)(image, text, scale, pair)
    for gradient in torch.autograd.grad(terms["loss"], (image, text, scale), retain_graph=True):
        assert gradient.abs().max() < 1e-14
    # Not so with another scale: each side has its own.
    terms = AffinityMimicking(same, teacher_scale=50.0)(image, text, scale, pair)
    (gradient,) = torch.autograd.grad(terms["loss"], (image,), retain_graph=True)
    assert gradient.abs().max() > 1e-3
    # The value is then the teacher's entropy.
    s = (scale * image @ text.T).detach()
    entropy = (soft_cross_entropy(s, s) + soft_cross_entropy(s.T, s.T)) / 2
    terms = AffinityMimicking(same)(image, text, scale, pair)
    torch.testing.assert_close(terms["affinity"], entropy)


def test_without_parts_only_the_loss(monkeypatch):
    """Parts cost one more pass, and only where both count."""
    calls = []
    loss = ops.contrastive_loss
    monkeypatch.setattr(ops, "contrastive_loss", lambda *a, **k: calls.append(k) or loss(*a, **k))
    _, features = student_and_features()
    teacher, pair = teacher_and_pair()
    for alpha, parts, count in ((0.3, False, 1), (0.3, True, 2), (1.0, True, 1), (0.0, True, 1)):
        calls.clear()
        terms = AffinityMimicking(teacher, alpha=alpha, parts=parts)(*features, pair)
        assert len(calls) == count
        assert (set(terms) == {"loss"}) is not parts


def test_the_teacher_is_not_run_at_alpha_zero():
    class Unused(nn.Linear):
        def forward(self, *args):
            raise AssertionError("the teacher was run")

    _, features = student_and_features()
    terms = AffinityMimicking(Unused(1, 1), alpha=0.0)(*features, (None, None))
    torch.testing.assert_close(terms["loss"], ops.contrastive_loss(*features))


def test_any_module_can_teach():
    """Its own float type, dropout off, no gradient, and images cast to its parameters."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.drop = nn.Linear(3, 5, dtype=torch.float64), nn.Dropout(0.5)
            self.text = nn.Embedding(9, 5, dtype=torch.float64)

        def forward(self, image, text):
            assert not torch.is_grad_enabled()
            image = self.drop(self.image(image.mean((2, 3))))
            return F.normalize(image, dim=1), F.normalize(self.text(text).mean(1), dim=1), 7.0

    other = Other()
    objective = AffinityMimicking(other.train())
    assert not other.training and not other.drop.training
    pair = torch.randn(PAIRS, 3, 2, 2), torch.randint(0, 9, (PAIRS, 4))
    first, second = objective.target(pair), objective.target(pair)
    assert torch.equal(first.image, second.image) and first.image.dtype == torch.float64
    _, features = student_and_features(torch.float32)
    objective(*features, pair)["loss"].backward()


def test_the_teacher_runs_under_autocast():
    """In the precision of the step, and what is kept for backward is no inference tensor."""
    model, _ = student_and_features(torch.float32)
    teacher, pair = teacher_and_pair(torch.float32)
    objective = AffinityMimicking(teacher, alpha=0.5)
    image = torch.randn(PAIRS, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        target = objective.target(pair)
        assert target.image.dtype == torch.bfloat16
        assert not target.image.is_inference()
        loss = objective(*model(image, build.captions(30, 6, PAIRS)), pair)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert objective.target(pair).image.dtype == torch.float32


def test_wrong_arguments():
    teacher, pair = teacher_and_pair()
    _, features = student_and_features()
    for alpha in (-0.1, 1.1, "1", None, float("nan")):
        with pytest.raises(ValueError, match="alpha must be a number in"):
            AffinityMimicking(teacher, alpha=alpha)
    for scale in (0.0, -1.0, float("inf"), float("nan"), "50"):
        with pytest.raises(ValueError, match="teacher_scale must be a positive number"):
            AffinityMimicking(teacher, teacher_scale=scale)
    with pytest.raises(TypeError, match="teacher must be a module, got function"):
        AffinityMimicking(lambda image, text: None)
    with pytest.raises(ValueError, match="on the teacher's device, cpu, got meta"):
        AffinityMimicking(teacher)(*features, (pair[0].to("meta"), pair[1]))


def test_two_ranks(tmp_path):
    """gloo processes with a DDP student: parameters' gradients are those of one process."""
    print(*launch("tests.distill.ranks", tmp_path / "store", 2), sep="\n")
