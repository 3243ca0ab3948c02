"""``tinyclip doctor``: what is installed, and which backend would run each operation, and why."""

import argparse
import os
import platform
import shutil
import subprocess
from importlib import metadata

import tinyclip
from tinyclip import _extension

PACKAGES = ("torch", "triton", "numpy")
EXTRAS = ("transformers", "open_clip_torch", "timm", "safetensors", "pillow")
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``tinyclip doctor`` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    print(report())
    return 0


def report() -> str:
    """The machine, the packages, the extension and the table of backends of every operation."""
    sections = {
        "machine": _machine(),
        "packages": [*map(_package, PACKAGES), *filter(_installed, map(_package, EXTRAS))],
        "extension": _extension_lines(),
        "variables": _variables(),
    }
    lines = [f"tinyclip {tinyclip.__version__}"]
    for title, rows in sections.items():
        lines += ["", title]
        lines += [f"  {name:<16}{value}" for name, value in rows]
    for name in tinyclip.ops.OPS:
        lines += ["", _backends(name)]
    return "\n".join(lines)


def _backends(name: str) -> str:
    """The table, or what stands in its way: a report is read when something is wrong."""
    try:
        return str(tinyclip.explain(name))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return f"{name}\n  cannot be explained: {error}"


def _machine() -> list[tuple[str, str]]:
    import torch

    rows = [
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if not torch.cuda.is_available():
        built = f"torch is built with CUDA {torch.version.cuda}" if torch.version.cuda else None
        return [
            *rows,
            ("GPU", f"none that torch can use ({built or 'torch is built without CUDA'})"),
        ]
    rows.append(("CUDA", f"{torch.version.cuda} in torch, driver {_driver()}"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        what = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        rows.append((f"GPU {index}", what))
    return rows


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.split("\n")[0].strip()


def _package(name: str) -> tuple[str, str]:
    try:
        return name, metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, "not installed"


def _installed(row: tuple[str, str]) -> bool:
    return row[1] != "not installed"


def _extension_lines() -> list[tuple[str, str]]:
    extension = _extension.load()
    if extension is None:
        return [("tinyclip._C", f"no: {_extension.why_not()}")]
    info = extension.build_info()
    threads = f"OpenMP ({info['openmp_library']})" if info["openmp"] else "one thread, no OpenMP"
    rows = [("tinyclip._C", f"yes: {info['compiler']}, {threads}")]
    if info["cuda"] is not None:
        rows.append(("CUDA code", f"{info['cuda']}, for {', '.join(info['architectures'])}"))
    reason = _extension.cuda_why_not()
    return [*rows, ("CUDA runs", "yes" if reason is None else f"no: {reason}")]


def _variables() -> list[tuple[str, str]]:
    shown = [name for name in os.environ if name.startswith("TINYCLIP_") or name in VARIABLES]
    return [(name, os.environ[name]) for name in sorted(shown)] or [("(none set)", "")]
