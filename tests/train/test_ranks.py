"""Two processes against one: fit over gloo, and the command under torchrun."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tinyclip
from tests.train import tiny
from tests.train.test_kills import CONFIG
from tinyclip.train import ranks

ROOT = Path(__file__).resolve().parents[2]


def run_all(commands: list[list[str]], timeout: float = 150) -> list[str]:
    """What each printed; all are waited for, and none outlives the test."""
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for command in commands
    ]  # fmt: skip
    try:
        told = [(process, *process.communicate(timeout=timeout)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, out, err in told:
        assert process.returncode == 0, out + err[-4000:]
    return [out for _, out, _ in told]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_ranks_train_as_one(tmp_path, world):
    """Parameters to 1e-10 after 5 steps, with uneven and empty ranks; what one meets, all do."""
    command = [sys.executable, "-m", "tests.train.ranks", str(tmp_path)]
    print(*run_all([[*command, str(rank), str(world)] for rank in range(world)]), sep="")


def test_torchrun(tmp_path):
    """The command on two processes of 8 and on one of 16: the same model after 5 steps, fp64."""
    (tmp_path / "tiny.json").write_text(CONFIG)
    train = [
        *("-m", "tinyclip", "train", "--model", str(tmp_path / "tiny.json"), "--device", "cpu"),
        *("--train-data", "digits:train?count=640", "--tokenizer", "digits", "--workers", "0"),
        *("--precision", "fp64", "--steps", "5", "--warmup", "2", "--grad-clip-norm", "1"),
        *("--logs-dir", str(tmp_path)),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = [*torchrun, *train, "--name", "two", "--batch-size", "8"]
    one = [sys.executable, *train, "--name", "one", "--batch-size", "16"]
    out, _ = run_all([two, one])
    assert out.count("model: ") == 1  # the first rank speaks for all
    found = [tinyclip.load(tmp_path / name / "model")[0].state_dict() for name in ("two", "one")]
    assert found[0].keys() == found[1].keys()
    worst = max((a - found[1][name]).abs().max().item() for name, a in found[0].items())
    print(f"worst difference {worst:.1e}")
    assert worst <= 1e-10
    assert {value.dtype for value in found[0].values()} == {torch.float64}


def test_an_attempt_has_one_name_that_no_other_had():
    """Over one store: also after an attempt of which some died before they were answered."""
    store = dist.HashStore()
    store.set("tinyclip/mark/2", "of a process that is dead")
    names = []
    for world in (3, 3, 2):
        with ThreadPoolExecutor(world) as pool:
            last_first = reversed(range(world))
            told = [pool.submit(ranks._attempt, store, rank, world) for rank in last_first]
            (name,) = {one.result(timeout=60) for one in told}
        names.append(name)
    assert len(set(names)) == 3


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


@pytest.mark.soak
@pytest.mark.parametrize("doomed", [0, 1])
@pytest.mark.parametrize("nodes", ["standalone", "an address", "two nodes"])
def test_a_killed_rank_is_started_again(tmp_path, nodes, doomed):
    """torchrun --max-restarts: dead after step 11 with checkpoints each 4, and the end is that of
    an uninterrupted run, bit for bit. Of two nodes only the one of the dead counts a restart."""
    (tmp_path / "tiny.json").write_text(CONFIG)
    words = [
        *("train", "--model", str(tmp_path / "tiny.json"), "--device", "cpu", "--ema", "0.9"),
        *("--train-data", "digits:train?count=640", "--tokenizer", "digits", "--workers", "1"),
        *("--batch-size", "8", "--steps", "20", "--warmup", "2", "--save-every-n-steps", "4"),
        *("--logs-dir", str(tmp_path), "--resume", "latest"),
    ]
    place = {
        "standalone": ["--standalone", "--nproc-per-node=2"],
        "an address": ["--master-port", free_port(), "--nproc-per-node=2"],
        "two nodes": [
            *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=restarts"),
            f"--rdzv-endpoint=localhost:{free_port()}",
        ],
    }[nodes]
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, "--max-restarts=2"]
    launcher += ["-m", "tests.train.restarts"]
    count = 2 if nodes == "two nodes" else 1
    for name, dies in (("cut", [str(doomed), "11"]), ("whole", ["none", "0"])):
        told = run_all([[*launcher, *dies, *words, "--name", name]] * count, timeout=600)
        assert "".join(told).count("model: ") == 1
    rows = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3  # of steps 1, 10 and 20: step 10 was made twice
    assert tiny.fingerprint(tmp_path / "cut", 20) == tiny.fingerprint(tmp_path / "whole", 20)
