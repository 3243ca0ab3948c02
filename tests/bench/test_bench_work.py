"""FLOPs and bytes: by hand, by PyTorch's own counter, and the roofs they give."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import notes, registry, work
from bench.peers import attention, block, contrastive, mlp
from bench.registry import BOTH, FORWARD
from bench.report import ROOT
from bench.roofline import H200, Machine, percent, roof_ms
from bench.work import Work

BF16, FP32 = torch.bfloat16, torch.float32


def test_attention_by_hand():
    tower = {"B": 1024, "L": 50, "H": 12, "D": 64}
    forward, backward = work.attention(tower, BF16)
    unit = 1024 * 50 * 12 * 64 * 2
    assert forward.flops == 4 * 1024 * 12 * 50 * 50 * 64
    assert backward.flops == 10 * 1024 * 12 * 50 * 50 * 64
    assert forward.bytes == 4 * unit + 1024 * 12 * 50 * 4
    assert backward.bytes == 8 * unit + 1024 * 12 * 50 * 4


def test_causal_attention_counts_only_visible_pairs():
    tower = {"B": 3, "L": 77, "H": 8, "D": 64, "causal": True}
    assert work.attention(tower, BF16).forward.flops == 4 * 3 * 8 * (77 * 78 // 2) * 64


def test_mlp_layer_norm_and_loss_by_hand():
    forward, backward = work.gelu_mlp({"M": 10, "C": 4, "F": 16}, BF16)
    assert forward == Work(2 * 2 * 10 * 4 * 16, 2 * (2 * 10 * 4 + 2 * 4 * 16 + 16 + 4))
    assert backward.flops == 2 * forward.flops
    forward, backward = work.layer_norm({"M": 10, "C": 4, "residual": True}, BF16)
    assert forward == Work(0, 4 * 10 * 4 * 2 + 10 * 2 * 4 + 2 * 4 * 2)
    assert backward == Work(0, 4 * 10 * 4 * 2 + 10 * 2 * 4 + 4 * 4 * 2)
    square = 32_768**2 * 512
    clip = work.contrastive_loss({"B": 32_768, "D": 512}, BF16)
    distil = work.contrastive_loss({"B": 32_768, "D": 512, "Dt": 512}, BF16)
    assert clip.of(BOTH).flops == 4 * 2 * square
    assert distil.of(BOTH).flops == 6 * 2 * square


# From the derivation of the targets: batch 1024 at 790 TFLOP/s and 4.3 TB/s.
@pytest.mark.parametrize(
    ("identity", "forward_us", "backward_us"),
    [
        ("attention/50x12h b1024", 74, 147),
        ("attention/77 causal x8h b1024", 76, 151),
        ("attention/197x12h b1024", 290, 579),
        ("attention/257x16h b1024", 505, 1007),
        ("attention/577x16h b1024", 1768, 4419),
    ],
)
def test_attention_roofs(identity, forward_us, backward_us):
    forward, backward = registry.find(identity, "cuda").passes()
    assert 1e3 * roof_ms(forward, H200) == pytest.approx(forward_us, rel=0.01)
    assert 1e3 * roof_ms(backward, H200) == pytest.approx(backward_us, rel=0.01)


@pytest.mark.parametrize(
    ("identity", "milliseconds"),
    [
        ("gelu_mlp/201728x768 gelu", 7.23),
        ("gelu_mlp/263168x1024 gelu", 16.8),
        ("contrastive_loss/32768", 5.57),
        ("contrastive_loss/32768 teacher", 8.35),
        ("contrastive_loss/65536", 22.3),
    ],
)
def test_product_bound_roofs(identity, milliseconds):
    roof = roof_ms(registry.find(identity, "cuda").passes().of(BOTH), H200)
    assert roof == pytest.approx(milliseconds, rel=0.01)


def test_percent_of_roof():
    machine = Machine(copy_tb_s=1.0, gemm_tflops=1.0)
    assert roof_ms(Work(10**9, 10**6), machine) == pytest.approx(1.0)
    assert roof_ms(Work(10**6, 10**9), machine) == pytest.approx(1.0)
    assert percent(Work(10**9, 10**6), machine, 4.0) == pytest.approx(25.0)


def _counted(maths, case) -> tuple[int, int]:
    """What PyTorch counts for the plain maths, forward and both ways, at the reduced size."""
    sizes = {**case.sizes, **case.reduced}
    tensors = case.draw("cpu", reduced=True)
    with FlopCounterMode(display=False) as counter:
        loss = maths(tensors, sizes)
        forward = counter.get_total_flops()
        if case.modes != (FORWARD,):
            loss.sum().backward()
    return forward, counter.get_total_flops()


# (case, its maths, products that our work recomputes and the plain maths keeps in memory)
@pytest.mark.parametrize(
    ("identity", "maths", "recomputed"),
    [
        ("attention/50x12h b16", attention.eager, lambda p: p.backward.flops // 5),
        ("gelu_mlp/400x512 gelu", mlp.eager, lambda p: 0),
        ("contrastive_loss/1024", contrastive.eager_fp32, lambda p: p.backward.flops // 3),
        ("block/50x12h b4", block.plain_maths, None),
    ],
)
def test_pytorch_counts_the_same(identity, maths, recomputed):
    case = registry.find(identity, "cpu")
    passes = case.work({**case.sizes, **case.reduced}, case.dtype)
    if case.op == "block":  # its attention runs fused on this device: count it unfused
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            forward, both = _counted(maths, case)
        sizes = {**case.sizes, **case.reduced}
        again = work.attention(sizes, case.dtype).backward.flops // 5
    else:
        forward, both = _counted(maths, case)
        again = recomputed(passes)
    assert forward == passes.forward.flops
    assert both == passes.of(BOTH).flops - again


def test_a_teacher_adds_one_product_to_each_pass():
    case = registry.find("contrastive_loss/1024 teacher", "cpu")
    passes = case.work({**case.sizes, **case.reduced}, case.dtype)
    forward, both = _counted(contrastive.eager_fp32, case)
    product = passes.forward.flops // 2
    assert forward == 2 * product
    # the plain maths keeps both matrices: of our four backward products it spends two
    assert (both, passes.backward.flops) == (4 * product, 4 * product)


def test_notes_hold_the_present_predictions():
    written = (ROOT / "bench" / "notes.md").read_text()
    for line in notes.predictions().splitlines():
        assert line in written, f"bench/notes.md is stale: python -m bench predict gives {line}"
