"""Every refusal has its reason in the report, strict raises it, and the report's text is whole."""

import copy
import re

import pytest
import torch
from torch import nn

import tinyclip
from tests.integrations import build
from tinyclip import _extension
from tinyclip.integrations.swaps.base import is_swapped


def of_timm(name, *args, **kwargs):
    def make():
        return getattr(pytest.importorskip("timm.layers"), name)(*args, **kwargs)

    return make


def of_open_clip(name, *args, **kwargs):
    def make():
        return getattr(pytest.importorskip("open_clip.transformer"), name)(*args, **kwargs)

    return make


def in_eager():
    model = build.hf_clip().model
    model.set_attn_implementation("eager")
    return model.text_model


def fast_norm():
    norm = of_timm("LayerNorm", 24)()
    norm._fast_norm = True
    return norm


class OwnForward(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query + 1, key, value, **options)


class Unknown(nn.Module):
    """Attention by someone else."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)


def replaced_forward():
    norm = nn.LayerNorm(24)
    norm.forward = lambda x: x
    return norm


def sequential(*between):
    return lambda: nn.Sequential(nn.Linear(24, 48), *between, nn.Linear(48, 24))


CUSTOM = {"width": 24, "layers": 1, "heads": 3}
REFUSALS = {
    "kdim": (lambda: nn.MultiheadAttention(24, 3, kdim=12), "kdim or vdim"),
    "add_bias_kv": (lambda: nn.MultiheadAttention(24, 3, add_bias_kv=True), "add_bias_kv"),
    "add_zero_attn": (lambda: nn.MultiheadAttention(24, 3, add_zero_attn=True), "add_zero_attn"),
    "own forward": (lambda: OwnForward(24, 3), "a MultiheadAttention with a forward of its own"),
    "replaced forward": (replaced_forward, "its forward was replaced already"),
    "two dims": (lambda: nn.LayerNorm((4, 6)), "(4, 6) has more than one dimension"),
    "norm of its own": (of_timm("LayerNorm2d", 24), "a LayerNorm with a forward of its own"),
    "fast norm": (fast_norm, "set_fast_norm"),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(24, 3), "written into its forward"),
    "silu": (sequential(nn.SiLU()), "activation SiLU is none of"),
    "norm inside": (sequential(nn.GELU(), nn.LayerNorm(48)), "LayerNorm inside the MLP"),
    "quantised": (
        lambda: nn.Sequential(nn.LazyLinear(48), nn.GELU(), nn.Linear(48, 24)),
        "LazyLinear is no plain torch.nn.Linear",
    ),
    "qk_norm": (of_timm("Attention", 24, 3, qk_norm=True, norm_layer=nn.LayerNorm), "qk_norm"),
    "rope": (of_timm("AttentionRope", 24, 3), "rotary position embeddings"),
    "gated mlp": (of_timm("GluMlp", 24, 48), "a gated MLP"),
    "mlp norm": (of_timm("Mlp", 24, 48, norm_layer=nn.LayerNorm), "LayerNorm inside the MLP"),
    "conv mlp": (of_timm("Mlp", 24, 48, use_conv=True), "Conv2d is no plain torch.nn.Linear"),
    "eager": (in_eager, "attn_implementation='eager': only 'sdpa' is taken over"),
    "open_clip qk_norm": (of_open_clip("Attention", 24, 3, qk_norm=True), "qk_norm"),
    "scaled cosine": (of_open_clip("Attention", 24, 3, scaled_cosine=True), "scaled_cosine"),
    "scale_heads": (of_open_clip("Attention", 24, 3, scale_heads=True), "scale_heads"),
    "scale_fc": (
        of_open_clip("CustomResidualAttentionBlock", 24, 3, scale_fc=True),
        "LayerNorm inside the MLP",
    ),
    "pooler": (of_open_clip("AttentionalPooler", 24, 12, 3), "kdim or vdim"),
    "unknown": (Unknown, "its class is not known"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_has_a_reason(case):
    make, reason = REFUSALS[case]
    model = make()
    report = tinyclip.accelerate(model)
    assert any(reason in row.reason for row in report.skipped), report
    assert reason in str(report)
    tinyclip.restore(model)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        tinyclip.accelerate(model, strict=True)
    assert str(caught.value).startswith("accelerate: strict is True")
    assert not any(map(is_swapped, model.modules()))


X = torch.randn(2, 5, 24)
CALLS = {
    "need_weights": (nn.MultiheadAttention(24, 3), (X, X, X), {}, "need_weights=True"),
    "no batch": (
        nn.MultiheadAttention(24, 3),
        (X[0], X[0], X[0]),
        {"need_weights": False},
        "has no batch",
    ),
    "float padding": (
        nn.MultiheadAttention(24, 3, batch_first=True),
        (X, X, X),
        {"need_weights": False, "key_padding_mask": torch.zeros(2, 5)},
        "key_padding_mask is no bool mask",
    ),
    "bias": (
        nn.MultiheadAttention(24, 3, batch_first=True),
        (X, X, X),
        {"need_weights": False, "attn_mask": torch.randn(5, 5)},
        "attn_mask is not causal",
    ),
    "causal, fewer keys": (
        nn.MultiheadAttention(24, 3, batch_first=True),
        (X, X[:, :3], X[:, :3]),
        {"need_weights": False, "attn_mask": torch.ones(5, 3).triu(1) > 0, "is_causal": True},
        "is_causal with other keys than queries",
    ),
    "dropout": (
        nn.MultiheadAttention(24, 3, dropout=0.5),
        (X, X, X),
        {"need_weights": False},
        "dropout 0.5 in training",
    ),
    "mlp dropout": (
        nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(0.5), nn.Linear(48, 24)),
        (X,),
        {},
        "dropout 0.5 in training",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_the_host_s_is_counted_and_equal(case):
    theirs, arguments, options, reason = CALLS[case]
    ours = copy.deepcopy(theirs)
    report = tinyclip.accelerate(ours)
    assert not report.declined
    for calls in (1, 2):
        results = []
        for one in (ours, theirs):
            torch.manual_seed(0)
            results.append(build.of(one(*arguments, **options)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        ((name, said), count) = next(iter(report.declined.items()))
        assert (name, count) == (type(theirs).__name__, calls)
        assert reason in said
        assert f"{calls} x {name}: {said}" in str(report)
    # In eval mode nothing drops, and both op and host can be used again.
    if "dropout" in case:
        assert any("in training the host computes it: dropout 0.5" in line
                   for line in str(report).splitlines())  # fmt: skip
        ours.eval()(*arguments, **options)
        assert sum(report.declined.values()) == 2


@pytest.mark.parametrize("case", CALLS)
def test_under_strict_such_a_call_raises(case):
    theirs, arguments, options, reason = CALLS[case]
    model = copy.deepcopy(theirs)
    if "dropout" in case:
        with pytest.raises(ValueError, match="in training the host computes it"):
            tinyclip.accelerate(model, strict=True)
        model.eval()
    tinyclip.accelerate(model, strict=True)
    model.train()
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        model(*arguments, **options)
    tinyclip.restore(model)
    model(*arguments, **options)


@pytest.mark.parametrize("name", sorted(set(build.HOSTS) - {"openai", "torch"}))
def test_strict_is_content_with_whole_models(name):
    host = build.HOSTS[name]()
    report = tinyclip.accelerate(host.model, strict=True)
    assert not report.skipped
    host.run(host.model)


def test_a_model_of_which_nothing_is_known():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = tinyclip.accelerate(model)
    assert (report.replaced, report.skipped) == ((), ())
    assert str(report) == "accelerate: 0 modules of Sequential compute with tinyclip.ops"
    with pytest.raises(ValueError, match="nothing of Sequential is known"):
        tinyclip.accelerate(model, strict=True)


def test_strict_is_content_with_what_was_swapped_before():
    host = build.open_clip_clip()
    tinyclip.accelerate(host.model)
    assert tinyclip.accelerate(host.model, strict=True).already == 23


def test_a_stranger_is_named_only_where_nothing_in_it_is_known():
    """A model with two projections of its own is no attention; someone else's attention is."""
    pytest.importorskip("timm")
    from timm.models.eva import Eva

    model = Eva(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, use_rot_pos_emb=True)
    report = tinyclip.accelerate(model)
    assert {row.name: row.count for row in report.skipped} == {"EvaAttention": 2, "GluMlp": 2} or {
        row.name: row.count for row in report.skipped
    } == {"EvaAttention": 2}
    assert not tinyclip.accelerate(build.hf_clip().model).skipped
    alone = tinyclip.accelerate(Unknown(), attention=False, mlp=False)
    assert not alone.skipped


