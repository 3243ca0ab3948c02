"""Paired times beside open_clip, in one process: the median ratio of 21 pairs, in turns."""

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch

import tinyclip
from tinyclip import distill, nn

pytestmark = pytest.mark.soak
open_clip = pytest.importorskip("open_clip")

PAIRS = 21


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """ours / theirs, each pair run one right after the other, the first of a pair changing."""
    for call in (ours, theirs, ours, theirs):
        call()
    ratios = []
    for index in range(PAIRS):
        if index % 2:
            mine, other = seconds(ours), seconds(theirs)
        else:
            other, mine = seconds(theirs), seconds(ours)
        ratios.append(mine / other)
    return statistics.median(ratios)


@pytest.mark.parametrize("quick", [False, True], ids=["erf", "quick"])
def test_block_forward_and_backward(record_property, capsys, quick):
    twin = open_clip.transformer
    torch.manual_seed(0)
    act = twin.QuickGELU if quick else torch.nn.GELU
    theirs = twin.ResidualAttentionBlock(768, 12, act_layer=act)
    ours = nn.ResidualAttentionBlock(768, 12, activation="quick_gelu" if quick else "gelu")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 50, 768, requires_grad=True)
    gradient = torch.randn(8, 50, 768)

    def step(block):
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(gradient)

    ratio = median_ratio(lambda: step(ours), lambda: step(theirs))
    with capsys.disabled():
        print(f"\nblock, forward + backward, ours / open_clip's: {ratio:.3f}")
    assert ratio <= 1.03


def test_text_tower_at_twelve_tokens(capsys):
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32").eval()
    ours = tinyclip.create_model("ViT-B-32").eval()
    ours.load_state_dict(theirs.state_dict())
    captions = [f"a photo of {number} small birds in a tree" for number in range(16)]
    text = tinyclip.get_tokenizer()(captions)
    cut = text[:, : int((text != 0).sum(dim=1).max())]
    assert 10 <= cut.shape[1] <= 13
    with torch.inference_mode():
        expected = theirs.encode_text(text)
        assert (ours.encode_text(cut) - expected).norm() < 1e-5 * expected.norm()
        ratio = median_ratio(lambda: ours.encode_text(cut), lambda: theirs.encode_text(text))
    with capsys.disabled():
        print(f"\ntext tower, {cut.shape[1]} tokens, ours / open_clip's at 77: 1 / {1 / ratio:.2f}")
    assert ratio <= 1 / 5


def test_a_masked_step(capsys):
    """Forward and backward of ViT-B-32's shapes, two layers a tower, under learned masks."""
    layers = {"layers": 2}
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 768, **layers},
        "text_cfg": {"vocab_size": 1000, "width": 512, "heads": 8, **layers},
    }
    torch.manual_seed(0)
    plain = tinyclip.create_model(config)
    masks = distill.Masks(plain.config)
    masked = distill.Masked(copy.deepcopy(plain), masks, distill.Ramp(0.0, 0.5, 10))
    objective = masked.constrained(lambda image, text: {"loss": image.sum() + text.sum()})
    image, text = torch.randn(8, 3, 224, 224), torch.randint(1, 999, (8, 16))

    def step():
        features = plain(image, text)
        (features[0].sum() + features[1].sum()).backward()

    def masked_step():
        masked.begin(3)
        objective(*masked(image, text)[:2])["loss"].backward()

    ratio = median_ratio(masked_step, step)
    with capsys.disabled():
        print(f"\na masked step / a plain one: {ratio:.2f}")
    assert ratio <= 1.5
