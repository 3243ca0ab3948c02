"""Every way onto a machine: with each tool there, missing or broken, and with no network."""

import json
import os
import shutil
import subprocess
import sysconfig
import zipfile

import pytest

from tests.build.workshop import (
    CXX_NAMES,
    NVCC_NAMES,
    build_wheel,
    copy_tree,
    environment,
    install,
    new_python,
    path_without,
    program,
    run,
)

pytestmark = pytest.mark.soak

needs_cxx = pytest.mark.skipif(
    not any(map(shutil.which, CXX_NAMES)), reason="there is no C++ compiler here"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")

# What an installed package says of itself, and whether it computes.
LOOK = """
import json, torch, tinyclip
from tinyclip import _extension
x = torch.tensor([[1.0, 3.0]], requires_grad=True)
y = tinyclip.ops.layer_norm(x, None, None)
y[0, 1].backward()
assert torch.allclose(y, torch.tensor([[-1.0, 1.0]]), atol=1e-4), y
assert x.grad is not None
import tinyclip.triton_kernels as kernels
extension = _extension.load()
print(json.dumps({
    "package": tinyclip.__file__,
    "kernels": kernels.__file__,
    "record": _extension.build_record(),
    "why_not": _extension.why_not(),
    "cuda_why_not": _extension.cuda_why_not(),
    "info": extension and extension.build_info(),
}))
"""


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree")


@pytest.fixture
def python(tmp_path):
    return new_python(tmp_path / "venv")


def look(python, cwd="/"):
    return json.loads(run([python, "-c", LOOK], cwd=cwd, env=environment()).stdout)


def doctor(python):
    return run([python, "-m", "tinyclip", "doctor"], env=environment()).stdout


def install_wheel(tree, python, env, **options):
    log = build_wheel(tree, env, **options)
    (wheel,) = (tree / "dist").glob("*.whl")
    install(python, wheel)
    return log.stdout + log.stderr


@needs_cxx
@needs_nvcc
def test_nvcc_and_compiler(tree, python):
    install_wheel(tree, python, environment(TINYCLIP_CUDA="1"))
    seen = look(python)
    assert seen["package"].startswith(str(python.parents[1]))
    assert seen["why_not"] is None
    assert seen["record"]["cuda"] == seen["info"]["cuda"]
    assert {"80", "90a"} <= set(seen["info"]["architectures"])
    assert seen["info"]["openmp"]
    if shutil.which("nvidia-smi") is None:
        assert seen["cuda_why_not"] == "there is no NVIDIA driver"


@needs_cxx
@needs_nvcc
def test_chosen_architectures(tree, python):
    install_wheel(tree, python, environment(TINYCLIP_CUDA="1", TINYCLIP_CUDA_ARCHS="90a; 89+PTX"))
    assert look(python)["info"]["architectures"] == ["90a", "89+PTX"]


@needs_cxx
def test_a_wheel_leaves_the_checkouts_own_module_alone(tree):
    own = tree / "tinyclip" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    own.write_bytes(b"in use")
    build_wheel(tree, environment(TINYCLIP_CUDA="0"))
    assert own.read_bytes() == b"in use"
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        (module,) = (name for name in built.namelist() if name.startswith("tinyclip/_C"))
        assert len(built.read(module)) > 10_000


@needs_cxx
def test_no_nvcc(tree, python, tmp_path):
    path = path_without(tmp_path / "bin", *NVCC_NAMES)
    install_wheel(tree, python, environment(PATH=path, CUDA_HOME=""))
    seen = look(python)
    assert seen["why_not"] is None and seen["info"]["cuda"] is None
    assert "nvcc was not found" in seen["cuda_why_not"]
    assert "nvcc was not found" in doctor(python)


def test_no_compiler(tree, python, tmp_path):
    path = path_without(tmp_path / "bin", *CXX_NAMES)
    log = install_wheel(tree, python, environment(PATH=path))
    assert log.count("warning: tinyclip is installed without its extension") == 1
    seen = look(python)
    assert seen["info"] is None and seen["record"]["extension"] is False
    assert "no C++ compiler was found" in seen["why_not"]
    assert "no C++ compiler was found" in doctor(python)


@needs_cxx
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "exited with status 1: it printed nothing"),
        ("echo 'nvcc fatal   : no licence' >&2; exit 3", "status 3: nvcc fatal   : no licence"),
        ('[ "$1" = --version ] && echo "release 13.0" || exit 7', ".cu.o"),
        ("echo release 11.8", "nvcc is 11.8, 12.0 is the oldest"),
    ],
    ids=["silent", "message", "compiling", "old"],
)
def test_failing_nvcc(tree, python, tmp_path, script, reason):
    nvcc = program(tmp_path / "nvcc", script)
    log = install_wheel(tree, python, environment(NVCC=str(nvcc)))
    assert log.count("warning: tinyclip is installed without CUDA code") == 1
    seen = look(python)
    assert seen["why_not"] is None and seen["info"]["cuda"] is None
    assert reason in seen["cuda_why_not"]
    assert reason in doctor(python)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"TINYCLIP_CUDA": "1", "NVCC": "false"}, "no CUDA code can be built: false exited"),
        ({"TINYCLIP_CUDA": "1", "NVCC": "/nowhere/nvcc"}, "NVCC=/nowhere/nvcc was not found"),
        ({"TINYCLIP_CUDA": "1", "CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere has no bin/nvcc"),
        ({"TINYCLIP_CUDA": "1", "CXX": "/nowhere/g++"}, "CXX=/nowhere/g++ was not found"),
        ({"TINYCLIP_CUDA": "yes"}, "TINYCLIP_CUDA is 'yes'; it must be auto, 0 or 1"),
        ({"TINYCLIP_CUDA_ARCHS": "80;hopper"}, "TINYCLIP_CUDA_ARCHS has 'hopper'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many'"),
    ],
    ids=["nvcc-fails", "no-nvcc", "no-toolkit", "no-compiler", "mode", "architectures", "jobs"],
)
def test_what_must_fail_fails(tree, variables, sentence):
    done = build_wheel(tree, environment(**variables), check=False)
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr


