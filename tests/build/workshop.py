"""Copies of the tree, machines that lack a tool, and environments to install into."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NVCC_NAMES = ("nvcc",)
CXX_NAMES = ("g++", "c++", "clang++")
_LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build_info.json", "__pycache__"
)


def run(command, *, cwd="/", env=None, check=True) -> subprocess.CompletedProcess:
    """Run a command, which with ``check`` must succeed, and keep what it printed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} gave {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def copy_tree(target: Path) -> Path:
    """The checkout without anything that was built in it."""
    return Path(shutil.copytree(ROOT, target, ignore=_LEFT_BEHIND))


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those that steer the build, and with ``changes``."""
    steering = ("CXX", "NVCC", "CUDA_HOME", "MAX_JOBS", "PYTHONPATH", "TRITON_INTERPRET")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in steering and not name.startswith("TINYCLIP_")
    }
    return {**kept, "MAX_JOBS": "2", **changes}


def path_without(folder: Path, *names: str) -> str:
    """A PATH with every program of today's, except those whose name is or ends in one of names."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            base = program.name.rsplit("-", 1)[0] if program.name[-1].isdigit() else program.name
            link = folder / program.name
            hidden = any(base == name or base.endswith(f"-{name}") for name in names)
            if not hidden and not link.is_symlink():
                link.symlink_to(program)
    assert not any(shutil.which(name, path=str(folder)) for name in names)
    return str(folder)


def program(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def build_wheel(tree: Path, env: dict[str, str], *, check=True, wrapper=()):
    """Build a wheel into ``tree/dist``, offline: with the build tools that are installed here."""
    command = [*wrapper, sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", tree / "dist", tree]
    return run(command, env=env, check=check)


def new_python(folder: Path) -> Path:
    """A fresh environment that can import this one's packages, but not its installed tinyclip.

    A folder named by a .pth file is put on the path, and the .pth files in it are not read: this is
    what leaves out the editable install through which the tests themselves import tinyclip.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    Path(site.stdout.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what, env=None) -> subprocess.CompletedProcess:
    """Install without dependencies and without asking any index."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-v", "--no-deps"]
    return run([*command, "--no-index", "--no-build-isolation", *what], env=env)
