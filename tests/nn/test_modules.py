"""LayerNorm, GELUMLP, ResidualAttentionBlock and ContrastiveLoss beside their twins."""

import pytest
import torch
from torch import nn as torch_nn

import tinyclip
from tinyclip import nn


def gradients(module, x, call):
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    out = call(module)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out, x.grad, *(p.grad for p in module.parameters())]


def close(ours, theirs, **tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **({"rtol": 0, "atol": 1e-11} | tolerance))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_equals_torch(affine, bias):
    options = {"elementwise_affine": affine, "bias": bias, "dtype": torch.float64}
    theirs, ours = torch_nn.LayerNorm(20, 1e-4, **options), nn.LayerNorm((20,), 1e-4, **options)
    for p in theirs.parameters():
        p.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 20, dtype=torch.float64, requires_grad=True)
    close(gradients(ours, x, lambda m: m(x)), gradients(theirs, x, lambda m: m(x)))
    residual = torch.randn(3, 5, 20, dtype=torch.float64)
    y, total = ours(x, residual)
    close([y, total], [theirs(x + residual), x + residual])


def test_layer_norm_masks_channels():
    ours = nn.LayerNorm(6, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    kept = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    y = ours(x, channel_mask=kept)
    assert (y[:, ~kept] == 0).all()
    close([y[:, kept]], [torch.nn.functional.layer_norm(x[:, kept], (4,))])


def test_layer_norm_has_its_twins_dtype():
    x = torch.randn(3, 20, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.LayerNorm(20)(x).dtype == torch.float32  # as torch.nn.LayerNorm on CUDA
        open_clips = nn.LayerNorm(20, keep_dtype=True)
        assert open_clips(x).dtype == torch.bfloat16
        y, total = open_clips(x, x.float())
        assert (y.dtype, total.dtype) == (torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"one dimension \(C,\), got \(3, 20\)"):
        nn.LayerNorm((3, 20))


TWINS = {
    "gelu": torch_nn.GELU(),
    "gelu_tanh": torch_nn.GELU("tanh"),
    "relu": torch_nn.ReLU(),
}


@pytest.mark.parametrize("activation", [*TWINS, "quick_gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_equals_a_sequence(activation, bias):
    ours = nn.GELUMLP(12, 30, activation, bias, dtype=torch.float64)

    def theirs(module, x):
        y = module.c_fc(x)
        y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else TWINS[activation](y)
        return module.c_proj(y)

    assert next(iter(ours.state_dict())) == "c_fc.weight"
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    close(gradients(ours, x, lambda m: m(x)), gradients(ours, x, lambda m: theirs(m, x)))
    gate = torch.rand(30, dtype=torch.float64)
    gated = ours(x, hidden_gate=gate)
    with torch.no_grad():
        ours.c_proj.weight.mul_(gate)
    close([gated], [ours(x)])


def test_mlp_of_no_hidden_channels(recwarn):
    ours = nn.GELUMLP(12, 0)
    assert not recwarn
    assert torch.equal(ours(torch.randn(3, 12)), ours.c_proj.bias.expand(3, 12))
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'swish'"):
        nn.GELUMLP(12, 3, "swish")
    with pytest.raises(ValueError, match="width must be positive"):
        nn.GELUMLP(0, 3)


@pytest.mark.parametrize("quick", [False, True], ids=["erf", "quick"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_block_equals_open_clip(quick, batch_first, causal):
    twin = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    act = twin.QuickGELU if quick else torch_nn.GELU
    theirs = twin.ResidualAttentionBlock(
        48, 3, mlp_ratio=2.5, act_layer=act, batch_first=batch_first
    ).double()
    activation = "quick_gelu" if quick else "gelu"
    ours = nn.ResidualAttentionBlock(
        48, 3, 2.5, activation=activation, batch_first=batch_first, dtype=torch.float64
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    shape = (2, 9, 48) if batch_first else (9, 2, 48)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1) if causal else None
    expected = gradients(theirs, x, lambda m: m(x, attn_mask=mask))
    close(gradients(ours, x, lambda m: m(x, attn_mask=mask)), expected)
    close(gradients(ours, x, lambda m: m(x, is_causal=causal)), expected)


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("mlp_width", [None, 0, 7])
def test_a_block_of_any_shape(heads, mlp_width):
    """Halves are absent, and absent from the state dict; what is left is the plain sum."""
    block = nn.ResidualAttentionBlock(
        20, heads, mlp_ratio=None, mlp_width=mlp_width, head_dim=16, dtype=torch.float64
    )
    halves = {name.split(".")[0] for name in block.state_dict()}
    expected = ({"ln_1", "attn"} if heads else set()) | (
        {"ln_2", "mlp"} if mlp_width is not None else set()
    )
    assert halves == expected
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    y = x
    if heads:
        z = block.ln_1(y)
        y = y + block.attn(z, z, z)[0]
    if mlp_width is not None:
        y = y + block.mlp(block.ln_2(y))
    close([block(x)], [y])


def test_contrastive_loss():
    torch.manual_seed(0)
    i, t, ti, tt = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(4))
    logits, soft = 20.0 * i @ t.T, 30.0 * ti @ tt.T
    labels = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    hard = (entropy(logits, labels) + entropy(logits.T, labels)) / 2
    mimic = (entropy(logits, soft.softmax(1)) + entropy(logits.T, soft.T.softmax(1))) / 2
    torch.testing.assert_close(nn.ContrastiveLoss()(i, t, 20.0), hard)
    teacher = tinyclip.Teacher(ti, tt, 30.0)
    both = nn.ContrastiveLoss(alpha=0.25)(i, t, 20.0, teacher)
    torch.testing.assert_close(both, 0.75 * hard + 0.25 * mimic)
    with pytest.raises(ValueError, match="teacher"):
        nn.ContrastiveLoss(alpha=0.5)(i, t, 20.0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        nn.ContrastiveLoss(alpha=1.5)


def test_contrastive_loss_passes_its_group_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(tinyclip.ops, "contrastive_loss", lambda *a, **k: seen.update(k))
    group = object()
    nn.ContrastiveLoss(group=group)(None, None, 1.0)
    assert seen["group"] is group


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_two_mlps_in_one_graph_of_any_batch(activation):
    """A constant of the second must not be a symbol of the first one's part of the graph."""
    torch.manual_seed(0)
    pair = torch.nn.Sequential(nn.GELUMLP(8, 16, activation), nn.GELUMLP(8, 16, activation))
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), pair(x))
