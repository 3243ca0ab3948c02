"""Who computes: order, verdicts, explicit choices that never fall back, and the printed table."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.compiler import assume_constant_result

import tinyclip
from tinyclip.ops import OPS, _dispatch
from tinyclip.ops._dispatch import (
    Candidate,
    Cannot,
    Op,
    Slower,
    Spec,
    constant_when_compiled,
)


@pytest.fixture
def toy(monkeypatch):
    """An op whose candidates are able only for some sizes: fast 1..9, slow anything, last even."""

    def prepare(size):
        spec = Spec("toy", "cpu", None, torch.float32, False, {"size": size}, ())
        return spec, (size,)

    def toy(size):
        spec, problem = prepare(size)
        return _dispatch.select(spec).run(*problem)

    candidates = (
        Candidate(
            "triton",
            lambda s: None if s.sizes["size"] < 10 else Cannot("size is over 9"),
            lambda size: "triton",
        ),
        Candidate("cpu", lambda s: Slower("measured 0.7x of torch"), lambda size: "cpu"),
        Candidate("torch", lambda s: None, lambda size: "torch"),
    )
    op = Op("toy", toy, prepare, candidates, lambda device: ((12,), {}))
    monkeypatch.setitem(_dispatch._OPS, "toy", op)
    return toy


def test_auto_takes_the_first_without_a_verdict(toy):
    assert toy(5) == "triton"
    assert toy(12) == "torch"


def test_an_explicit_choice_overrides_slower(toy):
    with tinyclip.backend("cpu"):
        assert toy(5) == "cpu"
    assert toy(5) == "triton"


def test_an_explicit_choice_never_falls_back(toy):
    with tinyclip.backend("triton"), pytest.raises(tinyclip.BackendUnavailable, match="over 9"):
        toy(12)
    with (
        tinyclip.backend("cuda"),
        pytest.raises(tinyclip.BackendUnavailable, match=r"'cuda'.*it has triton, cpu, torch"),
    ):
        toy(5)


def test_choices_nest_and_are_restored_after_an_error(toy):
    with tinyclip.backend("torch"):
        with tinyclip.backend("auto"):
            assert toy(5) == "triton"
        with pytest.raises(KeyError), tinyclip.backend("cpu"):
            raise KeyError
        assert toy(5) == "torch"
    choice = tinyclip.backend("cpu")
    with choice, choice:  # one object, entered twice
        assert toy(5) == "cpu"
    assert toy(5) == "triton"


def test_blocks_that_end_in_another_order(toy):
    """As those of two threads may: each takes its own choice back."""
    first, second = tinyclip.backend("torch"), tinyclip.backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert toy(5) == "cpu"
    second.__exit__(None, None, None)
    assert toy(5) == "triton"


def test_the_choice_holds_on_other_threads(toy):
    """Autograd runs backward on its own threads, so the choice belongs to the process."""
    seen = []
    with tinyclip.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(toy(5)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_explain_tells_who_and_why_not(toy):
    told = tinyclip.explain("toy", 5)
    assert told.backend == "triton"
    assert told.rows[1] == ("cpu", "slower", "measured 0.7x of torch")
    told = tinyclip.explain(toy)  # the example has size 12
    assert told.backend == "torch"
    assert told.rows[0] == ("triton", "cannot", "size is over 9")
    for name, state, reason in told.rows:
        assert all(word in str(told) for word in (name, state, reason))
    with tinyclip.backend("triton"):
        assert tinyclip.explain("toy", 12).backend is None
    with tinyclip.backend("cpu"):
        assert tinyclip.explain("toy", 12).backend == "cpu"


@pytest.mark.parametrize("name", OPS)
def test_every_op_explains_its_example(name):
    told = tinyclip.explain(name)
    assert told.backend is not None
    assert {row[0] for row in told.rows} >= {"torch", "reference"}
    assert tinyclip.explain(getattr(tinyclip.ops, name)) == told


def test_explain_agrees_with_the_call():
    q = torch.zeros(2, 0, 3, 8)
    told = tinyclip.explain("attention", q, q, q)
    assert told.backend == "reference"
    assert ("torch", "cannot", "a size is zero") in told.rows
    assert tinyclip.ops.attention(q, q, q).shape == q.shape
    with (
        tinyclip.backend("torch"),
        pytest.raises(tinyclip.BackendUnavailable, match="a size is zero"),
    ):
        tinyclip.ops.attention(q, q, q)


@pytest.mark.parametrize("name", ["", "Torch", "tritn", "gpu"])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"must be 'auto' or one of .*got"):
        tinyclip.backend(name)


def test_a_near_miss_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        tinyclip.backend("tritn")
    with pytest.raises(ValueError, match="did you mean 'layer_norm'"):
        tinyclip.explain("layernorm")
    with pytest.raises(TypeError, match="must be a string, got int"):
        tinyclip.backend(3)


def _in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_chooses():
    code = "import tinyclip; print(tinyclip.explain('layer_norm').choice)"
    assert _in_process(code, TINYCLIP_BACKEND="reference").stdout.strip() == "reference"
    failed = _in_process(code, TINYCLIP_BACKEND="nonsense")
    assert failed.returncode == 1
    assert "TINYCLIP_BACKEND must be 'auto' or one of" in failed.stderr


def test_a_constant_is_marked_as_pytorch_marks_it():
    """The mark is PyTorch's own affair: if it changes, ours must."""
    ours, theirs = (mark(lambda: 0) for mark in (constant_when_compiled, assume_constant_result))
    assert ours.__dict__ == theirs.__dict__ != {}


def test_the_ops_import_no_compiler():
    check = "import sys, tinyclip.ops; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
