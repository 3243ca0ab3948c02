"""The GPU tier: what is worth most runs first, and a device that is lost costs one test."""

import os

import pytest
import torch

import tinyclip

# A smoke test a kernel, then the rule, then what a device alone can show, then the slow ones.
_ORDER = ("test_smoke", "test_rule", "test_contrastive", "test_ops", "test_mlp", "test_sizes")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pytest_collection_modifyitems(items):
    def key(item) -> tuple[bool, bool, int, int]:
        stem = item.path.stem
        dtype = getattr(item, "callspec", None) and item.callspec.params.get("dtype")
        slow = "compiled" in item.name  # Inductor's compiler beside ours
        theirs = "torch" in item.name.replace("torch.", "")  # PyTorch's own kernels
        file = _ORDER.index(stem) if stem in _ORDER else len(_ORDER)
        # bf16 is what models train in: it comes before the other dtypes of a file
        return slow, theirs, file, _DTYPES.index(dtype) if dtype in _DTYPES else 0

    here = [i for i, item in enumerate(items) if item.get_closest_marker("gpu")]
    for i, item in zip(here, sorted((items[i] for i in here), key=key), strict=True):
        items[i] = item


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products in fp32, the yardsticks' as well; random numbers from one seed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _engine(request):
    """Where the extension was built without CUDA code, its tests are not run, and say why."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if parameters.get("backend") == "cuda" or "two_engines" in request.node.name:
        rows = tinyclip.explain("contrastive_loss").rows
        if refused := [row[2] for row in rows if row[:2] == ("cuda", "cannot")]:
            pytest.skip(refused[0])


@pytest.fixture(autouse=True)
def _device():
    """After an illegal access every later call of the process fails: better none is made."""
    yield
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another worker takes over
        pytest.exit(f"the device is lost: {error}", returncode=3)
