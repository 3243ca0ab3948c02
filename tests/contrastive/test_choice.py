"""Each GPU engine serves the calls that asked for it, and no other: both stubbed, and counted.

In one process, as a benchmark runs them: an engine after the other on the same tensors, backward
outside the block that chose, also where a stream is being captured into a CUDA graph.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.contrastive.test_panels import Plain
from tinyclip import ops
from tinyclip.ops import _contracts, _panels_cuda, _triton, contrastive

_panels_triton = pytest.importorskip("tinyclip.ops._panels_triton")
ENGINES = {"cuda": _panels_cuda.Kernels, "triton": _panels_triton.Kernels}


@pytest.fixture(params=[False, True], ids=["eager", "captured"])
def calls(request, monkeypatch):
    """Count passes over a panel by engine: kernels of `Plain`, CPU tensors that pass for CUDA's."""
    counted = Counter()
    make_spec = contrastive.make_spec
    monkeypatch.setattr(
        contrastive,
        "make_spec",
        lambda *args: make_spec(*args)._replace(device="cuda", capability=(9, 0)),
    )
    monkeypatch.setattr(contrastive, "_cuda_missing", lambda: None)
    monkeypatch.setattr(_triton, "_INTERPRETED", False)
    monkeypatch.setattr(_contracts, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: request.param)
    for name, kernels in ENGINES.items():
        monkeypatch.setattr(kernels, "tile", Plain.tile)
        for kind in ("stats", "grads"):

            def stub(*args, kind=kind, name=name):
                counted[name, kind] += 1
                getattr(Plain, kind)(*args)

            monkeypatch.setattr(kernels, kind, staticmethod(stub))
    return counted


def leaves():
    torch.manual_seed(3)
    image, text = (F.normalize(torch.randn(70, 16), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(20.0, requires_grad=True)


def forward(backend, inputs):
    with tinyclip.backend(backend):
        return ops.contrastive_loss(*inputs)


@pytest.mark.parametrize("order", [("cuda", "triton"), ("triton", "cuda")])
def test_one_engine_after_the_other(order, calls):
    inputs = leaves()
    for round_ in range(1, 4):  # the third time everything is cached that will be
        for backend in order:
            before = Counter(calls)
            torch.autograd.grad(forward(backend, inputs), inputs)
            assert calls - before == {(backend, "stats"): 1, (backend, "grads"): 1}, round_


def test_backward_belongs_to_its_forward(calls):
    inputs = leaves()
    losses = {backend: forward(backend, inputs) for backend in ENGINES}
    calls.clear()
    for backend in reversed(ENGINES):
        with tinyclip.backend("reference"):
            torch.autograd.grad(losses[backend], inputs)
        assert calls.pop((backend, "grads")) == 1
        assert not calls


def test_auto_and_the_public_passes(calls):
    image, text, scale = leaves()
    ops.contrastive_loss(image, text, scale)
    assert calls == {("cuda", "stats"): 1}
    for backend in ("triton", "cuda"):
        calls.clear()
        with tinyclip.backend(backend):
            stats = ops.contrastive_stats(image, text, scale)
            ops.contrastive_grads(image, text, scale, stats, row_weight=1.0, col_weight=1.0)
        assert calls == {(backend, "stats"): 1, (backend, "grads"): 1}
