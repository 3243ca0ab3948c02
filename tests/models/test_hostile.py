"""Broken and hostile files: an error each that names file and rule; no code run; memory bounded."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tinyclip
from tests.models import hostile
from tinyclip import models

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    path = tmp_path_factory.mktemp("canary") / "code was run"
    os.environ[hostile.CANARY] = str(path)
    yield path
    del os.environ[hostile.CANARY]


@pytest.fixture(scope="module")
def cases(tmp_path_factory, canary):
    made = hostile.make(tmp_path_factory.mktemp("hostile"))
    canary.unlink(missing_ok=True)
    return made


def test_an_error_each(cases, canary):
    assert len(cases) >= 60
    wrong = []
    for name, (path, rule) in cases.items():
        try:
            tinyclip.load(path)
        except models.CheckpointError as error:
            # Of a folder the error names the file in it.
            if not (str(path) in str(error) and re.search(rule, str(error))):
                wrong.append(f"{name}: says {error}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{name}: was loaded")
        if canary.exists():
            wrong.append(f"{name}: ran code")
            canary.unlink()
    assert not wrong, "\n".join(wrong)


def test_the_canary_sings(canary, cases):
    """The payloads do run where nothing stops them: that they did not is worth something."""
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    pickle_file = str(cases["archive: pickle"].path)
    subprocess.run([sys.executable, "-c", code, pickle_file], check=True, timeout=60)
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_flipped_bytes_are_loaded_or_refused(tmp_path, suffix):
    """200 seeded mutations, most where headers and pickles are: nothing else is ever raised."""
    model = hostile.build.model(hostile.build.IRREGULAR)
    models.save(model, tmp_path, "tinyclip" if suffix == ".safetensors" else "microsoft")
    sound = (tmp_path / f"model{suffix}").read_bytes()
    draw, outcomes = random.Random(3), {True: 0, False: 0}
    head, tail = slice(0, 8000), slice(max(0, len(sound) - 8000), len(sound))
    for index in range(200):
        changed = bytearray(sound)
        places = range(len(sound))[(head, tail)[index % 2 if suffix == ".pt" else 0]]
        for _ in range(draw.choice([1, 1, 4])):
            changed[draw.choice(places)] = draw.randrange(256)
        if draw.random() < 0.1:
            del changed[draw.randrange(len(changed)) :]
        file = tmp_path / f"changed{index}{suffix}"
        file.write_bytes(changed)
        try:
            tinyclip.load(file, activation="gelu")
        except models.CheckpointError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
        file.unlink()
    assert outcomes[False] > 50, outcomes


LIMITED = """
import resource, sys
import tinyclip, torch
from tinyclip import models
from pathlib import Path
tinyclip.load(sys.argv[1])  # everything is imported and warm
now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), now + (256 << 20)))
refused = 0
for path in sys.argv[2:]:
    try:
        tinyclip.load(path)
    except models.CheckpointError as error:
        assert 'allocate' not in str(error), error
        refused += 1
print(refused)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets RLIMIT_AS")
def test_memory_is_bounded(tmp_path, cases):
    models.save(hostile.build.model(hostile.build.json_config()), tmp_path / "sound")
    paths = [str(tmp_path / "sound"), *(str(case.path) for case in cases.values())]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(cases)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tinyclip.load(tmp_path / "nowhere")
    (tmp_path / "tinyclip.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tinyclip.json needs one of model.safetensors"):
        tinyclip.load(tmp_path)
