"""Seeded bugs: a copy of the tree, one wrong line in it, and tests that must notice.

A mutant names the exact text that it replaces, which must occur once: one whose text has gone is a
failure, so that the list keeps up with the code. csrc is compiled again where a mutant changes it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache"
)
_BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
_WHERE = (
    "import tinyclip, tinyclip.triton_kernels as t; print(tinyclip.__file__); print(*t.__path__)"
)


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; of `tests`, pytest's arguments, some test must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Laboratory:
    """A built copy of the tree in which mutants are tried, one after another."""

    def __init__(self, folder: Path, *, cuda: bool = False):
        self.tree = Path(shutil.copytree(ROOT, folder / "tree", ignore=_LEFT_BEHIND))
        # The editable install maps this name to the original; here it must be the copy's own.
        (self.tree / "tinyclip" / "triton_kernels").symlink_to(self.tree / "triton_kernels")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = {**kept, "TINYCLIP_CUDA": "auto" if cuda else "0"}
        self._run(*_BUILD)
        where = self._run(sys.executable, "-c", _WHERE).stdout.split()
        assert all(Path(place).is_relative_to(self.tree) for place in where), where

    def _run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, cwd=self.tree, env=self.environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def passes(self, *tests: str) -> bool:
        """Whether the tests pass in the copy as it is. No tests at all is an error; a process that
        dies of a signal has noticed something, too."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:randomly", *tests]
        done = self._run(*command, check=False)
        judged = done.returncode in (0, 1) or done.returncode < 0
        assert judged, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.returncode == 0

    def survives(self, mutant: Mutant) -> bool:
        """Whether no test noticed the mutant, which is what must not be."""
        path = self.tree / mutant.file
        original = path.read_text()
        count = original.count(mutant.old)
        assert count == 1, f"{mutant.name}: {mutant.file} holds its text {count} times, not once"
        compiled = mutant.file.startswith("csrc/")
        path.write_text(original.replace(mutant.old, mutant.new))
        try:
            if compiled:
                self._run(*_BUILD)
            return self.passes(*mutant.tests)
        finally:
            path.write_text(original)
            if compiled:
                self._run(*_BUILD)