def test_the_text():
    host = build.open_clip_clip()
    host.model.float()
    block = host.model.visual.transformer.resblocks[0]
    block.attn = nn.MultiheadAttention(64, 2, kdim=7)
    text = str(tinyclip.accelerate(host.model))
    device = "needs a CUDA device or TRITON_INTERPRET=1, the tensors are on cpu"
    assert text.splitlines() == [
        "accelerate: 22 modules of CLIP compute with tinyclip.ops",
        "    11 x LayerNorm: layer_norm -> torch",
        "     4 x ResidualAttentionBlock: residual addition inside ln_2",
        "     4 x Sequential: gelu_mlp, gelu -> cpu",
        "     3 x MultiheadAttention: attention, 2 heads of 32 -> torch",
        f"       not triton: {device}",
        "left as they are:",
        "     1 x MultiheadAttention (visual.transformer.resblocks.0.attn): kdim or vdim differs"
        " from embed_dim",
    ]


def test_the_backend_is_the_one_that_dispatch_would_choose():
    rows = tinyclip.accelerate(build.timm_vit().model).replaced
    compiled = "torch" if _extension.load() is None else "cpu"
    for row in rows:
        expected = compiled if row.detail.startswith("gelu_mlp") else "torch"
        assert row.name == "Block" or row.backend == expected
    with tinyclip.backend("reference"):
        rows = tinyclip.accelerate(build.timm_vit().model).replaced
    assert {row.backend for row in rows if row.name != "Block"} == {"reference"}
    with tinyclip.backend("cuda"):
        rows = tinyclip.accelerate(build.timm_vit().model).replaced
    assert {row.backend for row in rows if row.name != "Block"} == {"none"}


