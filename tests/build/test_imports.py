"""What importing and starting the package costs, and that it works where something is missing."""

import ast
import subprocess
import sys
import time

import pytest

from tests.build.workshop import ROOT

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
COMPUTE = """
import torch, tinyclip
x = torch.tensor([[1.0, 3.0]], requires_grad=True)
y = tinyclip.ops.layer_norm(x, None, None)
y[0, 1].backward()
assert torch.allclose(y, torch.tensor([[-1.0, 1.0]]), atol=1e-4), y
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    heavy = "torch", "triton", "numpy", "tinyclip._C"
    out = python(f"import sys, tinyclip; print([m for m in {heavy} if m in sys.modules])")
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    "blocked",
    [
        ("triton",),
        ("tinyclip._C",),
        ("triton", "tinyclip._C"),
        ("pybind11", "transformers", "timm"),
    ],
    ids="+".join,
)
def test_computes_without(blocked):
    missing = "tinyclip._C" in blocked
    python(
        f"BLOCKED = {blocked}\n{BLOCK}\n{COMPUTE}\n"
        "from tinyclip import _extension\n"
        f"assert not {missing} or (_extension.load() is None and _extension.why_not())\n"
        "for name in tinyclip.ops.OPS: assert str(tinyclip.explain(name))\n"
    )


def test_help_is_quick_and_imports_no_torch():
    start = time.perf_counter()
    out = python("import sys; sys.argv = ['tinyclip', '--help']\nfrom tinyclip.cli import main\n"
                 "try: main()\nexcept SystemExit: print('torch' in sys.modules)")  # fmt: skip
    took = time.perf_counter() - start
    assert out.strip().endswith("False") and "doctor" in out
    assert took < 1.0, f"tinyclip --help took {took:.2f} s"


def test_setup_imports_only_what_every_build_has():
    allowed = {"setuptools", "pybind11", *sys.stdlib_module_names}
    barred = {"socket", "ssl", "urllib", "http", "ftplib"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert "setuptools" in found
    assert found <= allowed - barred
