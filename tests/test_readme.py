"""What the README shows works as it is shown: every command is known, those that need no device run, the test passes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stagewright.cli.main import COMMANDS, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMAND_LINES = [
    line.removeprefix("$ ")
    for language, text in BLOCKS
    if language == "console"
    for line in text.splitlines()
    if line.startswith("$ ")
]
QUICK = ("plan", "simulate", "schedule", "systems")


def test_the_two_commands_come_first_and_the_makefile_has_them():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    first = [line.split("#")[0].split() for line in COMMAND_LINES[:2]]
    assert first == [["make", "demo"], ["make", "test"]]
    assert {"demo", "test"} <= set(targets)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("stagewright")])
def test_every_command_of_the_readme_is_known_with_its_options(line, capsys):
    words = shlex.split(line.rstrip("&"))
    assert words[1] in COMMANDS
    assert run([words[1], "--help"]) == 0
    page = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert option in page, option


def test_the_commands_that_need_no_device_run_in_the_order_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = [shlex.split(line)[1:] for line in COMMAND_LINES if line.split()[1:2] and line.split()[1] in QUICK]
    assert [words[0] for words in ran] == ["plan", "simulate", "schedule", "systems"]
    for words in ran:
        assert run(words) == 0, words
    assert capsys.readouterr().out


def test_the_readmes_pytest_example_passes_as_it_stands(tmp_path):
    (block,) = [text for language, text in BLOCKS if language == "python"]
    (tmp_path / "test_example.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:]