@pytest.mark.parametrize("form", ["tuple", "mapping", "tensor"])
def test_check_runs_both_ways_and_leaves_the_model_as_it_was(form):
    host = build.timm_vit(drop_path_rate=0.5) if form == "tensor" else build.hf_clip()
    inputs = {
        "tensor": build.pixels(),
        "tuple": (build.ids(), build.pixels()),
        "mapping": {"input_ids": build.ids(), "pixel_values": build.pixels()},
    }[form]
    host.model.train()
    next(host.model.children()).eval()
    modes = [module.training for module in host.model.modules()]
    report = tinyclip.accelerate(host.model, check=inputs)
    assert 0 <= report.check.error < 1e-13
    assert 0 < report.check.time_ratio < 100
    assert re.search(r"check: worst relative error .*e-\d\d, time \d+\.\d\d of", str(report))
    assert modes == [module.training for module in host.model.modules()]
    assert all(p.grad is None for p in host.model.parameters())


def test_check_sees_a_wrong_result(monkeypatch):
    from tinyclip import ops

    host = build.timm_vit()
    original = ops.gelu_mlp
    monkeypatch.setattr(ops, "gelu_mlp", lambda *a, **k: original(*a, **k) * 1.01)
    report = tinyclip.accelerate(host.model, check=build.pixels())
    assert 1e-4 < report.check.error < 1


def test_check_that_fails_leaves_the_model_as_it_was():
    host = build.timm_vit()
    with pytest.raises(Exception, match="doesn't match"):
        tinyclip.accelerate(host.model, check=build.pixels(size=40))
    assert not any(map(is_swapped, host.model.modules()))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (("model",), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.LayerNorm(4), 1), {}, TypeError, "attention must be a bool, got int"),
        ((nn.LayerNorm(4),), {"norm": "yes"}, TypeError, "norm must be a bool, got str"),
        ((nn.LayerNorm(4),), {"strict": None}, TypeError, "strict must be a bool, got NoneType"),
    ],
)
def test_arguments(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(f"accelerate: {text}")):
        tinyclip.accelerate(*arguments, **options)


def test_another_version_s_arguments_are_refused(monkeypatch):
    """A host's forward with other arguments is another host."""
    transformers = pytest.importorskip("transformers.models.clip.modeling_clip")

    def old(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        raise AssertionError

    monkeypatch.setattr(transformers.CLIPAttention, "forward", old)
    report = tinyclip.accelerate(build.hf_clip().model)
    (row,) = report.skipped
    assert (row.name, row.count) == ("CLIPAttention", 4)
    assert row.reason == (
        "a version with other arguments: hidden_states, attention_mask, causal_attention_mask,"
        " output_attentions"
    )


def test_openai_s_package_is_known_where_it_is_there(monkeypatch):
    host = build.openai_package(monkeypatch)
    plain = copy.deepcopy(host.model)
    report = tinyclip.accelerate(host.model, strict=True)
    assert {row.name: row.count for row in report.replaced} == host.swapped
    ours, our_gradients = build.gradients(host, host.model)
    theirs, their_gradients = build.gradients(host, plain)
    assert build.distance(ours[0], theirs[0]) < 1e-13
    build.assert_same(our_gradients, their_gradients)
    assert not report.declined
