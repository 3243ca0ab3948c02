"""The tests' yardstick: a peer that cannot be compared with is named, and fails nobody else."""

import dataclasses

import pytest
import torch

import tinyclip
from bench import gate, registry
from bench.peers import CannotRun, Peer
from tests.support import attention, problem
from tests.support.rule import Tally, assert_rule


def fails(*_, **__):
    raise RuntimeError("cutlassF: no kernel found to launch!\nTraceback")


def test_a_peer_that_raises_is_left_out_and_named(capsys):
    made = attention.make(3, regimes=["normal"], dtypes=[torch.bfloat16])
    expected = made.judge("torch")
    assert expected.notes == ()
    made.fused = fails
    found = made.judge("torch")
    note = f"without the peer {__name__}.fails, which raised RuntimeError: cutlassF: no kernel"
    assert found.keys() == expected.keys()
    assert note in found.notes[0] and "Traceback" not in found.notes[0]
    assert note in capsys.readouterr().out
    assert_rule(found)  # the eager maths is a peer still
    tally = Tally()
    for _ in range(200):
        tally.add(made.label, found)
    tally.verdict()
    wrong = type(found)(dict.fromkeys(found, 9.0), found.notes)
    with pytest.raises(AssertionError, match=r"without the peer .*fails"):
        assert_rule(wrong)
    tally.add(made.label, wrong)
    with pytest.raises(AssertionError, match=r"without the peer .*fails"):
        tally.verdict()


def test_an_op_of_ours_that_raises_fails(monkeypatch):
    made = attention.make(3)
    made.op = fails
    with pytest.raises(RuntimeError, match="no kernel found"):
        made.judge("torch")


@pytest.mark.parametrize("layout", ["offset", "sliced", "transposed", "expanded"])
def test_on_a_gpu_peers_read_copies_and_ours_the_views(layout, monkeypatch):
    """As if CPU tensors were on a GPU."""
    made = attention.make(
        5, layouts=[layout], regimes=["normal"], dims=[64], upstream=["zero_stride"]
    )
    seen = {"ours": [], "peer": []}
    op, fused = made.op, made.fused

    def spy(name, function):
        def call(q, k, v, **options):
            out = function(q, k, v, **options)
            seen[name].append((q, k, v))
            if out.requires_grad:
                out.register_hook(lambda g: seen[name].append((g,)))
            return out

        return call

    made.op, made.fused = spy("ours", op), spy("peer", fused)
    monkeypatch.setattr(problem, "on_gpu", lambda tensor: tensor is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert_rule(made.judge("torch"))
    inputs = [made.tensors[name] for name in "qkv"]
    for x, y in zip(seen["ours"][0], inputs, strict=True):
        assert (x.data_ptr(), x.stride()) == (y.data_ptr(), y.stride())
    for x in (x for read in seen["peer"] for x in read):
        assert x.is_contiguous() and x.data_ptr() % 16 == 0
        assert x.data_ptr() not in {y.data_ptr() for y in (*inputs, *made.douts)}


@pytest.mark.parametrize("whose", ["ours", "the_peer's"])
def test_whoever_lost_the_device_is_named(whose, monkeypatch):
    """A kernel's error is raised at the next synchronisation, and at every later one."""
    made = attention.make(3)
    lost = [whose == "ours"]

    def fused(**tensors):
        lost[0] = True
        return tensors["q"]

    def synchronize():
        if lost[0]:
            raise RuntimeError("CUDA error: misaligned address")

    made.fused = fused
    monkeypatch.setattr(problem, "on_gpu", lambda tensor: tensor is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    named = "the device is lost without the peer" if whose == "the_peer's" else "^CUDA error"
    with pytest.raises(RuntimeError, match=named):
        made.judge("torch")


@pytest.mark.parametrize("error", [CannotRun("it is not installed"), RuntimeError("no kernel\nx")])
def test_the_gate_names_a_yardstick_that_it_is_without(error):
    case = registry.find("attention/50x12h b16", "cpu")

    def refuse(*_):
        raise error

    case = dataclasses.replace(case, peers={**case.peers, case.fused: Peer(refuse)})
    verdict = gate.check(case, "cpu", lambda t, s: case.call(tinyclip.ops, t, s))
    assert verdict.colour == "green"
    reason = str(error).partition("\n")[0]
    assert verdict.detail.endswith(f"; without the yardstick {case.fused}: {reason}")
