"""Paired times of a host's block with and without, in one process: no slower on a CPU."""

import copy

import pytest
import torch

import tinyclip
from tests.models.test_speed import median_ratio

pytestmark = pytest.mark.soak


def hf_block(activation):
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    config = pytest.importorskip("transformers").CLIPVisionConfig(hidden_act=activation)
    config._attn_implementation = "sdpa"
    block = clip.CLIPEncoderLayer(config)
    return block, lambda one, x: one(x, None)


def open_clip_block(activation):
    library = pytest.importorskip("open_clip.transformer")
    act = library.QuickGELU if activation == "quick_gelu" else torch.nn.GELU
    block = library.ResidualAttentionBlock(768, 12, act_layer=act)
    return block, lambda one, x: one(x)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("make", [hf_block, open_clip_block])
def test_a_block_s_forward_and_backward(make, activation, capsys):
    torch.manual_seed(0)
    theirs, call = make(activation)
    ours = copy.deepcopy(theirs)
    tinyclip.accelerate(ours, strict=True)
    x, gradient = torch.randn(8, 50, 768, requires_grad=True), torch.randn(8, 50, 768)

    def step(block):
        block.zero_grad(set_to_none=True)
        x.grad = None
        call(block, x).backward(gradient)

    ratio = median_ratio(lambda: step(ours), lambda: step(theirs))
    with capsys.disabled():
        print(f"\n{type(theirs).__name__}, {activation}, with / without: {ratio:.3f}")
    assert ratio <= 1.05
