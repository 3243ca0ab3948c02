"""Tuning with a clock that is told what every tile takes, and with launches that are caught."""

import json
import time
from importlib import import_module

import pytest
import torch

from bench import __main__ as command
from bench import gate, registry, report, tune

pytest.importorskip("triton")

kernels = import_module("tinyclip.triton_kernels.contrastive")
launch = import_module("tinyclip.triton_kernels.launch")
mlp = import_module("tinyclip.triton_kernels.gelu_mlp")
tuning = import_module("tinyclip.triton_kernels.tuning")


GREEN = gate.Verdict("green", "it is right")


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """`--tune` on a CPU that calls itself a GPU; a launch takes what `milliseconds` says of it."""
    launched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "environment", lambda d: {"gpu": "Stand In 1", "commit": "0"})
    monkeypatch.setattr(launch.Launch, "run", lambda call, on: launched.append(call))
    for op in ("attention", "gelu_mlp", "contrastive"):
        monkeypatch.setattr(import_module(f"tinyclip.ops.{op}"), "triton_why_not", lambda s: None)

    def run(milliseconds, verdict=GREEN, **more):
        def clock(call, on):
            launched.clear()
            call()
            return milliseconds(launched[0])

        for module in (launch, mlp):
            monkeypatch.setattr(module, "time_call", clock)
        monkeypatch.setattr(gate, "check", lambda case, device, run: verdict)
        status = tune.main([], tmp_path, device="cpu", **{"begun": time.monotonic(), **more})
        (file,) = (tmp_path / "stand-in-1").glob("*.tiles.json")
        return status, json.loads(file.read_text())

    return run


def warps_first(call) -> float:
    """More warps are faster; a main tile of 32 queries does not fit; fused beats pointwise."""
    if call.arguments.get("BLOCK_M") == 32:
        raise RuntimeError("out of resource: shared memory")
    fused = "BLOCK_K" in call.arguments and "x_ptr" in call.arguments
    return 1.0 / call.num_warps - (0.01 if fused else 0.0)


def test_the_fastest_tile_of_every_kind_is_written(stand_in):
    before = dict(kernels.TILES)
    status, data = stand_in(warps_first)
    assert status == 0 and data["complete"] is True
    rows = data["tiles"]
    lengths = {row["length"] for row in rows if row["case"].startswith("attention_qkv")}
    assert lengths == {50, 77, 197, 257, 577}
    for case in {row["case"] for row in rows}:
        kinds = {row["kind"] for row in rows if row["case"] == case}
        passes = {case.partition("/")[0].removeprefix("contrastive_")}
        assert kinds == (passes if case.startswith("contrastive") else {"fwd", "bwd"}), case
    for row in rows:
        assert row["tile"] == json.loads(min(row["ms"], key=row["ms"].get))
        assert row["gate"] == "green" and row["source"] == "measured"
    # a row is what the table reads: its tile is a choice, and it serves the problem it came from
    attention = next(row for row in rows if row.get("length") == 77 and row["kind"] == "bwd")
    key = tuning.Kind("bwd", 90, attention["bits"], attention["d"], 77, True)
    assert key.fits(attention) and key.choice(*attention["tile"])
    assert "out of resource" in str([row["failed"] for row in rows])
    assert dict(kernels.TILES) == before
    assert any(row["tile"][0] == "fused" for row in rows if "at_least" in row)


def test_a_wrong_tile_is_told(stand_in):
    status, data = stand_in(warps_first, verdict=gate.Verdict("red", "dx error 1"))
    assert status == 1
    assert {row["gate"] for row in data["tiles"]} == {"red"}


def test_past_its_deadline_nothing_is_timed(stand_in, capsys):
    def never(call):
        raise AssertionError("timed")

    status, data = stand_in(never, begun=time.monotonic() - 1000)
    assert status == 0 and not data.get("tiles")
    assert capsys.readouterr().out.count("the budget was used up") >= 8


def test_without_a_gpu_one_sentence(capsys):
    if not torch.cuda.is_available():
        assert command.main(["gpu", "--tune"]) == 0
        assert capsys.readouterr().out == "No CUDA device is available, so nothing was tuned.\n"


def test_the_cases_on_a_gpu_are_clips(stand_in, monkeypatch):
    seen = []
    monkeypatch.setattr(tune.Tuner, "tune", lambda self, case, device: seen.append(case.id) or [])
    on_a_gpu = registry.cases("cuda")
    monkeypatch.setattr(registry, "cases", lambda device: on_a_gpu)
    stand_in(warps_first)
    towers = [name for name in seen if name.startswith("attention_qkv/")]
    assert len(towers) == 5 and all(name.endswith(" b1024") for name in towers)
    assert sum(name.startswith("gelu_mlp/") for name in seen) == 4
    assert sum(name.startswith("contrastive_") for name in seen) == 4
    assert len(seen) == 13
