"""A model computes the same before and after `accelerate`: outputs, gradients, dtypes, compiled."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tinyclip
from tests.integrations import build
from tinyclip import ops
from tinyclip.integrations import Report

HOSTS = pytest.mark.parametrize("name", build.HOSTS)
# Padded masks are read for what they hide; a graph cannot read, so there the host's forward is it.
READ = {"hf_clip_padded", "hf_siglip_padded", "open_clip_padded"}


def accelerated(host: build.Host) -> tuple[nn.Module, Report]:
    model = copy.deepcopy(host.model)
    return model, tinyclip.accelerate(model)


@HOSTS
def test_outputs_and_gradients(name):
    host = build.HOSTS[name]()
    model, report = accelerated(host)
    for training in (True, False):
        ours, our_gradients = build.gradients(host, model.train(training))
        theirs, their_gradients = build.gradients(host, host.model.train(training))
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs, strict=True):
            assert build.distance(mine, other) < 1e-13
        build.assert_same(our_gradients, their_gradients)
    swapped = Counter()
    for row in report.replaced:
        swapped[row.name] += row.count
    assert swapped == host.swapped
    assert not report.declined, report


@HOSTS
def test_without_gradients_and_in_inference_mode(name):
    host = build.HOSTS[name]()
    model, report = accelerated(host)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            pairs = zip(host.run(model.eval()), host.run(host.model.eval()), strict=True)
            assert all(build.distance(mine, other) < 1e-13 for mine, other in pairs)
    assert not report.declined, report


@pytest.mark.parametrize("name", ["hf_clip", "open_clip", "timm", "openai"])
def test_it_is_the_ops_that_compute(name, monkeypatch):
    """Each op is called as often as there are modules for it, and one that lies is seen."""
    host = build.HOSTS[name]()
    model, report = accelerated(host)
    calls = Counter()

    def counted(op, original):
        def call(*args, **kwargs):
            calls[op] += 1
            return original(*args, **kwargs)

        return call

    for op in ("attention", "attention_qkv", "gelu_mlp", "layer_norm"):
        monkeypatch.setattr(ops, op, counted(op, getattr(ops, op)))
    host.run(model)
    wanted = Counter()
    for row in report.replaced:
        for start, op in (("attention", "attention"), ("gelu_mlp", "mlp"), ("layer_norm", "norm")):
            wanted[op] += row.count if row.detail.startswith(start) else 0
    got = {
        "attention": calls["attention"] + calls["attention_qkv"],
        "mlp": calls["gelu_mlp"],
        "norm": calls["layer_norm"],
    }
    assert got == {op: wanted[op] for op in got}
    host.run(host.model)
    assert sum(calls.values()) == sum(wanted.values())


@pytest.mark.parametrize("part", ["attention", "mlp", "norm"])
@pytest.mark.parametrize("name", ["hf_clip_padded", "open_clip", "timm"])
def test_each_option_alone(name, part):
    host = build.HOSTS[name]()
    options = dict.fromkeys(("attention", "mlp", "norm"), False) | {part: True}
    model = copy.deepcopy(host.model)
    report = tinyclip.accelerate(model, **options)
    begins = {"attention": "attention", "mlp": "gelu_mlp", "norm": ("layer_norm", "residual")}
    assert report.replaced
    assert all(row.detail.startswith(begins[part]) for row in report.replaced)
    ours, our_gradients = build.gradients(host, model)
    theirs, their_gradients = build.gradients(host, host.model)
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))
    build.assert_same(our_gradients, their_gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@HOSTS
def test_autocast(name, dtype):
    """Every block's dtype is the host's, and the error against fp64 no larger than the host's."""
    host = build.HOSTS[name]()
    truth = [out.detach() for out in host.run(host.model)]
    host.model.float()
    model, report = accelerated(host)
    ours_seen, theirs_seen = build.stream_dtypes(model), build.stream_dtypes(host.model)
    with torch.autocast("cpu", dtype):
        ours, theirs = host.run(model), host.run(host.model)
    assert ours_seen == theirs_seen
    assert not report.declined, report
    eps = torch.finfo(dtype).eps
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        assert build.distance(mine, exact) <= 2 * build.distance(other, exact) + 2 * eps


