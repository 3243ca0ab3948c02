"""What the `torch` backend gives PyTorch's SDPA to read on CUDA: simulated, on CPU tensors.

SDPA's CUDA kernels load 16 bytes at a time without checking addresses. Here only the question for
the device is answered differently, and a spy looks at what would be read.
"""

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support.draw import LAYOUTS, UPSTREAM, Draw, relayout
from tinyclip import ops
from tinyclip.ops import _torch


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(_torch, "_on_cuda", lambda x: True)


@pytest.fixture
def read(monkeypatch):
    """What SDPA is given, (B, L, H, D): "forward" q, k, v of each call, "backward" its gradient."""
    seen = {"forward": [], "backward": []}
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        out = sdpa(q, k, v, **options)
        seen["forward"].append([x.transpose(1, 2) for x in (q, k, v)])
        if out.requires_grad:
            out.register_hook(lambda g: seen["backward"].append(g.transpose(1, 2)))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def readable(x: torch.Tensor) -> bool:
    """Rows of adjacent elements that start at multiples of 16 bytes; contiguous if D forbids."""
    if x.shape[-1] * x.element_size() % 16:
        return x.data_ptr() % 16 == 0 and x.is_contiguous()
    apart = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    rows_aligned = all(s * x.element_size() % 16 == 0 for s in apart)
    return x.data_ptr() % 16 == 0 and rows_aligned and x.stride(-1) == 1


def run(packed, inputs, dout, **options):
    """Output and gradients of the `torch` backend."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with tinyclip.backend("torch"):
        out = (ops.attention_qkv if packed else ops.attention)(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize(
    ("dtype", "d"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 21)], ids=str
)
def test_every_layout_is_read_aligned(packed, dtype, d, cuda, read, monkeypatch):
    """Inputs and upstream gradients of every layout; the results are those of the CPU."""
    draw = Draw(d)
    shape = (2, 6, 3, 3, d) if packed else (2, 6, 3, d)
    for i, layout in enumerate(LAYOUTS):
        count = 1 if packed else 3
        inputs = [draw.tensor(draw.normal(*shape), dtype, layout) for _ in range(count)]
        mask = draw.mask(2, 6) if i % 2 else None
        options = {"key_mask": mask, "head_gate": torch.rand(3) if i % 3 == 2 else None}
        like = torch.empty(2, 6, 3, d, dtype=dtype)
        douts = [draw.upstream(like, kind) for kind in UPSTREAM]
        douts += [relayout(draw.normal(*like.shape).to(dtype), kind) for kind in LAYOUTS]
        douts.append(draw.normal(1, 1, 3, d).to(dtype).expand(like.shape))
        for dout in douts:
            found = run(packed, inputs, dout, **options)
            gradient = read["backward"][-1]
            for x in (*read["forward"][-1], gradient):
                assert readable(x), (layout, x.stride(), x.storage_offset())
            assert 0 not in gradient.stride()
            with monkeypatch.context() as patch:
                patch.setattr(_torch, "_on_cuda", lambda x: False)
                expected = run(packed, inputs, dout, **options)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y)


def test_an_aligned_view_is_not_copied(cuda, read):
    wide = torch.randn(2, 6, 3, 24)
    slices = [wide[..., 4 * i : 4 * i + 8].detach() for i in range(3)]
    dout = torch.randn(2, 6, 3, 12)[..., 4:]
    run(False, slices, dout)
    assert [x.data_ptr() for x in read["forward"][0]] == [x.data_ptr() for x in slices]
    assert read["backward"][0].data_ptr() == dout.data_ptr()
    odd = torch.randn(2, 6, 3, 7)  # no copy helps, and none is made
    run(False, [odd] * 3, odd)
    assert all(x.data_ptr() == odd.data_ptr() for x in read["forward"][1])
    qkv = torch.randn(2, 6, 3, 3, 8)
    run(True, [qkv], torch.randn(2, 6, 3, 8))
    assert [x.data_ptr() for x in read["forward"][2]] == [x.data_ptr() for x in qkv.unbind(2)]


@pytest.mark.parametrize("view", ["address", "stride"])
def test_a_misaligned_slice_is_copied(view, cuda, read):
    wide = torch.randn(2, 6, 3, 24)
    x = wide[..., 1:9] if view == "address" else torch.randn(2, 6, 3, 9)[..., :8]
    dout = x.clone()
    run(False, [x, wide[..., :8], x], dout)
    q, k, v = read["forward"][0]
    assert (q.data_ptr() != x.data_ptr(), v.data_ptr() != x.data_ptr()) == (True, True)
    assert (k.data_ptr(), read["backward"][0].data_ptr()) == (wide.data_ptr(), dout.data_ptr())
    assert all(torch.equal(copy, x) for copy in (q, v))


def test_nothing_is_copied_on_a_cpu(read):
    x = torch.randn(2, 6, 3, 24)[..., 1:9].detach()
    dout = torch.ones(()).expand(2, 6, 3, 8)
    run(False, [x] * 3, dout)
    assert all(seen.data_ptr() == x.data_ptr() for seen in read["forward"][0])
    assert read["backward"][0].data_ptr() == dout.data_ptr()


@pytest.mark.parametrize("create_with", ["constant", "of_the_output"])
def test_double_backward_raises(create_with, cuda):
    q, k, v = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(3))
    with tinyclip.backend("torch"):
        out = ops.attention(q, k, v)
    value = out.sum() if create_with == "constant" else out.square().sum()
    for grad in torch.autograd.grad(value, (q, k, v), create_graph=True):
        for leaf in (q, k, v):
            with pytest.raises(RuntimeError, match="double backward"):
                grad.sum().backward(inputs=[leaf], retain_graph=True)


@pytest.mark.parametrize("offset", [0, 1])
def test_compile_fullgraph_dynamic(offset, cuda):
    """One graph for all lengths, which copies an input that is misaligned, and no other."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return nop(graph, inputs)

    def function(qkv):
        with tinyclip.backend("torch"):
            return ops.attention(*qkv.unbind(2), causal=True)

    compiled = torch.compile(
        function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep)
    )
    for length in (5, 9, 12):
        flat = torch.randn(2 * length * 3 * 3 * 8 + offset)
        qkv = flat[offset:].view(2, length, 3, 3, 8)
        eager, traced = qkv.clone().requires_grad_(), qkv.detach().requires_grad_()
        function(eager).square().sum().backward()
        compiled(traced).square().sum().backward()
        torch.testing.assert_close(traced.grad, eager.grad)
    assert len(graphs) == 2, "forward and backward, once"
    copies = [node for node in graphs[0].graph.nodes if node.target is torch.ops.aten.clone.default]
    assert len(copies) == (3 if offset % 4 else 0)