@needs_cxx
def test_no_network(tree, python):
    """Where the kernel allows it the build runs with no network at all, else with dead proxies."""
    cut = ("unshare", "-rn")
    can_cut = shutil.which("unshare") and subprocess.run([*cut, "true"]).returncode == 0
    dead = "http://127.0.0.1:9"
    env = environment(http_proxy=dead, https_proxy=dead, all_proxy=dead, PIP_NO_INDEX="1")
    install_wheel(tree, python, env, wrapper=cut if can_cut else ())
    assert look(python)["why_not"] is None


@needs_cxx
def test_without_ninja(tree, python, tmp_path):
    """One file after another, from a folder whose name needs quoting."""
    odd = tree.rename(tmp_path / "a tree $x")
    broken = program(tmp_path / "ninja", "exit 1")
    blocked = tmp_path / "blocked" / "ninja.py"
    blocked.parent.mkdir()
    blocked.write_text("raise SystemExit(1)")
    path = os.pathsep.join([str(broken.parent), os.environ["PATH"]])
    env = environment(PATH=path, PYTHONPATH=str(blocked.parent), TINYCLIP_CUDA="0")
    log = install_wheel(odd, python, env)
    assert "-c csrc/bindings.cpp" in log
    assert not list(odd.glob("build/csrc-*/build.ninja"))
    assert look(python)["why_not"] is None


def test_plain_install_behind_the_checkout(tree, python):
    install_wheel(tree, python, environment(TINYCLIP_CUDA="0"))
    done = run([python, "-c", "import tinyclip"], cwd=tree, env=environment(), check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: tinyclip was imported from the source checkout {tree}")
    assert "pip install -e ." in last
    script = python.parent / "tinyclip"
    assert "layer_norm" in run([script, "doctor"], cwd=tree, env=environment()).stdout
    assert look(python)["kernels"].startswith(str(python.parents[1]))


@needs_cxx
def test_editable_install_is_incremental(tree, python):
    env = environment()
    install(python, "-e", tree, env=env)
    for cwd in ("/", tree):
        seen = look(python, cwd)
        assert seen["package"] == str(tree / "tinyclip" / "__init__.py")
        assert seen["kernels"] == str(tree / "triton_kernels" / "__init__.py")
        assert seen["why_not"] is None

    def compiled_by(touched):
        before = {path: path.stat().st_mtime_ns for path in tree.glob("build/csrc-*/**/*.o")}
        os.utime(tree / "csrc" / touched)
        install(python, "-e", tree, env=env)
        return {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}

    assert compiled_by("bindings.cpp") == {"bindings.cpp.o"}
    if seen["info"]["cuda"]:
        assert compiled_by("device.cu") == {"device.cu.o"}
        assert compiled_by("device.h") == {"device.cu.o", "bindings.cpp.o"}


@needs_cxx
def test_a_build_that_fails_leaves_no_old_module(tree, python):
    install(python, "-e", tree, env=environment(TINYCLIP_CUDA="0"))
    assert look(python)["why_not"] is None
    (tree / "csrc" / "bindings.cpp").write_text("#error broken on purpose\n")
    install(python, "-e", tree, env=environment(TINYCLIP_CUDA="0"))
    assert "broken on purpose" in look(python)["why_not"]
    assert not list(tree.glob("tinyclip/_C*.so"))
