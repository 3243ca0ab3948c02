"""SIGKILL at random moments, half of them inside a save; SIGTERM, SIGINT and SIGUSR1."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train import tiny
from tinyclip import train
from tinyclip.train import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def kills(folder: Path, count: int, seed: int) -> str:
    command = [sys.executable, "-m", "tests.train.kills", str(folder), str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    assert kills(tmp_path, 4, seed=3).endswith("the same end\n")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_twelve_kills(tmp_path, seed):
    told = kills(tmp_path, 12, seed)
    assert len(re.findall("in a save", told)) == 6
    assert told.endswith("the same end\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_and_leaves(tmp_path, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    summary, _ = tiny.fit(
        tmp_path,
        at_step=lambda step, model: step == 5 and os.kill(os.getpid(), number),
    )
    assert (summary.steps, summary.stopped) == (5, True)
    assert signal.getsignal(number) is before
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_00000005"
    assert not (tmp_path / "model").exists()
    summary, model = tiny.fit(tmp_path, "latest")
    assert (summary.steps, summary.stopped) == (12, False)
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])


def test_a_signal_before_the_first_step(tmp_path):
    class Asked(tiny.Memory):
        def epoch(self, epoch, start=0):
            if start == epoch == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().epoch(epoch, start)

    summary, _ = tiny.fit(tmp_path, loader=Asked())
    assert (summary.steps, summary.stopped, summary.losses) == (0, True, {})
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [0]
    _, model = tiny.fit(tmp_path, "latest")
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])


def test_a_signal_during_a_save_lets_it_end(tmp_path, monkeypatch):
    """It comes between the first file and the name of the folder."""
    rename = os.rename

    def signalled(a, b):
        if Path(b).name == "step_00000003":
            os.kill(os.getpid(), signal.SIGTERM)
        rename(a, b)

    monkeypatch.setattr(os, "rename", signalled)
    summary, _ = tiny.fit(tmp_path)
    assert (summary.steps, summary.stopped) == (3, True)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_00000003"


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice(step, model):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny.fit(tmp_path, at_step=twice)
    assert list(checkpoint.steps(tmp_path / "checkpoints")) == [3]
    assert signal.getsignal(signal.SIGINT) is before


CONFIG = """{"embed_dim": 8, "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "width": 16,
"layers": 1, "head_width": 8}, "text_cfg": {"context_length": 16, "vocab_size": 558, "width": 16,
"heads": 2, "layers": 1}}"""


@pytest.mark.parametrize(
    "to_all",
    [pytest.param(False, marks=pytest.mark.soak), True],
    ids=["to the process", "to its whole group"],
)
def test_sigterm_with_workers(tmp_path, to_all):
    """The command itself, two workers: saved, status 0, and the end is the uninterrupted one."""
    (tmp_path / "tiny.json").write_text(CONFIG)
    command = [
        *(sys.executable, "-m", "tinyclip", "train", "--model", str(tmp_path / "tiny.json")),
        *("--train-data", "digits:train?count=1200", "--tokenizer", "digits", "--device", "cpu"),
        *("--batch-size", "8", "--steps", "100", "--workers", "2", "--ema", "0.9"),
        *("--logs", str(tmp_path), "--log-every-n-steps", "1", "--save-every-n-steps", "60"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *more], cwd=tmp_path, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    cut = start("--name", "cut")
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert cut.poll() is None and time.monotonic() < deadline, cut.communicate()
        time.sleep(0.01)
    (os.killpg if to_all else os.kill)(cut.pid, signal.SIGTERM)
    out, err = cut.communicate(timeout=60)
    assert cut.returncode == 0, err
    assert re.search(r"stopped after \d+ steps, all saved; to go on, .* --resume latest", out)
    (step,) = checkpoint.steps(tmp_path / "cut" / "checkpoints")
    assert 5 <= step < 100
    ends = [start("--name", "cut", "--resume", "latest"), start("--name", "whole")]
    for process in ends:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert tiny.fingerprint(tmp_path / "cut", 100) == tiny.fingerprint(tmp_path / "whole", 100)


HOLD = """
import os, signal, sys
from pathlib import Path
from tests.train import tiny

def at_step(step, model):
    if step == 5:
        if os.fork() == 0:  # as a data worker, which outlives its parent for a while
            signal.pause()
        print(os.getpid(), flush=True)
        signal.pause()

tiny.fit(Path(sys.argv[1]), at_step=at_step)
"""


def test_one_process_trains_in_a_folder(tmp_path):
    """The second says so and changes nothing; a dead one's file does not stand in the way."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert int(first.stdout.readline()) == first.pid
        (tmp_path / "checkpoints" / ".step_00000006.part").mkdir()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="is in use by another process, which trains there"):
            tiny.fit(tmp_path, "latest")
        assert sorted(tmp_path.rglob("*")) == before
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        _, model = tiny.fit(tmp_path, "latest")
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.stdout.close()
        first.wait()
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])


def test_handlers_are_left_alone_outside_the_main_thread():
    from threading import Thread

    found = []
    before = signal.getsignal(signal.SIGTERM)
    thread = Thread(target=lambda: found.append(tiny.fit(None, steps=2, warmup=0)[0]))
    thread.start()
    thread.join()
    assert found[0].steps == 2 and signal.getsignal(signal.SIGTERM) is before
    assert issubclass(train.TrainingError, RuntimeError)
