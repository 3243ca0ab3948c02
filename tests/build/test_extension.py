"""What the package says where the extension, or its CUDA half, is missing or cannot run."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tinyclip import _extension


@pytest.fixture(autouse=True)
def forget():
    """Every answer is kept for the life of the process; a test starts and leaves without any."""
    kept = (_extension._load, _extension._cuda_status, _extension._probe)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """A machine with this extension: what its build and its driver say."""

    def pretend(cuda="13.0", driver=13000, runtime=13000, devices=1, error=None, probe=None):
        status = {"driver": driver, "runtime": runtime, "devices": devices, "error": error}
        module = SimpleNamespace(
            build_info=lambda: {"cuda": cuda, "architectures": ["80", "90a"]},
            cuda_status=lambda: status,
            cuda_probe=lambda device: probe,
        )
        monkeypatch.setattr(_extension, "import_module", lambda name: module)

    return pretend


def test_real_extension_is_whole():
    extension = _extension.load()
    if extension is None:
        pytest.skip(_extension.why_not())
    info = extension.build_info()
    assert set(info) == {"compiler", "cuda", "architectures", "openmp", "openmp_library"}
    assert (info["cuda"] is None) == (info["architectures"] == [])
    assert hasattr(extension, "cuda_status") == (info["cuda"] is not None)
    if info["cuda"]:
        assert set(extension.cuda_status()) == {"driver", "runtime", "devices", "error"}


def test_one_openmp_runtime():
    """Two would each keep a pool of threads, and fight over the processors."""
    code = (
        "from tinyclip import _extension\n"
        "extension = _extension.load()\n"
        "import torch\n"
        "maps = [line.split()[-1] for line in open('/proc/self/maps')]\n"
        "print(*{path for path in maps if 'libgomp' in path or 'libomp' in path})\n"
        "print(extension and extension.build_info()['openmp_library'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, ours = done.stdout.splitlines()
    if ours == "None":
        pytest.skip(_extension.why_not() or "the extension was built without OpenMP")
    assert loaded.split() == [ours]


def test_everything_runs(pretend):
    pretend()
    assert _extension.why_not() is None
    assert _extension.cuda_why_not() is None
    assert _extension.cuda_why_not(0) is None


@pytest.mark.parametrize(
    ("machine", "device", "sentence"),
    [
        ({"driver": 0}, None, "there is no NVIDIA driver"),
        ({"driver": 12040}, None, "the driver supports CUDA 12.4, the extension was built with"),
        ({"devices": 0}, None, "no CUDA device can be used: the driver lists none"),
        ({"error": "out of order"}, None, "no CUDA device can be used: out of order"),
        ({"probe": "no kernel image"}, 3, "built for 80, 90a, cannot run on cuda:3: no kernel"),
    ],
    ids=["no-driver", "old-driver", "no-device", "error", "no-code"],
)
def test_why_cuda_cannot_run(pretend, machine, device, sentence):
    pretend(**machine)
    assert sentence in _extension.cuda_why_not(device)


def test_older_driver_of_the_same_major_runs(pretend):
    pretend(driver=13000, runtime=13020)
    assert _extension.cuda_why_not() is None


def test_no_cuda_half_repeats_the_build(pretend, monkeypatch, tmp_path):
    pretend(cuda=None)
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    (tmp_path / "_build_info.json").write_text(json.dumps({"cuda_reason": "nvcc fell over"}))
    assert _extension.cuda_why_not() == "the extension holds no CUDA code: nvcc fell over"


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"reason": "g++ fell over"}, "the extension was not built: g++ fell over"),
        ({"extension": True}, "not for this Python"),
        (None, "install tinyclip with pip"),
        ("{half a fi", "install tinyclip with pip"),
    ],
    ids=["reason", "other-python", "no-record", "damaged"],
)
def test_absent_extension(monkeypatch, tmp_path, record, sentence):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(_extension, "import_module", absent)
    monkeypatch.setattr(_extension, "_PACKAGE", tmp_path)
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        (tmp_path / "_build_info.json").write_text(text)
    assert _extension.load() is None
    assert sentence in _extension.why_not()
    assert sentence in _extension.cuda_why_not()


def test_unloadable_extension(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    monkeypatch.setattr(_extension, "import_module", broken)
    assert "cannot be loaded" in _extension.why_not()
    assert "undefined symbol: _ZN3c105ErrorC2E" in _extension.why_not()
    _extension.require_installed()