@pytest.mark.parametrize("name", ["hf_clip_padded", "open_clip", "open_clip_custom", "timm"])
def test_gradients_under_autocast(name):
    host = build.HOSTS[name]()
    _, truth = build.gradients(host, host.model)
    host.model.float()
    model, _ = accelerated(host)
    with torch.autocast("cpu", torch.bfloat16):
        (_, ours), (_, theirs) = (build.gradients(host, m) for m in (model, host.model))
    largest = max(exact.norm().item() for exact in truth.values())
    eps = torch.finfo(torch.bfloat16).eps
    for key, exact in truth.items():
        assert ours[key].dtype == theirs[key].dtype
        error, other = ((g[key].double() - exact).norm().item() for g in (ours, theirs))
        assert error <= 2 * other + 2 * eps * (exact.norm().item() + 1e-2 * largest), key


@pytest.mark.parametrize("name", ["hf_clip", "open_clip", "timm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_in_16_and_32_bit(name, dtype):
    host = build.HOSTS[name]()
    truth = [out.detach() for out in host.run(host.model)]
    host.model.to(dtype)
    model, report = accelerated(host)
    eps = torch.finfo(dtype).eps
    pairs = zip(host.run(model), host.run(host.model), truth, strict=True)
    for mine, other, exact in pairs:
        assert mine.dtype == other.dtype
        assert build.distance(mine, exact) <= 2 * build.distance(other, exact) + 2 * eps
    assert not report.declined, report


@pytest.mark.parametrize("where", build.NORMS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_gives_the_dtype_of_its_twin(where, autocast, dtype):
    module, _, name = where.partition(":")
    theirs = getattr(pytest.importorskip(module), name)(24)
    build.stirred(theirs).float()
    ours = copy.deepcopy(theirs)
    assert tinyclip.accelerate(ours).replaced
    x = torch.randn(5, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, other = ours(x), theirs(x)
        # The residual is fp32 where attention gave 16 bit: what a block's second norm is given.
        y, total = ours(x, residual=x.float())
        expected = theirs(x + x.float())
    assert mine.dtype == other.dtype
    assert build.distance(mine, other) <= 2 * torch.finfo(mine.dtype).eps
    assert (y.dtype, total.dtype) == (expected.dtype, torch.float32)
    assert build.distance(y, expected) <= 2 * torch.finfo(y.dtype).eps


def counting(seen: Counter):
    """A compiler that counts what Dynamo put into the graph, and runs it as aot_eager does."""

    def backend(graph, inputs):
        seen["graphs"] += 1
        for node in graph.graph.nodes:
            seen[getattr(node.target, "__name__", str(node.target))] += 1
            seen["causal"] += bool(node.kwargs.get("is_causal"))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


@HOSTS
def test_compiled_whole(name):
    """One graph, forward and backward; where a mask would have to be read, the host's attention.

    A mask that the text tower holds is known in the graph, too, and becomes is_causal: SDPA's flash
    kernel refuses every mask.
    """
    host = build.HOSTS[name]()
    model, _ = accelerated(host)
    seen = Counter()
    compiled = torch.compile(model, backend=counting(seen), fullgraph=True)
    theirs, their_gradients = build.gradients(host, host.model)
    ours, our_gradients = build.gradients(host, compiled)
    our_gradients = {key.removeprefix("_orig_mod."): g for key, g in our_gradients.items()}
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))
    build.assert_same(our_gradients, their_gradients)
    if name not in READ:
        layers = {"timm": 0, "hf_vit": 0, "hf_siglip": 0, "torch": 1}.get(name, 2)
        assert seen["causal"] == layers, seen
        assert seen["scaled_dot_product_attention"] >= layers


def test_another_batch_is_no_reason_to_compile_again():
    library = pytest.importorskip("timm.models.vision_transformer")
    theirs = build.stirred(library.Block(24, 3))
    ours = copy.deepcopy(theirs)
    tinyclip.accelerate(ours, strict=True)
    seen = Counter()
    compiled = torch.compile(ours, backend=counting(seen), fullgraph=True, dynamic=True)
    graphs = []
    for count in (3, 5, 4):
        x = torch.randn(count, 7, 24).double()
        assert build.distance(compiled(x), theirs(x)) < 1e-13
        graphs.append(seen["graphs"])
    assert graphs[0] == graphs[2] > 0


@pytest.mark.parametrize("name", ["open_clip", "openai"])
def test_in_a_graph_a_16_bit_model_s_mask_is_known_too(name):
    """Where only the weights are cast, the mask stays fp32, and a block casts it at each call."""
    host = build.HOSTS[name]()
    host.model.float()
    for module in host.model.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    model, _ = accelerated(host)
    seen = Counter()
    host.run(torch.compile(model, backend=counting(seen), fullgraph=True))
    assert seen["causal"] == 2


@pytest.mark.parametrize("name", ["hf_clip", "open_clip", "timm"])
def test_gradient_checkpointing(name, monkeypatch):
    """The host's own switch, non-reentrant: the blocks run twice, with the same bits."""
    host = build.HOSTS[name]()
    model, report = accelerated(host)
    plain, expected = build.gradients(host, model.train())
    if name == "hf_clip":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing(True)
    runs = Counter()
    original = ops.gelu_mlp

    def counted(*args, **kwargs):
        runs["mlp"] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "gelu_mlp", counted)
    outputs, gradients = build.gradients(host, model)
    assert runs["mlp"] == (4 if name == "timm" else 8)
    assert all(torch.equal(*pair) for pair in zip(outputs, plain, strict=True))
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)
    assert not report.declined


