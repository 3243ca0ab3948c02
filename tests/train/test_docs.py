"""docs/train.md is true: its commands and its Python run, and its tables name every flag."""

import argparse
import json
import re
import shlex
from pathlib import Path

from tinyclip import cli
from tinyclip.train import command, distill_command

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "train.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_what_it_shows_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("json")
    Path("teacher.json").write_text(config)
    Path("student.json").write_text(config.replace('"layers": 3', '"layers": 1'))
    first, resumed = blocks("bash")
    for line in (first + resumed).replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "tinyclip"
        quick = [] if words[0] == "eval" else ["--workers", "0", "--device", "cpu"]
        assert cli.main([*words, *quick]) == 0, capsys.readouterr().err
    (python,) = blocks("python")
    exec(compile(python, "docs/train.md", "exec"), {"__name__": "__main__"})
    row = json.loads(Path("logs/teacher/metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 40


def test_the_tables_name_every_flag():
    told = set(re.findall(r"--[a-z0-9-]+", TEXT))
    for module in (command, distill_command):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        flags = {flag for action in parser._actions for flag in action.option_strings}
        missing = {flag for flag in flags if flag.startswith("--")} - told - {"--help"}
        assert not missing
