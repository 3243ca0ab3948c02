"""An activation is recognised by what it computes, whatever it is called."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyclip.integrations.swaps.activations import formula_of


class Impostor(nn.Module):
    """Called GELU, and another function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


Impostor.__name__ = "GELU"


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (F.gelu, "gelu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (Impostor(lambda x: x * torch.sigmoid(1.702 * x)), "quick_gelu"),
        (Impostor(lambda x: x * torch.sigmoid(1.7 * x)), None),
        (Impostor(lambda x: F.gelu(x).clamp(max=10)), None),
        (Impostor(lambda x: F.relu(x) * (x < 5000)), None),
        (Impostor(lambda x: x.sum()), None),
        (Impostor(lambda x: x.missing), None),
        (Impostor(lambda x: F.gelu(x).float()), None),
        (nn.SiLU(), None),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(), None),
        (nn.PReLU(), None),
        (nn.PReLU(init=0.0, dtype=torch.float64), None),  # ReLU today, and learned
        (nn.Identity(), None),
        (nn.Sequential(nn.GELU()), None),
        ("gelu", None),
        (None, None),
    ],
    ids=str,
)
def test_formula(activation, formula):
    assert formula_of(activation) == formula


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("gelu_10", None),
        ("silu", None),
        ("mish", None),
        ("relu2", None),
        ("relu6", None),
    ],
)
def test_transformers(name, formula):
    table = pytest.importorskip("transformers.activations").ACT2FN
    assert formula_of(table[name]) == formula


@pytest.mark.parametrize(
    ("where", "name", "formula"),
    [
        ("open_clip.transformer", "QuickGELU", "quick_gelu"),
        ("timm.layers.activations", "GELU", "gelu"),
        ("timm.layers.activations", "GELUTanh", "gelu_tanh"),
        ("timm.layers.activations", "QuickGELU", "quick_gelu"),
        ("timm.layers.activations", "HardSwish", None),
    ],
)
def test_open_clip_and_timm(where, name, formula):
    assert formula_of(getattr(pytest.importorskip(where), name)()) == formula


class Noisy(nn.Module):
    """ReLU in eval mode, dropout besides in training: no activation of ours."""

    def forward(self, x):
        return F.dropout(F.relu(x), 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_what_changes_with_training_is_none(training):
    noisy = Noisy().train(training)
    state = torch.random.get_rng_state()
    assert formula_of(noisy) is None
    assert noisy.training == training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert formula_of(nn.RReLU(0.0, 0.0).train(training)) == "relu"


def test_defaults_of_the_process_do_not_matter():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            assert formula_of(nn.GELU()) == "gelu"
    finally:
        torch.set_default_dtype(before)