@pytest.mark.parametrize("name", ["hf_clip", "open_clip_quick", "timm"])
def test_frozen_parameters_and_a_gradient_of_stride_zero(name):
    host = build.HOSTS[name]()
    for index, parameter in enumerate(host.model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    model, _ = accelerated(host)
    results = []
    for one in (model, host.model):
        sum(out.sum() for out in host.run(one)).backward()  # .sum() sends a zero-stride gradient
        results.append({key: p.grad for key, p in one.named_parameters()})
    build.assert_same(*results)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_attention_and_padding_in_torch(batch_first, bias):
    torch.manual_seed(0)
    theirs = build.stirred(nn.MultiheadAttention(24, 3, bias=bias, batch_first=batch_first))
    ours = copy.deepcopy(theirs)
    report = tinyclip.accelerate(ours)
    hidden = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for same_kv in (True, False):
        q, k, v = torch.randn(5, 2, 24), torch.randn(7, 2, 24), torch.randn(7, 2, 24)
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        q, k, v = (x.transpose(0, 1) if batch_first else x for x in inputs)
        v = k if same_kv else v
        found = []
        for attention in (ours, theirs):
            out, weights = attention(q, k, v, key_padding_mask=hidden, need_weights=False)
            assert weights is None
            used = inputs[: 2 if same_kv else 3]
            found.append([out, *torch.autograd.grad(out.square().sum(), used)])
        assert all(build.distance(*pair) < 1e-12 for pair in zip(*found, strict=True))
    assert not report.declined


def test_an_odd_mask_is_the_host_s_business():
    """Causal but for one place, causal the other way, a bias: the host computes, and says so."""
    theirs = build.stirred(nn.MultiheadAttention(24, 3, batch_first=True))
    ours = copy.deepcopy(theirs)
    report = tinyclip.accelerate(ours)
    x = torch.randn(2, 6, 24).double()
    causal = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    leak, bias = causal.clone(), causal.clone()
    leak[2, 3], bias[4, 2] = 0, 0.5
    masks = [leak, bias, causal.T.contiguous(), causal == 0, torch.randn(6, 6).double()]
    for mask in masks:
        mine, other = (m(x, x, x, need_weights=False, attn_mask=mask)[0] for m in (ours, theirs))
        # `causal == 0` is True where it may look, and torch's True hides: its first row sees itself
        # alone hidden, so the rows are compared where they are finite.
        assert torch.equal(mine.isfinite(), other.isfinite())
        assert build.distance(mine.nan_to_num(), other.nan_to_num()) < 1e-13
    assert sum(report.declined.values()) == len(masks)
    ours(x, x, x, need_weights=False, attn_mask=causal)
    assert sum(report.declined.values()) == len(masks)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_timm_s_masks(kind):
    """True is visible there, and hidden in torch: the same bool mask means two things."""
    layers = pytest.importorskip("timm.layers")
    theirs = build.stirred(layers.Attention(24, 3, qkv_bias=True))
    ours = copy.deepcopy(theirs)
    report = tinyclip.accelerate(ours)
    x = torch.randn(2, 6, 24).double()
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    keys = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    keys[1, ..., 4:] = False
    for mask in (visible, keys.expand(2, 1, 6, 6), keys.expand(2, 1, 6, 6) & visible):
        if kind == "float":
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        assert build.distance(ours(x, attn_mask=mask), theirs(x, attn_mask=mask)) < 1e-13
    assert build.distance(ours(x, is_causal=True), theirs(x, is_causal=True)) < 1e-13
    assert not report.declined
    bias = torch.randn(2, 3, 6, 6).double()
    assert torch.equal(ours(x, attn_mask=bias), theirs(x, attn_mask=bias))
    assert sum(report.declined.values()) == 1


@pytest.mark.parametrize("gated", [False, True])
def test_timm_s_other_widths(gated):
    """A head dim of its own, another width out, a norm and a gate after attention."""
    layers = pytest.importorskip("timm.layers")
    options = {"attn_head_dim": 10, "dim_out": 16, "scale_norm": True, "gated": gated}
    theirs = build.stirred(layers.Attention(24, 3, norm_layer=nn.LayerNorm, **options))
    ours = copy.deepcopy(theirs)
    assert "Attention" in {row.name for row in tinyclip.accelerate(ours).replaced}
    x = torch.randn(2, 6, 24).double()
    assert build.distance(ours(x), theirs(x)) < 1e-13


def test_layer_scale_and_stochastic_depth_in_timm():
    host = build.timm_vit(init_values=0.3, drop_path_rate=0.5)
    model, report = accelerated(host)
    results = []
    for one in (model, host.model):
        torch.manual_seed(7)
        results.append(build.gradients(host, one.train()))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert build.distance(ours[0], theirs[0]) < 1e-13
    build.assert_same(our_gradients, their_gradients)
    assert "Block" in {row.name for row in report.replaced}


def test_layer_scale_and_cross_attention_in_open_clip():
    library = pytest.importorskip("open_clip.transformer")
    theirs = library.ResidualAttentionBlock(24, 3, ls_init_value=0.3, is_cross_attention=True)
    build.stirred(theirs)
    ours = copy.deepcopy(theirs)
    assert not tinyclip.accelerate(ours).skipped
    q, k = torch.randn(2, 5, 24).double(), torch.randn(2, 7, 24).double()
    for arguments in ((q,), (q, k, k)):
        assert build.distance(ours(*arguments), theirs(*arguments)) < 1e-13


def test_a_loss_on_top_trains_alike():
    """Five AdamW steps of open_clip's model, one accelerated: the same weights in fp64."""
    host = build.open_clip_clip()
    model, _ = accelerated(host)
    for one in (model, host.model):
        optimizer = torch.optim.AdamW(one.parameters(), 1e-3)
        for _ in range(5):
            image, text, scale = host.run(one.train())
            loss = F.cross_entropy(scale * image @ text.T, torch.arange(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, mine), other in zip(model.named_parameters(), host.model.parameters(), strict=True):
        if not name.endswith("in_proj_bias"):  # of whose keys' part the gradient is rounding
            assert build.distance(mine, other) < 1e-9, name
