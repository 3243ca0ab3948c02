"""nn.MultiheadAttention stands in for torch's: state dict, results, gradients, masks."""

import inspect
import pickle

import pytest
import torch
from torch import nn as torch_nn

from tinyclip import nn, ops

B, L, C, H = 3, 9, 48, 4


def pair(dtype=torch.float64, **options):
    torch.manual_seed(0)
    theirs = torch_nn.MultiheadAttention(C, H, dtype=dtype, **options)
    ours = nn.MultiheadAttention(C, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(batch_first: bool, count: int = 1, dtype=torch.float64):
    torch.manual_seed(1)
    shape = (B, L, C) if batch_first else (L, B, C)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def same(ours, theirs, x, call):
    """Output and every gradient, against torch's module in the same dtype."""
    results = []
    for module in (ours, theirs):
        for tensor in (*x, *module.parameters()):
            tensor.grad = None
        out = call(module)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append([out, *(t.grad for t in x), *(gradients[n] for n in sorted(gradients))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


def causal_masks(dtype=torch.float64):
    future = torch.ones(L, L, dtype=torch.bool).triu(1)
    additive = torch.zeros(L, L, dtype=dtype).masked_fill(future, float("-inf"))
    lowest = torch.zeros(L, L, dtype=dtype).masked_fill(future, torch.finfo(dtype).min)
    return {"bool": future, "-inf": additive, "lowest": lowest}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "memory", "query is key"])
def test_equals_torch(batch_first, bias, kind):
    ours, theirs = pair(batch_first=batch_first, bias=bias)
    x = inputs(batch_first, {"self": 1, "memory": 2, "query is key": 2, "cross": 3}[kind])
    q, k, v = {
        "self": (x[0],) * 3,
        "cross": x,
        "memory": (x[0], x[-1], x[-1]),
        "query is key": (x[0], x[0], x[-1]),
    }[kind]
    same(ours, theirs, x, lambda module: module(q, k, v, need_weights=False)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest", "hint"])
def test_causal(batch_first, kind):
    ours, theirs = pair(batch_first=batch_first)
    (x,) = inputs(batch_first)
    masks = causal_masks()
    mask = masks.get(kind, masks["bool"])
    options = {"need_weights": False, "attn_mask": mask, "is_causal": kind == "hint"}
    same(ours, theirs, [x], lambda module: module(x, x, x, **options)[0])
    alone = ours(x, x, x, is_causal=True)[0]
    torch.testing.assert_close(alone, ours(x, x, x, attn_mask=mask)[0], rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_key_padding_mask_true_is_ignored(batch_first):
    ours, theirs = pair(batch_first=batch_first)
    (x,) = inputs(batch_first)
    ignore = torch.arange(L) >= torch.tensor([[L], [4], [1]])
    options = {"key_padding_mask": ignore, "need_weights": False}
    same(ours, theirs, [x], lambda module: module(x, x, x, **options)[0])
    mask = causal_masks()["bool"]
    same(ours, theirs, [x], lambda module: module(x, x, x, attn_mask=mask, **options)[0])


def test_unbatched():
    ours, theirs = pair()
    x = torch.randn(L, C, dtype=torch.float64)
    memory = torch.randn(5, C, dtype=torch.float64)
    ignore = torch.arange(L) > 3
    for q, k, v, options in (
        (x, x, x, {}),
        (x, memory, memory, {}),
        (x, x, x, {"key_padding_mask": ignore}),
    ):
        expected = theirs(q, k, v, need_weights=False, **options)[0]
        torch.testing.assert_close(ours(q, k, v, **options)[0], expected)


def test_the_signatures_are_torchs():
    for name in ("__init__", "forward"):
        mine = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        theirs = inspect.signature(getattr(torch_nn.MultiheadAttention, name)).parameters
        assert list(mine)[: len(theirs)] == list(theirs)
        assert all(
            mine[extra].kind is mine[extra].KEYWORD_ONLY for extra in set(mine) - set(theirs)
        )
        differ = {key for key in theirs if mine[key].default != theirs[key].default}
        assert differ == ({"need_weights"} if name == "forward" else set())


def test_starts_as_torch_does():
    torch.manual_seed(0)
    theirs = torch_nn.MultiheadAttention(C, H).state_dict()
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(C, H).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("width", [50, 20])
def test_heads_need_not_make_the_width(width):
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(width, 3, head_dim=16, batch_first=True, dtype=torch.float64)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert shapes == {
        "in_proj_weight": (144, width),
        "in_proj_bias": (144,),
        "out_proj.weight": (width, 48),
        "out_proj.bias": (width,),
    }
    x = torch.randn(B, L, width, dtype=torch.float64)
    q, k, v = (x @ ours.in_proj_weight.T).reshape(B, L, 3, 3, 16).permute(2, 0, 3, 1, 4)
    heads = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    expected = heads.transpose(1, 2).flatten(2) @ ours.out_proj.weight.T
    torch.testing.assert_close(ours(x, x, x)[0], expected)


def test_head_gate():
    ours, _ = pair(batch_first=True)
    (x,) = inputs(True)
    gate = torch.tensor([1.0, 0.0, 0.5, 2.0], requires_grad=True)
    out, _ = ours(x, x, x, head_gate=gate)
    out.sum().backward()
    assert gate.grad.abs().min() > 0
    with torch.no_grad():
        ours.out_proj.weight.mul_(gate.detach().repeat_interleave(C // H))
    torch.testing.assert_close(ours(x, x, x)[0], out)


def test_a_mask_that_is_not_causal_is_refused():
    ours, _ = pair(batch_first=True)
    (x,) = inputs(True)
    good = causal_masks()["-inf"]
    wrong = [good.T, good[:-1], good[None].expand(B * H, L, L), good + 0.5 * (good == 0)]
    wrong += [torch.zeros(L, L), ~causal_masks()["bool"], torch.zeros(L, L, dtype=torch.long)]
    nan = good.clone()
    nan[0, 1] = float("nan")
    almost = good.clone()
    almost[4, 5] = 0
    for mask in (*wrong, nan, almost):
        with pytest.raises(ValueError, match="attn_mask must be None or exactly the causal mask"):
            ours(x, x, x, attn_mask=mask)


def test_a_causal_mask_of_other_lengths_is_refused():
    ours, _ = pair(batch_first=True)
    (x,) = inputs(True)
    mask = causal_masks()["bool"]
    ours(x, x, x, attn_mask=mask)  # and is remembered
    for shorter in (x[:, :-1], x[:, :1]):
        with pytest.raises(ValueError, match="attn_mask must be None or exactly the causal mask"):
            ours(shorter, shorter, shorter, attn_mask=mask)
    with pytest.raises(TypeError, match=r"attn_mask must be None or a torch\.Tensor"):
        ours(x, x, x, attn_mask=[[False]])


def test_in_torchs_encoder_layer():
    """Whose own fast path, in eval mode, would take the weights and leave the module out."""
    (x,) = inputs(True)
    layer = torch.nn.TransformerEncoderLayer(C, H, 2 * C, dropout=0.0, batch_first=True)
    layer = layer.to(x.dtype).eval()
    with torch.no_grad():
        expected = layer(x)
        ours = nn.MultiheadAttention(C, H, batch_first=True, dtype=x.dtype)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
        torch.testing.assert_close(layer(x), expected)


def test_a_mask_is_read_again_when_it_changes():
    ours, _ = pair(batch_first=True)
    (x,) = inputs(True)
    mask = causal_masks()["-inf"]
    ours(x, x, x, attn_mask=mask)
    ours(x, x, x, attn_mask=mask)
    mask[0, 1] = 0
    with pytest.raises(ValueError, match="attn_mask"):
        ours(x, x, x, attn_mask=mask)
    assert pickle.loads(pickle.dumps(ours)).num_heads == H


def test_a_mask_made_in_inference_mode():
    """It has no version, so it is read at every call."""
    ours, theirs = pair(batch_first=True)
    (x,) = inputs(True)
    with torch.inference_mode():
        mask = causal_masks()["-inf"]
        for _ in range(2):
            expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
            torch.testing.assert_close(ours(x, x, x, attn_mask=mask)[0], expected)
        mask[0, 1] = 0
        with pytest.raises(ValueError, match="attn_mask"):
            ours(x, x, x, attn_mask=mask)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"dropout": 0.1}, "dropout=0.1 is not supported"),
        ({"add_bias_kv": True}, "add_bias_kv=True is not supported"),
        ({"add_zero_attn": True}, "add_zero_attn=True is not supported"),
        ({"kdim": 12}, "kdim=12 is not supported"),
        ({"vdim": 12}, "vdim=12 is not supported"),
        ({"num_heads": 5}, "48 must be divisible by num_heads 5"),
        ({"num_heads": 0}, "must be positive, got 48 and 0"),
    ],
)
def test_malformed(options, rule):
    with pytest.raises(ValueError, match=rule):
        nn.MultiheadAttention(**{"embed_dim": C, "num_heads": H, **options})


def test_malformed_calls():
    ours, _ = pair(batch_first=True)
    (x,) = inputs(True)
    with pytest.raises(ValueError, match="need_weights must be False, got True"):
        ours(x, x, x, need_weights=True)
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        ours(x, x, x, key_padding_mask=torch.zeros(B, L))
    with pytest.raises(ValueError, match="query must have 2 or 3 dimensions"):
        ours(x[None], x[None], x[None])


def test_the_packed_projection_is_not_copied(monkeypatch):
    """Self-attention hands over what the projection wrote, in either layout."""
    seen = []
    real = ops.attention_qkv
    monkeypatch.setattr(ops, "attention_qkv", lambda qkv, **k: seen.append(qkv) or real(qkv, **k))
    for batch_first in (True, False):
        ours, _ = pair(batch_first=batch_first)
        (x,) = inputs(batch_first)
        ours(x, x, x)
        assert seen[-1].shape == (B, L, 3, H, C // H)
        assert seen[-1].stride()[2:] == (C, C // H, 1)


def test_compiles_whole():
    ours, _ = pair(torch.float32, batch_first=True)
    (x,) = inputs(True, dtype=torch.float32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], ours(x, x, x)[0])
    out = compiled(x, x, x, is_causal=True)[0]
    torch.testing.assert_close(out, ours(x, x, x, is_causal=True)[0])
