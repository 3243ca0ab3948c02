"""Imports run one way: cli -> train -> models -> nn -> ops -> kernels, and no arrow points back.

The arrows are those of the design. They are read from the source, also inside functions.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down; a unit may import any unit of a lower level. "tinyclip" is the package's own
# __init__.py, which looks everything else up lazily.
LEVELS = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"env"},
    {"tinyclip"},
    {"train", "eval"},
    {"data", "distill", "models", "integrations"},
    {"nn"},
    {"ops"},
    {"triton_kernels", "_extension"},
    {"_C"},
)
DEPTH = {unit: depth for depth, units in enumerate(LEVELS) for unit in units}
WITHIN_A_LEVEL = {("distill", "models"), ("integrations", "models")}
# Who may reach the machinery: the operations, and whoever reports on it.
BEHIND_OPS = {"triton_kernels", "_extension", "_C"}
MAY_LOOK_BEHIND = {
    "triton_kernels": {"ops", "env", "_extension"},  # the last only asks whether it is there
    "_extension": {"ops", "env", "tinyclip"},
    "_C": {"_extension"},
}
MODEL_LIBRARIES = {"transformers", "open_clip", "timm"}
NOT_INSTALLED = {"bench", "tests", "setup", "pytest"}
LOOKUPS = {"import_module", "find_spec", "__import__"}


def package_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every Python file that is installed."""
    for folder, prefix in (("tinyclip", ()), ("triton_kernels", ("tinyclip",))):
        for path in sorted((root / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            yield ".".join(parts), path


def imported_names(module: str, source: str) -> Iterator[str]:
    """Absolute dotted names that a module imports, or looks up by a name written out."""
    package = module.removesuffix(".__init__").split(".")
    package = package if module.endswith(".__init__") else package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in LOOKUPS and isinstance(node.args[0].value, str):
                yield node.args[0].value


def unit_of(name: str) -> str:
    """The folder or file directly below tinyclip, or tinyclip itself for what it looks up."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in DEPTH else "tinyclip"


def objection(importer: str, name: str) -> str | None:
    """What is wrong with a unit importing a name, or None."""
    top = name.split(".")[0]
    if top in NOT_INSTALLED:
        return "is never installed"
    if top in MODEL_LIBRARIES:
        return None if importer == "integrations" else "is named in integrations only"
    if importer == "triton_kernels" and top in ("numpy", "pybind11"):
        return "is no business of a kernel (torch and triton only)"
    if top == "triton_kernels":
        return "is Triton's own package; ours is tinyclip.triton_kernels"
    if top != "tinyclip":
        return None
    imported = unit_of(name)
    if imported == importer:
        return None
    if imported in BEHIND_OPS:
        allowed = importer in MAY_LOOK_BEHIND[imported]
        return None if allowed else f"is reached by {sorted(MAY_LOOK_BEHIND[imported])} only"
    if DEPTH[importer] < DEPTH[imported] or (importer, imported) in WITHIN_A_LEVEL:
        return None
    return "is not below it"


def violations(root: Path) -> list[str]:
    """Every arrow that the design does not draw, and every file that has no place in it."""
    found = []
    for module, path in package_files(root):
        where = path.relative_to(root)
        source = path.read_text()
        below = module.split(".")[1]
        importer = "tinyclip" if below == "__init__" else below
        if importer not in DEPTH:
            found.append(f"{where}: {importer} has no level; give it one here and in the design")
            continue
        for name in imported_names(module, source):
            if reason := objection(importer, name):
                found.append(f"{where}: {name} {reason}")
        if "TINYCLIP_BACKEND" in constants(source) and str(where) != "tinyclip/ops/_dispatch.py":
            found.append(f"{where}: only tinyclip/ops/_dispatch.py chooses a backend")
    for path in sorted((root / "csrc").rglob("*.*")):
        for header in re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()):
            where = path.relative_to(root)
            if re.match(r"(torch|ATen|c10)/", header):
                found.append(f"{where}: {header} (csrc knows nothing of torch)")
            if re.match(r"(pybind11/|Python\.h)", header) and "bindings" not in path.stem:
                found.append(f"{where}: {header} (only bindings*.cpp know Python)")
    return found


def constants(source: str) -> set[object]:
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}


def test_imports_follow_the_design():
    assert len(list(package_files(ROOT))) > 5
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tinyclip/ops/attention.py", "from tinyclip import nn"),
        ("tinyclip/ops/attention.py", "from ..nn import Block"),
        ("tinyclip/ops/attention.py", "import tinyclip.models.clip as clip"),
        ("tinyclip/ops/attention.py", "def f():\n    from tinyclip import backend"),
        ("tinyclip/ops/attention.py", "NAME = 'TINYCLIP_BACKEND'"),
        ("tinyclip/ops/attention.py", "from tinyclip import _C"),
        ("tinyclip/nn/mlp.py", "from tinyclip.triton_kernels import gelu_mlp"),
        ("tinyclip/nn/mlp.py", "from tinyclip._extension import load"),
        ("tinyclip/nn/mlp.py", "import transformers"),
        ("tinyclip/models/clip.py", "from tinyclip.distill import affinity"),
        ("tinyclip/models/clip.py", "from tinyclip.data import digits"),
        ("tinyclip/data/digits.py", "import importlib\nimportlib.import_module('open_clip')"),
        ("tinyclip/distill/stages.py", "from tinyclip import train"),
        ("tinyclip/train/loop.py", "from tinyclip.eval import zero_shot"),
        ("tinyclip/env.py", "from tinyclip import cli"),
        ("tinyclip/env.py", "import tests.ops"),
        ("tinyclip/cli.py", "from bench import timing"),
        ("tinyclip/novelty.py", "import math"),
        ("triton_kernels/attention_fwd.py", "from ..ops import reference"),
        ("triton_kernels/attention_fwd.py", "import numpy as np"),
        ("triton_kernels/attention_fwd.py", "from tinyclip import _C"),
        ("tinyclip/ops/_triton.py", "import triton_kernels"),
        ("csrc/contrastive/cpu.cpp", "#include <torch/extension.h>"),
        ("csrc/contrastive/cpu.cpp", "#include <pybind11/pybind11.h>"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    (found,) = violations(tmp_path)
    assert file in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("tinyclip/__init__.py", "from tinyclip._extension import require_installed"),
        ("tinyclip/ops/__init__.py", "from ._dispatch import backend\nfrom . import reference"),
        ("tinyclip/ops/_dispatch.py", "NAME = 'TINYCLIP_BACKEND'"),
        (
            "tinyclip/ops/_triton.py",
            "def f():\n    from tinyclip.triton_kernels import attention_fwd",
        ),
        (
            "tinyclip/distill/stages.py",
            "from tinyclip.models import clip\nfrom tinyclip import ops",
        ),
        ("tinyclip/integrations/hf.py", "import transformers\nfrom ..models import clip"),
        ("tinyclip/env.py", "import tinyclip\nfrom tinyclip import _extension, __version__"),
        ("tinyclip/cli.py", "from tinyclip.train import loop\nfrom tinyclip import eval"),
        ("triton_kernels/attention_bwd.py", "import torch, triton\nfrom .tuning import table"),
    ],
)
def test_an_arrow_of_the_design_is_allowed(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert violations(tmp_path) == []
