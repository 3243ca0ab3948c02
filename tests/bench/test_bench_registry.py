"""The registry names every op, and every peer computes what the op computes."""

import dataclasses
import inspect

import pytest
import torch

import tinyclip
from bench import gate, registry
from bench.peers import CannotRun

CPU, GPU = registry.cases("cpu"), registry.cases("cuda")


def public_ops() -> set[str]:
    names = getattr(tinyclip.ops, "__all__", dir(tinyclip.ops))
    found = {name: getattr(tinyclip.ops, name) for name in names if not name.startswith("_")}
    not_ops = {"backend", "explain"}
    return {n for n, op in found.items() if inspect.isfunction(op) and n not in not_ops}


@pytest.mark.parametrize("found", [CPU, GPU], ids=["cpu", "cuda"])
def test_every_op_has_cases(found):
    named = {case.op for case in found}
    assert public_ops() <= named
    steps = {"train_step", "distill_step", "encode_image"}
    assert named - public_ops() == {"block"} | (steps if found is GPU else set())


def test_names_are_unique_and_found():
    for device, extra in (("cpu", []), ("cuda", registry.baselines())):
        cases = registry.cases(device) + extra
        assert len({case.id for case in cases}) == len(cases)
        assert all(registry.find(case.id, device).id == case.id for case in cases)
    with pytest.raises(KeyError, match="--list"):
        registry.find("attention/none", "cpu")


def test_gpu_sizes_are_clips():
    attention = {(c.sizes["L"], c.sizes["H"], c.sizes["B"]) for c in GPU if c.op == "attention_qkv"}
    towers = [(50, 12), (77, 8), (197, 12), (257, 16), (577, 16)]
    assert attention == {(*tower, batch) for tower in towers for batch in (64, 256, 1024)}
    losses = {c.sizes["B"] for c in GPU if c.op == "contrastive_loss"}
    assert losses == {1024, 8192, 32_768, 65_536}
    assert {c.dtype for c in GPU} == {torch.bfloat16}


def smaller(case):
    return {**case.sizes, **case.reduced}


@pytest.mark.parametrize("case", CPU, ids=lambda case: case.id)
def test_every_peer_computes_the_case(case):
    """In fp32, outputs and gradients, to 1e-5 of the fp64 oracle's norm."""
    tensors, sizes = case.draw("cpu", seed=3, reduced=True), smaller(case)
    oracle = gate._evaluate(
        case, lambda t, s: gate._oracle(case, t, s), gate._double(tensors), sizes
    )
    for name, peer in case.peers.items():
        if peer.slow_start:  # the same maths, compiled
            continue
        try:
            timed = peer.build(tensors, sizes, "cpu")
        except CannotRun as reason:
            assert str(reason) in ("this backend exists on CUDA only", "open_clip is not installed")
            continue
        with timed.context():
            found = gate._evaluate(case, lambda t, s, timed=timed: timed.call(), tensors, sizes)
        assert found.keys() == oracle.keys()
        for tensor, reference in oracle.items():
            error = (found[tensor].double() - reference).norm() / reference.norm()
            assert error < 1e-5, f"{case.id} beside {name}: {tensor} is off by {error:.1e}"


@pytest.mark.parametrize(
    "identity", ["attention/50x12h b16", "gelu_mlp/400x512 gelu", "contrastive_loss/1024 teacher"]
)
def test_bf16_inputs_pass_the_gate(identity):
    """The rule holds in the dtype of the GPU cases too."""
    case = dataclasses.replace(registry.find(identity, "cpu"), dtype=torch.bfloat16)
    verdict = gate.check(case, "cpu", lambda t, s: case.call(tinyclip.ops, t, s))
    assert verdict.colour == "green", verdict.detail


def test_draws_differ_by_seed_and_never_are_zero(norm_case):
    first, again, other = (norm_case.draw("cpu", seed=seed)["x"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() > 0.9
