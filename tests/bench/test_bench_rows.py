"""What a row says of a wrong op, a slow op, a peer that cannot run; and how rows are paired."""

import contextlib
import dataclasses
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import tinyclip
from bench import gate, registry, timing
from bench.measure import FAILED, MEASURED, NOT_RUN, Bench, Settings
from bench.peers import Peer, plain
from bench.registry import BOTH, FORWARD
from bench.roofline import Machine

MACHINE = Machine(copy_tb_s=0.01, gemm_tflops=0.1)


def bench(ops=None) -> Bench:
    return Bench(Settings("cpu", 0.05), MACHINE, ops)


def planted(layer_norm) -> SimpleNamespace:
    return SimpleNamespace(layer_norm=layer_norm)


def off_by_a_little(x, weight, bias, **extras):
    return tinyclip.ops.layer_norm(x, weight, bias, **extras) * (1 + 1e-4)


def wrong_gradient(x, weight, bias, **extras):
    y = tinyclip.ops.layer_norm(x, weight, bias, **extras)
    return y + 1e-3 * (x - x.detach())


def nan_in_one_place(x, weight, bias, **extras):
    y = tinyclip.ops.layer_norm(x, weight, bias, **extras).clone()
    y[-1, -1] = float("nan")
    return y


@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [(off_by_a_little, ""), (wrong_gradient, "dx"), (nan_in_one_place, "output 0")],
)
def test_the_gate_refuses_a_wrong_op(norm_case, wrong, tensor):
    row = bench(planted(wrong)).row(norm_case, BOTH, "eager")
    assert (row["status"], row["gate"]) == (FAILED, "red")
    assert row["reason"].startswith("refused: gate red, ")
    assert f"{tensor} error " in row["reason"]
    assert "ratio" not in row and "raw_ms" not in row


def engine_of(layer_norm, context=contextlib.nullcontext) -> dict[str, Peer]:
    """A peer "new" that is one of our own."""

    def build(t, s, device):
        return timing.Timed(lambda: layer_norm(t["x"], t["weight"], t["bias"]), context)

    return {"new": Peer(build, engine=True)}


@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [(off_by_a_little, ""), (wrong_gradient, "dx"), (nan_in_one_place, "output 0")],
)
def test_the_gate_refuses_a_wrong_engine(norm_case, wrong, tensor):
    case = dataclasses.replace(norm_case, peers=engine_of(wrong))
    row = bench().row(case, BOTH, "new")
    assert (row["status"], row["gate"]) == (FAILED, "red")
    assert row["reason"].startswith("refused: gate red, new: ")
    assert f"{tensor} error " in row["reason"]
    assert "ratio" not in row and "raw_ms" not in row
    # and a right one is not timed beside a wrong `auto`
    case = dataclasses.replace(norm_case, peers=engine_of(tinyclip.ops.layer_norm))
    row = bench(planted(wrong)).row(case, BOTH, "new")
    assert row["reason"].startswith("refused: gate red, auto: ")


class _Choosing(torch.autograd.Function):
    """y = x; a backward that is wrong while `wrong` holds something."""

    wrong: ClassVar[list] = []

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy if _Choosing.wrong else dy


def test_an_engine_is_gated_in_its_context_both_ways(norm_case):
    """What an engine's backward does is chosen when it runs, as the MLP's tiles are."""

    @contextlib.contextmanager
    def context():
        _Choosing.wrong.append(True)
        yield
        _Choosing.wrong.pop()

    def chosen(x, weight, bias):
        return tinyclip.ops.layer_norm(_Choosing.apply(x), weight, bias)

    case = dataclasses.replace(norm_case, peers=engine_of(chosen, context))
    row = bench().row(case, BOTH, "new")
    assert row["gate"] == "red" and "dx error" in row["reason"]
    case = dataclasses.replace(norm_case, peers=engine_of(chosen))
    assert bench().row(case, BOTH, "new")["gate"] == "green"


def test_an_engines_row_has_the_engines_figures(norm_case, ticks):
    def slow(x, weight, bias):
        ticks.append(20.0)
        return tinyclip.ops.layer_norm(x, weight, bias)

    case = dataclasses.replace(norm_case, sizes={"M": 64, "C": 64}, peers=engine_of(slow))
    row = bench().row(case, FORWARD, "new")
    assert (row["status"], row["backend"]) == (MEASURED, "new")
    assert row["ms"] >= 20 and row["ms"] == timing.quantile(row["raw_ms"], 0.5)
    assert row["ratio"] < 1e-3  # `auto` takes no time, so the engine is the slower one
    roof = 100 * case.passes().of(FORWARD).bytes / 0.01e12 * 1e3
    assert row["percent_of_roof"] == pytest.approx(roof / row["ms"])


