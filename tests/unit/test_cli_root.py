"""The root of the command line: quick to show, and true to the commands behind it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sluicegate import cli
from tests.command_tree import COMMANDS


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_the_help_page_says_what_the_command_says(name: str) -> None:
    shown = cli.COMMANDS[name].help
    assert cli.find_command(name).help.startswith(shown.rstrip("."))


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_each_command_shows_an_example_of_itself(words: str) -> None:
    assert COMMANDS[words].epilog.startswith(f"Example: {words}")


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_each_option_is_explained(words: str) -> None:
    for parameter in COMMANDS[words].params:
        assert getattr(parameter, "help", None), parameter.name


def _run(script: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=dict(os.environ) | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_help_page_imports_no_library_of_the_fleet() -> None:
    said = _run(
        "import sys; from sluicegate.cli import run; run(['--help']);"
        "print({'sqlalchemy', 'celery', 'openai', 'anthropic'} & set(sys.modules))"
    )
    assert said.endswith("set()\n")
    assert all(name in said for name in cli.COMMANDS)


def test_completion_knows_commands_and_their_commands() -> None:
    script = "from sluicegate.cli import main; main()"

    def completed(words: str, position: int) -> list[str]:
        variables = {"_SLUICE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        return _run(script, **variables, COMP_CWORD=str(position)).split()

    assert completed("sluice jo", 1) == ["job"]
    assert completed("sluice job sh", 2) == ["show"]
