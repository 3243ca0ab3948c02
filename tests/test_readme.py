"""The documents are true: their Python runs, the commands and files that they name exist."""

import re
import shlex
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path

import pytest

import tinyclip
from tinyclip import cli

ROOT = Path(__file__).resolve().parents[1]
README, OPS, CONTRIBUTING = (
    ROOT / name for name in ("README.md", "docs/ops.md", "CONTRIBUTING.md")
)
DOCUMENTS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """First line number and text of each fenced block of the language."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


EXAMPLES = [(path, *block) for path in (README, OPS) for block in blocks(path, "python")]


@pytest.mark.parametrize(
    ("path", "line", "code"), EXAMPLES, ids=[f"{path.name}:{line}" for path, line, _ in EXAMPLES]
)
def test_python_runs(path, line, code):
    for library in re.findall(r"^import (open_clip|timm|transformers)$", code, re.MULTILINE):
        pytest.importorskip(library)
    # The blank lines make a traceback name the line of the document.
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), {"__name__": "__main__"})


def test_there_is_python_to_run():
    assert {of for of, *_ in EXAMPLES} >= {README, OPS}


def commands(path: Path) -> list[str]:
    """Lines of the shell blocks, without comments, and commands within sentences."""
    lines = [line for _, text in blocks(path, "bash") for line in text.splitlines()]
    spans = re.findall(r"`((?:make|tinyclip|python -m|pip) [^`]*)`", path.read_text())
    return [words for line in lines + spans if (words := line.partition("#")[0].strip())]


def exists(command: str) -> bool:
    """Whether what the command names is there; it is not run."""
    match shlex.split(command):
        case ["make", *targets]:
            return {word for word in targets if "=" not in word} <= MAKE_TARGETS
        case ["tinyclip", name, *_]:
            return name in {command.name for command in cli.COMMANDS}
        case ["torchrun", "--nproc-per-node", _, "-m", "tinyclip", *words]:
            return exists(shlex.join(["tinyclip", *words]))
        case ["python", "-m", module, *_]:
            return import_module(f"{module}.__main__") is not None
        case ["pip", "install", *words]:
            extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
            known = metadata("tinyclip").get_all("Provides-Extra")
            return {extra for group in extras for extra in group.split(",")} <= set(known)
    return False


@pytest.mark.parametrize("path", [README, CONTRIBUTING, OPS], ids=lambda path: path.name)
def test_commands_exist(path):
    named = commands(path)
    assert named
    assert [command for command in named if not exists(command)] == []


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "tinyclip docter",
        "torchrun --nproc-per-node 8 -m tinyclip trian",
        "pip install '.[gpu]'",
        "rm -rf build",
    ],
)
def test_a_command_that_is_not_there_is_found(command):
    assert not exists(command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", [README, CONTRIBUTING], ids=lambda path: path.name)
def test_folders_and_files_exist(path):
    """Every path in code quotes that starts at the root, but for those with a <placeholder>."""
    folders = "|".join(p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != ".")
    named = re.findall(rf"`((?:{folders})/[\w/.]*)`", path.read_text())
    assert named
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_every_op_has_its_section_and_its_backends():
    """docs/ops.md promises no backend that an op does not have, and their order is right."""
    text = OPS.read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", text, re.MULTILINE))
    assert set(table) == set(tinyclip.ops.OPS)
    sections = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    for op, promised in table.items():
        assert re.search(rf"\b{op}\b", sections)
        rows = [name for name, _, _ in tinyclip.explain(op).rows]
        assert rows == re.findall(r"\w+", promised)