def test_a_yardstick_that_overflowed_excuses_nothing():
    one, off, nan = ({"y": torch.tensor([y])} for y in (1.0, 1.1, float("nan")))
    reference = {"y": one["y"].double()}
    assert gate._judge(off, [one, nan], reference, {}).colour == "red"
    assert gate._judge(one, [one, nan], reference, {}).colour == "green"
    assert gate._judge(nan, [nan], reference, {}).colour == "red"
    assert gate._judge(one, [one], {"y": nan["y"].double()}, {}).colour == "red"


@pytest.fixture
def ticks(monkeypatch):
    """Replace the clock: a call takes the milliseconds that it appends, on any machine."""
    told = []

    def clock(call, calls):
        told.clear()
        for _ in range(calls):
            call()
        return max(sum(told) / calls, 1e-3)

    monkeypatch.setattr(timing, "clock", lambda device: clock)
    return told


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_the_ratio_shows_a_slow_op(norm_case, mode, ticks):
    """Right, and three times the peer's time: a third."""

    def worked(times, t):
        for _ in range(times):
            ticks.append(4.0)
            y = tinyclip.ops.layer_norm(t["x"], t["weight"], t["bias"])
        return y

    def three_times(x, weight, bias):
        return worked(3, {"x": x, "weight": weight, "bias": bias})

    peers = {"once": plain(lambda t, s: worked(1, t))}
    case = dataclasses.replace(norm_case, sizes={"M": 64, "C": 64}, peers=peers)
    row = bench(planted(three_times)).row(case, mode, "once")
    assert (row["status"], row["gate"]) == (MEASURED, "green")
    assert row["ratio"] == pytest.approx(1 / 3)
    assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
    assert len(row["raw_ms"]) == len(row["peer_raw_ms"]) >= 5


def test_a_measured_row_is_whole(norm_case):
    row = bench().row(norm_case, BOTH, "eager")
    assert (row["status"], row["gate"]) == (MEASURED, "green")
    assert len(row["raw_ms"]) >= 5
    work = norm_case.passes().of(BOTH)
    assert row["percent_of_roof"] == pytest.approx(
        100 * work.bytes / 0.01e12 * 1e3 / timing.quantile(row["raw_ms"], 0.5)
    )
    assert row["backend"] in ("torch", "cpu")
    assert row["peak_mb"] is None or row["peak_mb"] > 0


def test_what_cannot_run_is_a_row_with_its_reason(norm_case):
    case = registry.find("attention/50x12h b16", "cpu")
    row = bench().row(case, FORWARD, "sdpa-cudnn")
    assert row == {"status": NOT_RUN, "reason": "this backend exists on CUDA only"}

    def broken(t, s):
        raise RuntimeError("the peer's own fault\nand a second line")

    peers = {"broken": plain(broken), "sdpa": Peer(_no_kernel)}
    case = dataclasses.replace(norm_case, peers=peers)
    row = bench().row(case, FORWARD, "broken")
    assert (row["status"], row["reason"]) == (FAILED, "RuntimeError: the peer's own fault")
    assert bench().row(case, FORWARD, "sdpa")["status"] == NOT_RUN


def _no_kernel(tensors, sizes, device):
    raise RuntimeError("No available kernel. Aborting execution.")


def test_open_clip_missing_is_said(norm_case, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    finder = SimpleNamespace(
        find_spec=lambda name, path=None, target=None: (
            None if name.split(".")[0] != "open_clip" else _refuse(name)
        )
    )
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for op in ("contrastive_loss/1024", "block/50x12h b4"):
        row = bench().row(registry.find(op, "cpu"), BOTH, "open_clip")
        assert row == {"status": NOT_RUN, "reason": "open_clip is not installed"}


def _refuse(name):
    raise ImportError(f"No module named {name!r}")


def test_a_pair_cancels_drift():
    before, after = [10.0, 20.0, 40.0, 80.0, 160.0], [14.0, 28.0, 56.0, 112.0, 224.0]
    peer = [24.0, 48.0, 96.0, 192.0, 384.0]
    paired = timing.pair(before, peer, after)
    assert paired.ratio == paired.p20 == paired.p80 == pytest.approx(2.0)
    assert paired.ours_ms == [12.0, 24.0, 48.0, 96.0, 192.0]


def test_at_least_five_rounds_however_slow():
    assert timing.plan(60_000.0, 20_000.0, "cpu", 0.1) == (1, 5)
    calls, rounds = timing.plan(0.3, 0.1, "cpu", 100.0)
    assert (calls, rounds) == (50, timing.MAX_ROUNDS)
