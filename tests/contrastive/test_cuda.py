"""What of the CUDA engine needs no GPU: its kernels' source on the host, its bindings, its code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tinyclip
from tinyclip import _extension
from tinyclip.ops import _dispatch, _panels, _panels_cuda, _triton, contrastive
from tinyclip.ops._dispatch import Cannot, Slower, Spec

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = _extension.load()
HAS_CUDA = EXTENSION is not None and EXTENSION.build_info()["cuda"] is not None
needs_code = pytest.mark.skipif(not HAS_CUDA, reason="the extension holds no CUDA code")
ARCHITECTURES = EXTENSION.build_info()["architectures"] if HAS_CUDA else []


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """cuda_tiles.cpp, with the CPU engine that it is compared with."""
    compiler = next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    built = tmp_path_factory.mktemp("cuda") / "tiles"
    here = ROOT / "tests" / "contrastive"
    csrc = ROOT / "csrc"
    sources = [here / "cuda_tiles.cpp", csrc / "isa.cpp", *(csrc / "contrastive").glob("cpu*.cpp")]
    # Jumps between stacks are what the emulator is made of.
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        f"-I{ROOT / 'csrc'}",
        f"-I{here}",
    ]
    subprocess.run([compiler, *flags, *sources, "-o", built], check=True)
    return built


@pytest.mark.parametrize("words", [["quick"], pytest.param([], marks=pytest.mark.soak)])
def test_the_kernels_on_the_host(program, words):
    """Loads, swizzle, fragments, both epilogues and the merge, by mma.sync and by wgmma."""
    done = subprocess.run([program, *words], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


def test_the_device_is_restored(tmp_path):
    """To the context that was current, or to none, and no other device is initialized for it."""
    nvcc, source = shutil.which("nvcc"), ROOT / "tests" / "contrastive" / "device_guard.cpp"
    if nvcc is None:
        pytest.skip("there is no nvcc")
    command = [nvcc, "-std=c++17", "--cudart", "none", f"-I{ROOT / 'csrc'}", source]
    subprocess.run([*command, "-o", tmp_path / "guard"], check=True)
    done = subprocess.run([tmp_path / "guard"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_code
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_tensor_cores(arch):
    from bench import resources

    found = resources.extension_resources(arch)
    tiles = {name: taken for name, taken in found.items() if "merge" not in name}
    assert len(tiles) == 16, list(found)
    for name, taken in found.items():
        assert taken.spills == 0, (name, taken)
    for name, taken in tiles.items():
        wgmma = arch == "90a" and "Fp32" not in name
        assert ("HGMMA" if wgmma else "HMMA") in taken.tensor_core, (name, taken)
        assert taken.blocks_per_sm >= 1, (name, taken)


HEIGHT, WIDTH, D = 130, 70, 24
AT = 1 << 20  # addresses that nothing here reads


def good(kind: str) -> dict:
    """The arguments of a call that a GPU would run."""
    features = {"a": (AT, D, D), "b": (2 * AT, D, D)}
    shared = {
        **{"dtype": "bfloat16", "shape": (HEIGHT, WIDTH, 0), **features, "scale": 3 * AT},
        "teacher": ((4 * AT, D, D), (5 * AT, D, D), 6 * AT),
        **{"rows": (7 * AT, HEIGHT), "columns": (8 * AT, WIDTH), "launch": (0, 0)},
    }
    if kind == "stats":
        parts = {"row_parts": (9 * AT, HEIGHT), "column_parts": (10 * AT, WIDTH)}
        return {**shared, **parts, "positive": 11 * AT, "first": (True, True)}
    weights = {"row_weight": 9 * AT, "column_weight": 10 * AT}
    return {**shared, **weights, "alpha": 0.5, "ds": (11 * AT, 128), "dscale": 12 * AT}


BAD_FEATURES = (
    (0, D, D),
    (AT + 2, D, D),
    (AT, D - 8, D),
    (AT, D + 4, D),
    (AT, D, D - 4),
    (AT, -8, D),
    (AT, D, -8),
    (AT, 2**62, D),
    (AT, 2**58, D),
    (AT, D, 2**62),
    (2**64 - 1024, D, D),
)
BAD_STRIDED = ((0, 256), (AT + 1, 256), (AT, 1), (AT, -1), (AT, 2**61), (2**64 - 64, 256))
BAD = {
    "dtype": ("float64", "bf16", ""),
    "shape": (
        *((0, WIDTH, 0), (HEIGHT, 0, 0), (-1, WIDTH, 0), (2**62, WIDTH, 0), (2**40, 2**40, 0)),
        *((HEIGHT, WIDTH, 2**62), (HEIGHT, WIDTH, -(2**62))),
    ),
    "a": BAD_FEATURES,
    "b": (*BAD_FEATURES, (AT, D + 8, D + 8)),
    "scale": (0, AT + 2),
    "teacher": (
        *(((bad, (5 * AT, D, D), 6 * AT)) for bad in BAD_FEATURES),
        *(((4 * AT, D, D), bad, 6 * AT) for bad in BAD_FEATURES),
        *(((4 * AT, D, D), (5 * AT, D, D), bad) for bad in (0, 6 * AT + 1)),
    ),
    "rows": BAD_STRIDED,
    "columns": BAD_STRIDED,
    "row_parts": (*BAD_STRIDED, (7 * AT, HEIGHT), (AT, HEIGHT)),
    "column_parts": (*BAD_STRIDED, (8 * AT, WIDTH)),
    "positive": (0, 11 * AT + 1, 7 * AT),
    "first": (),
    "launch": ((-1, 0),),
    "row_weight": (0, 9 * AT + 2),
    "column_weight": (0, 10 * AT + 2),
    "alpha": (-0.1, 1.1, float("nan")),
    "ds": (
        *((0, 128), (11 * AT + 8, 128), (11 * AT, 72), (11 * AT, 132), (11 * AT, -128)),
        *((11 * AT, 2**61), (AT, 128), (2**64 - 8192, 128)),
        (AT - 255 * 128 * 2, 128),  # its last whole tile reaches into a
    ),
    "dscale": (0, 12 * AT + 2, 11 * AT),
}
NO_NUMBERS = (None, 1.5, "1", [1], object())


@needs_code
@pytest.mark.parametrize("kind", ["stats", "grads"])
def test_malformed_calls_are_refused(kind):
    call = getattr(EXTENSION, f"contrastive_cuda_{kind}")
    count = 0
    for name, usual in good(kind).items():
        for value in BAD[name]:
            with pytest.raises(ValueError, match=name.partition("_")[0]) as error:
                call(**{**good(kind), name: value})
            assert str(error.value).startswith(f"contrastive_cuda_{kind}: "), error.value
            count += 1
        for value in NO_NUMBERS:
            if (value is None and name == "teacher") or (name == "dtype" and value == "1"):
                continue
            if name == "alpha" and value == 1.5:
                continue
            with pytest.raises(TypeError):
                call(**{**good(kind), name: value})
            if isinstance(usual, tuple) and name != "teacher":
                with pytest.raises(TypeError):
                    call(**{**good(kind), name: (value, *usual[1:])})
            count += 1
    assert count > 90


@needs_code
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would read AT")
@pytest.mark.parametrize("kind", ["stats", "grads"])
def test_a_launch_that_fails_says_why(kind):
    with pytest.raises(RuntimeError, match=rf"contrastive_{kind}_kernel on cuda:0: .*CUDA"):
        getattr(EXTENSION, f"contrastive_cuda_{kind}")(**good(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_features_are_whole_chunks(dtype):
    """Padding adds zeros; odd strides and addresses are copied; the rest is passed on."""
    step = 16 // dtype.itemsize
    wide = torch.randn(9, 8 * step).to(dtype)
    skewed = torch.empty(9 * 8 * step + 1, dtype=dtype)[1:].view(9, 8 * step).copy_(wide)
    assert _panels_cuda.Kernels.features(wide) is wide
    assert _panels_cuda.Kernels.features(wide[:, : 4 * step]).data_ptr() == wide.data_ptr()
    layouts = (wide[:, :13], wide[:, step - 1 :], wide[:1].expand(9, -1), skewed, wide[:, :0])
    for x in (*layouts, wide.T.contiguous().T):
        found = _panels_cuda.Kernels.features(x)
        assert torch.equal(found[:, : x.shape[1]], x)
        assert not found[:, x.shape[1] :].any()
        assert found.shape[1] % step == found.stride(0) % step == found.data_ptr() % 16 == 0
        assert found.shape[1] < x.shape[1] + step <= found.stride(0) + step


def spec(**values) -> Spec:
    usual = {"op": "contrastive_loss", "device": "cuda", "capability": (9, 0), "flags": ()}
    usual |= {"dtype": torch.bfloat16, "needs_grad": True, "sizes": {"M": 4, "N": 4, "D": 4}}
    return Spec(**{**usual, **values})


def test_reasons(monkeypatch):
    for values, reason in (
        ({"device": "cpu", "capability": None}, "needs a CUDA device, the tensors are on cpu"),
        ({"capability": (7, 5)}, "needs compute capability 8.0"),
        ({"dtype": torch.float64}, "no fp64 kernels"),
        ({"has_fp64": True}, "no fp64 kernels, and a tensor of the call is fp64"),
    ):
        verdict = contrastive._cuda_why_not(spec(**values))
        assert isinstance(verdict, Cannot)
        assert reason in verdict.reason
    monkeypatch.setattr(contrastive, "_cuda_missing", lambda: "there is no NVIDIA driver")
    assert contrastive._cuda_why_not(spec()) == Cannot("there is no NVIDIA driver")
    monkeypatch.setattr(contrastive, "_cuda_missing", lambda: None)
    assert contrastive._cuda_why_not(spec()) is None
    assert isinstance(contrastive._cuda_why_not(spec(capability=(8, 0))), Slower)
    with tinyclip.backend("cuda"), pytest.raises(tinyclip.BackendUnavailable, match="on cpu"):
        tinyclip.ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0)


OPS = ("contrastive_loss", "contrastive_stats", "contrastive_grads")


@pytest.fixture
def explained(monkeypatch):
    """`explain(op)` without arguments on a GPU that is not there, its example in fake tensors."""

    def explain(op, capability, missing=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(_dispatch, "_capability", lambda index: capability)
        monkeypatch.setattr(contrastive, "_cuda_missing", lambda: missing)
        monkeypatch.setattr(_triton, "_INSTALLED", True)
        with FakeTensorMode():
            return tinyclip.explain(op)

    return explain


@pytest.mark.parametrize("op", OPS)
def test_auto_on_the_architecture_that_was_measured(op, explained):
    told = explained(op, (9, 0))
    assert told.backend == "cuda"
    assert told.rows[:2] == (("cuda", "runs", ""), ("triton", "able", "a backend above serves"))
    told = explained(op, (9, 0), "the extension holds no CUDA code: no nvcc")
    assert told.backend == "triton"
    assert told.rows[0] == ("cuda", "cannot", "the extension holds no CUDA code: no nvcc")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_on_any_other_architecture(op, capability, explained):
    """PyTorch's own until somebody measures; by name ours, and the reason says so."""
    told = explained(op, capability)
    assert told.backend == "torch"
    for backend, state, reason in told.rows[:2]:
        assert (backend, state) in (("cuda", "slower"), ("triton", "slower"))
        this = f"this device has {capability[0]}.{capability[1]}"
        for words in ("9.x (H100)", this, "asked for by name"):
            assert words in reason, (backend, words)
    for backend in ("cuda", "triton"):
        with tinyclip.backend(backend):
            assert explained(op, capability).backend == backend


