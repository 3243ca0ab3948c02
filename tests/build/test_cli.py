"""The command line: help, version, exit status, the one-sentence error, and doctor."""

import re
import subprocess
import sys

import pytest

import tinyclip
from tinyclip import cli, env


def start(*words):
    command = [sys.executable, "-m", "tinyclip", *words]
    return subprocess.run(command, cwd="/", capture_output=True, text=True)


def test_version():
    done = start("--version")
    assert (done.returncode, done.stdout) == (0, f"tinyclip {tinyclip.__version__}\n")


@pytest.mark.parametrize("words", [(), ("operate",), ("doctor", "--fast")], ids=" ".join)
def test_wrong_call_is_status_2(words):
    done = start(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: tinyclip")


def test_doctor_names_every_operation():
    done = start("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("python", "torch", "triton", "numpy", "GPU", "tinyclip._C", "CUDA"):
        assert word in done.stdout
    for name in tinyclip.ops.OPS:
        assert re.search(rf"^{name}\b", done.stdout, re.MULTILINE), name


def test_doctor_shows_the_variables(monkeypatch):
    monkeypatch.setenv("TINYCLIP_SOMETHING", "on")
    assert ("TINYCLIP_SOMETHING", "on") in env._variables()


def test_doctor_repeats_why_there_is_no_extension(monkeypatch):
    monkeypatch.setattr(env._extension, "load", lambda: None)
    monkeypatch.setattr(env._extension, "why_not", lambda: "the compiler was on strike")
    assert "no: the compiler was on strike" in env.report()


def test_doctor_reports_an_operation_that_fails(monkeypatch):
    def explain(name):
        raise RuntimeError(f"{name} is unwell")

    monkeypatch.setitem(tinyclip.__dict__, "explain", explain)
    for name in tinyclip.ops.OPS:
        assert f"{name}\n  cannot be explained: {name} is unwell" in env.report()


def test_an_error_is_a_sentence_and_keeps_its_list(monkeypatch, capsys):
    def fail(args):
        raise ValueError("2 pictures are broken; the last 2: \n  a.jpg: cut\n\n  b.jpg: empty\n")

    monkeypatch.setattr(env, "run", fail)
    assert cli.main(["doctor"]) == 1
    said = "2 pictures are broken; the last 2:\n  a.jpg: cut\n  b.jpg: empty"
    expected = f"tinyclip doctor: {said}\n"
    assert capsys.readouterr().err == expected
    assert cli.main(["--traceback", "doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m tinyclip doctor | head -n 1"
    done = subprocess.run(command, shell=True, cwd="/", capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"tinyclip {tinyclip.__version__}\n", "")


def test_commands_have_their_functions():
    for command in cli.COMMANDS:
        module = cli.import_module(command.module)
        assert callable(module.add_arguments) and callable(module.run)
