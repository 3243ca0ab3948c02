"""Tuning with a clock that is told what every tile takes, and with launches that are caught."""

import json
import time
from importlib import import_module

import pytest

from bench import gate, registry
from bench.gpu import command, phases, tune
from bench.measure import FAILED, MEASURED, NOT_RUN
from tests.bench.commands import check_schema

pytest.importorskip("triton")

kernels = import_module("tinyclip.triton_kernels.contrastive")
launch = import_module("tinyclip.triton_kernels.launch")
mlp = import_module("tinyclip.triton_kernels.gelu_mlp")
tuning = import_module("tinyclip.triton_kernels.tuning")


GREEN = gate.Verdict("green", "it is right")


@pytest.fixture
def launched(monkeypatch):
    """Record launches instead of running them, with Triton enabled for CPU tensors."""
    found = []
    monkeypatch.setattr(launch.Launch, "run", lambda call, on: found.append(call))
    for op in ("attention", "gelu_mlp", "contrastive"):
        monkeypatch.setattr(import_module(f"tinyclip.ops.{op}"), "triton_why_not", lambda s: None)
    return found


@pytest.fixture
def stand_in(monkeypatch, tmp_path, launched):
    """Rehearse part "tune" with ``milliseconds(launch)`` in the place of a clock."""
    monkeypatch.setattr(command, "_exit_on_sigterm", lambda: None)
    monkeypatch.setitem(tune.BACKENDS, "rehearsal", "triton")
    monkeypatch.setattr(phases, "compile_kernels", lambda *a: {"status": "compiled"})

    def run(milliseconds, verdict=GREEN, budget=600.0):
        def clock(call, on):
            launched.clear()
            call()
            return milliseconds(launched[0])

        for module in (launch, mlp):
            monkeypatch.setattr(module, "time_call", clock)
        monkeypatch.setattr(gate, "check", lambda case, device, run: verdict)
        monkeypatch.setenv("GPU_BUDGET_S", str(budget))
        argv = ["--rehearse", "--tune", "--out", str(tmp_path)]
        status = command.main(argv, begun=time.monotonic())
        (file,) = tmp_path.rglob("*.json")
        data = json.loads(file.read_text())
        check_schema(data)
        return status, data

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
    assert status == 0 and data["parts"]["tune"]["status"] == "ended"
    rows = data["tiles"]
    assert {row["status"] for row in rows} == {MEASURED}
    assert [(row["case"], row["kind"]) for row in rows] == list(tune.PLAN)
    lengths = {row["length"] for row in rows if row["case"].startswith("attention_qkv")}
    assert lengths == {50, 77, 197, 257, 577}
    for row in rows:
        assert row["tile"] == json.loads(min(row["ms"], key=row["ms"].get))
        assert row["gate"] == "green" and row["source"] == "measured"
    # a row is what the table reads: its tile is a choice, and it serves the problem it came from
    attention = next(row for row in rows if row.get("length") == 77 and row["kind"] == "bwd")
    key = tuning.Kind("bwd", 90, attention["bits"], attention["d"], 77, True)
    assert key.fits(attention) and key.choice(*attention["tile"])
    # beyond the table: of a length all tiles that it fills
    timed = {tuple(json.loads(tile)) for tile in attention["ms"]}
    assert (64, 128, 4, 3) in timed and (128, 128, 4, 1) not in timed
    assert "out of resource" in str([row["failed"] for row in rows])
    assert dict(kernels.TILES) == before
    assert any(row["tile"][0] == "fused" for row in rows if "at_least" in row)


def test_a_short_row_has_no_tile_beyond_it():
    key = tuning.Kind("fwd", 90, 16, 64, 50, False)
    assert {max(tile[:2]) for tile in tune.grid(key)} == {64}
    assert max(max(tile[:2]) for tile in tune.grid(key._replace(length=77))) == 128


def test_a_wrong_tile_is_red(stand_in):
    status, data = stand_in(warps_first, verdict=gate.Verdict("red", "dx error 1"))
    assert status == 1
    assert {row["gate"] for row in data["tiles"]} == {"red"}


def test_past_its_deadline_nothing_is_timed(stand_in):
    def never(call):
        raise AssertionError("timed")

    status, data = stand_in(never, budget=0.0)
    assert status == 0
    assert [(row["case"], row["kind"]) for row in data["tiles"]] == list(tune.PLAN)
    assert {row["status"] for row in data["tiles"]} == {NOT_RUN}


def test_a_sweep_that_fails_costs_itself(stand_in, monkeypatch):
    right = tune.Tuner.tune

    def fails_once(self, case, *more):
        if case.name.startswith("257"):
            raise RuntimeError("an illegal address")
        return right(self, case, *more)

    monkeypatch.setattr(tune.Tuner, "tune", fails_once)
    _, data = stand_in(warps_first)
    failed = [row for row in data["tiles"] if row["status"] == FAILED]
    assert [row["kind"] for row in failed] == ["fwd", "bwd"]
    assert all("an illegal address" in row["reason"] for row in failed)
    assert sum(row["status"] == MEASURED for row in data["tiles"]) == len(tune.PLAN) - 2


def test_processes_share_the_tiles_to_compile(launched, monkeypatch):
    """Together they launch every candidate of every sweep, none of them twice."""
    monkeypatch.setattr(tune, "PLAN", tune.PLAN[:1])
    monkeypatch.setitem(tune.BACKENDS, "rehearsal", "triton")
    shares = []
    for number in range(3):
        launched.clear()
        for _, run in tune.launches("rehearsal", number, 3):
            run()
        tiles = [call for call in launched if call.kernel.fn.__name__ == "_attention_fwd_kernel"]
        shares.append(len(tiles) - 1)  # the op itself launches what won
    case = registry.find(tune.PLAN[0][0], "rehearsal")
    key = tuning.kind_of("fwd", case.draw("cpu")["qkv"][:, :, 0], case.sizes["L"], False)
    assert sum(shares) == len({*tuning.candidates(key), *tune.grid(key)})
    assert max(shares) - min(shares) <= 1


def test_the_cases_on_a_gpu_are_clips():
    cases = {case.id: case for case in registry.cases("cuda")}
    found = [(cases[name], kind) for name, kind in tune.PLAN]
    towers = [(case.sizes["L"], kind) for case, kind in found if case.op == "attention_qkv"]
    assert [kind for _, kind in towers] == 5 * ["fwd"] + 5 * ["bwd"]  # forward is least known
    assert {case.sizes["B"] for case, _ in found if case.op == "attention_qkv"} == {1024}
    assert sum(case.op == "gelu_mlp" for case, _ in found) == 4
    assert sum(case.op.startswith("contrastive_") for case, _ in found) == 4