@needs_code
def test_memory_is_what_is_promised():
    """Beside inputs and gradients: 0.3 GB at 32,768 and 4 GB at 1,048,576, at D = 512."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dt in (None, 512, 768):
            for most, m in ((0.3e9, 32_768), (4e9, 1 << 20)):
                found = _panels.workspace_bytes(m, m, 512, dt, dtype, _panels_cuda.Kernels)
                print(f"{dtype} teacher {dt} at {m}: {found / 1e9:.3f} GB")
                assert 1e7 < found <= most, (dtype, dt, m, found)


def test_a_logit_is_a_product_of_its_own():
    """Not half of an fma, which only a GPU's compiler would make of it: then s - m, at a positive
    that is the maximum, would be what rounding s took, and not 0."""
    tile = (ROOT / "csrc" / "contrastive" / "cuda_tile.h").read_text()
    assert tile.count("Machine::times(") == 4
    assert not re.search(r"scale \*|\* (t_)?scale", tile)
    machine = (ROOT / "csrc" / "contrastive" / "cuda_isa.h").read_text()
    assert "times(float x, float y) { return __fmul_rn(x, y); }" in machine


def test_a_device_is_named_in_the_sources():
    """Every launch of csrc goes through the one that sets the device and reads the error."""
    for path in (ROOT / "csrc").rglob("*.cu"):
        assert not re.search(r"<<<", path.read_text()), path
    launches = (ROOT / "csrc" / "contrastive" / "cuda_launch.h").read_text()
    assert launches.count("<<<") == 1
    assert "DeviceGuard" in launches.split("<<<")[0].split("std::string launch(")[1]
