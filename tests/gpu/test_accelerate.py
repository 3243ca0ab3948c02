"""Models of other libraries on the device: Triton computes, in the host's dtypes, no worse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tinyclip
from tests.integrations import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available"),
]
NAMES = ["hf_clip", "hf_clip_padded", "open_clip", "open_clip_custom", "timm"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(name, dtype):
    host = build.HOSTS[name]()
    truth = [out.detach() for out in host.run(host.model)]
    host.model.float().cuda()
    model = copy.deepcopy(host.model)
    report = tinyclip.accelerate(model)
    assert {row.backend for row in report.replaced} <= {"triton", ""}
    seen = [build.stream_dtypes(one) for one in (model, host.model)]
    with torch.autocast("cuda", dtype):
        ours, theirs = host.run(model), host.run(host.model)
    assert seen[0] == seen[1]
    assert not report.declined, report
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        error, other_error = (build.distance(x.cpu(), exact) for x in (mine, other))
        assert error <= 2 * other_error + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("where", build.NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_norm_gives_the_dtype_of_its_twin(where, dtype, autocast):
    """Here autocast lifts torch's LayerNorm to fp32, which on a CPU it does not."""
    module, _, name = where.partition(":")
    theirs = build.stirred(getattr(pytest.importorskip(module), name)(24)).float().cuda()
    ours = copy.deepcopy(theirs)
    tinyclip.accelerate(ours, strict=True)
    x = torch.randn(5, 24, device="cuda").to(dtype)
    # Outside autocast F.layer_norm refuses a 16-bit x beside fp32 parameters: x is given in fp32.
    refused = not autocast and dtype != torch.float32 and not name.endswith("Fp32")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        mine = ours(x)
        other = theirs(x.float()).to(dtype) if refused else theirs(x)
        y, total = ours(x, residual=x.float())
        expected = theirs(x + x.float())
    assert mine.dtype == other.dtype
    assert (y.dtype, total.dtype) == (expected.dtype, torch.float32)
    parameters = (theirs.weight.double(), theirs.bias.double(), theirs.eps)
    for found, peer, added in ((mine, other, x.double()), (y, expected, 2 * x.double())):
        truth = F.layer_norm(added, (24,), *parameters)
        eps = torch.finfo(found.dtype).eps
        assert build.distance(found, peer) <= 2 * eps
        assert build.distance(found, truth) <= 2 * build.distance(peer, truth) + 2 * eps


def test_a_mask_is_read_once():
    """After the first call of a text tower nothing waits for the device."""
    host = build.open_clip_clip()
    host.model.float().cuda()
    tinyclip.accelerate(host.model, strict=True)
    block = host.model.transformer.resblocks[0]
    x = torch.randn(3, 12, 64, device="cuda")
    mask = host.model.attn_mask
    block(x, attn_mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x, attn_mask=mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor():
    host = build.open_clip_clip()
    host.model.float().cuda()
    expected = host.run(host.model)
    model: nn.Module = copy.deepcopy(host.model)
    tinyclip.accelerate(model)
    outputs = host.run(torch.compile(model, fullgraph=True))
    assert all(build.distance(*pair) < 1e-4 for pair in zip(outputs, expected, strict=True))
