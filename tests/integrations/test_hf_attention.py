"""attn_implementation="tinyclip": transformers' own registry, padding included."""

import copy
import logging

import pytest
import torch

import tinyclip
from tests.integrations import build

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tinyclip.integrations.hf")

HOSTS = pytest.mark.parametrize(
    "name", ["hf_clip", "hf_clip_padded", "hf_siglip", "hf_siglip_padded", "hf_vit"]
)


def under_our_name(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    model.set_attn_implementation("tinyclip")
    return model


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of ops.attention."""
    from tinyclip import ops

    found = []
    original = ops.attention

    def noted(*args, **kwargs):
        found.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", noted)
    return found


@HOSTS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_outputs_and_gradients(name, compiled):
    host = build.HOSTS[name]()
    model = under_our_name(host.model)
    theirs, their_gradients = build.gradients(host, host.model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    ours, our_gradients = build.gradients(host, run)
    our_gradients = {key.removeprefix("_orig_mod."): g for key, g in our_gradients.items()}
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))
    build.assert_same(our_gradients, their_gradients)


@HOSTS
def test_the_op_is_told_what_the_mask_says(name, calls):
    host = build.HOSTS[name]()
    host.run(under_our_name(host.model))
    assert len(calls) == 4 if name != "hf_vit" else 2
    text = [call for call in calls if call["key_mask"] is not None]
    assert len(text) == (2 if name.endswith("padded") else 0)
    for call in text:
        assert torch.equal(call["key_mask"], build.padding().bool())
    causal = [call for call in calls if call["causal"]]
    assert len(causal) == (2 if name.startswith("hf_clip") else 0)


def test_padding_matters_here_at_all():
    """Without a mask of the same name transformers drops the padding: the outputs would differ."""
    padded, plain = build.hf_clip(padded=True), build.hf_clip()
    text = [host.run(host.model)[4] for host in (padded, plain)]
    assert text[0].shape == text[1].shape
    assert build.distance(*text) > 1e-3


def test_a_mask_of_ones_is_no_mask(calls):
    host = build.hf_clip()
    ones = torch.ones(3, 12, dtype=torch.long)
    under_our_name(host.model).text_model(input_ids=build.ids(), attention_mask=ones)
    assert [call["key_mask"] for call in calls] == [None, None]
    assert all(call["causal"] for call in calls)


def test_what_the_op_cannot_goes_to_sdpa_and_is_said(calls, caplog, monkeypatch):
    monkeypatch.setattr(hf, "_said", set())
    host = build.hf_clip(padded=True, attention_dropout=0.5)
    model = under_our_name(host.model)
    results = []
    for one in (model, host.model):
        torch.manual_seed(3)
        results.append(host.run(one.train()))
    assert not calls
    assert all(build.distance(*pair) < 1e-13 for pair in zip(*results, strict=True))
    records = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [text for text in records if "CLIPAttention: dropout 0.5, sdpa computes it" in text]
    assert len([text for text in records if "dropout" in text]) == 1
    results = [host.run(one.eval()) for one in (model, host.model)]
    assert len(calls) == 4
    assert all(build.distance(*pair) < 1e-13 for pair in zip(*results, strict=True))


def test_a_mask_of_four_dimensions_that_a_user_made(calls):
    host = build.hf_clip()
    model = under_our_name(host.model)
    for build_mask in (torch.rand(3, 1, 12, 12) > 0.3, torch.ones(3, 1, 12, 12).tril().bool()):
        mask = build_mask | torch.eye(12, dtype=torch.bool)
        outputs = [
            one.text_model(input_ids=build.ids(), attention_mask=mask).last_hidden_state
            for one in (model, host.model)
        ]
        assert build.distance(*outputs) < 1e-13
    assert not calls


def test_fewer_heads_of_keys_and_a_cache_go_to_sdpa():
    """A small decoder with grouped heads and a cache, to which none of this was written."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    theirs = build.stirred(transformers.LlamaForCausalLM(config)).eval()
    full = transformers.LlamaConfig(**{**config.to_dict(), "num_key_value_heads": 4})
    prompt = torch.randint(1, 49, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    for model in (theirs, build.stirred(transformers.LlamaForCausalLM(full)).eval()):
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        ours = under_our_name(model)
        assert torch.equal(ours.generate(prompt, **arguments), model.generate(prompt, **arguments))
        pair = (one(prompt, attention_mask=mask).logits for one in (ours, model))
        assert build.distance(*pair) < 1e-12


def test_the_name_stays_out_of_what_is_saved(tmp_path):
    host = build.hf_clip()
    under_our_name(host.model).save_pretrained(tmp_path)
    assert "tinyclip" not in (tmp_path / "config.json").read_text()
    back = transformers.CLIPModel.from_pretrained(tmp_path, attn_implementation="tinyclip")
    assert back.config.text_config._attn_implementation == "tinyclip"
    pairs = zip(host.run(back.double().eval()), host.run(host.model.eval()), strict=True)
    assert all(build.distance(*pair) < 1e-13 for pair in pairs)


def test_accelerate_leaves_to_it_what_it_has(calls):
    host = build.hf_clip(padded=True)
    model = under_our_name(host.model)
    report = tinyclip.accelerate(model)
    (row,) = report.skipped
    assert (row.name, row.count) == ("CLIPAttention", 4)
    assert "computes it already" in row.reason
    assert {row.name for row in report.replaced} == {"CLIPMLP", "CLIPEncoderLayer", "LayerNorm"}
    pairs = zip(host.run(model), host.run(host.model), strict=True)
    assert all(build.distance(*pair) < 1e-13 for pair in pairs)
    assert len(calls) == 4
