"""docs/eval.md is true: its Python runs, its flags and its JSON are the command's."""

import argparse
import json
import re
from pathlib import Path

from tinyclip.eval import command

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "eval.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) == 3
    space = {"__name__": "__main__"}
    for block in found:
        exec(compile(block, "docs/eval.md", "exec"), space)


def test_commands_and_flags_are_real():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (lines,) = blocks("bash")
    for line in lines.strip().splitlines():
        tool, name, *arguments = line.split()
        assert (tool, name) == ("tinyclip", "eval")
        parser.parse_args(arguments)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)`", TEXT)) <= flags


def test_the_json_has_the_written_fields():
    (text,) = blocks("json")
    fields = set(json.loads(text))
    source = Path(command.__file__).read_text()
    assert fields == set(re.findall(r'^        "(\w+)": ', source, re.MULTILINE))
