"""Completion in a real shell, and the man pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from traincert.bridge.cli.main import cli

PROGRAMS = Path(sys.executable).parent
GROFF = shutil.which("groff")


def complete(line: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last word of a line. Whatever imports torch ends at once, and offers nothing."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    words = line.split(" ")
    script = f"""
        eval "$(traincert completion bash)"
        complete -p traincert > /dev/null || exit 9
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
        _traincert_completion traincert 2> /dev/null  # compopt works only after a real Tab
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(["/bin/bash", "--norc", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_that_are_loaded_when_used(tmp_path: Path) -> None:
    assert complete("traincert ", tmp_path) == cli.list_commands(click.Context(cli))
    assert complete("traincert ver", tmp_path) == ["verify"]
    assert complete("traincert network pa", tmp_path) == ["partition", "pause"]
    assert complete("traincert miner s", tmp_path) == ["show", "status"]
    assert complete("traincert verify --a", tmp_path) == ["--anew"]
    assert complete("traincert completion z", tmp_path) == ["zsh"]
    assert complete("traincert nothing ", tmp_path) == complete("traincert ", tmp_path)


@pytest.mark.parametrize(
    ("shell", "line"), [("zsh", "#compdef traincert"), ("fish", "function _traincert_completion;")]
)
def test_other_shells_get_their_script(shell: str, line: str) -> None:
    script = subprocess.check_output([PROGRAMS / "traincert", "completion", shell], text=True)
    assert script.startswith(line)
    assert f"_TRAINCERT_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True)


def test_an_unknown_shell_gets_one_line() -> None:
    done = subprocess.run([PROGRAMS / "traincert", "completion", "tcsh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "man"
    subprocess.run([sys.executable, "-m", "traincert.bridge.cli.man", folder], check=True)
    return folder


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """All commands, by their words."""
    yield name, command
    if isinstance(command, click.Group):
        for each in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), each)
            assert found
            yield from commands(found, f"{name} {each}")


def test_each_command_has_a_page_with_the_text_of_its_help(pages: Path) -> None:
    names = set()
    for words, command in commands(cli, "traincert"):
        name = words.replace(" ", "-")
        names.add(f"{name}.1")
        page = " ".join((pages / f"{name}.1").read_text().replace("\\-", "-").replace("\n.PP\n", "\n").split())
        for text in (command.help or "", command.epilog or ""):
            assert " ".join(text.split()) in page, words
        for option in command.params:
            if isinstance(option, click.Option) and option.help:
                assert " ".join(option.help.split()) in page
        if isinstance(command, click.Group):
            for each in command.list_commands(click.Context(command)):
                assert f"{words}-{each}(1)" in page
    assert {path.name for path in pages.iterdir()} == names


def test_each_command_takes_the_short_form_of_help() -> None:
    runner = CliRunner()
    for words, _ in commands(cli, "traincert"):
        short, long = (runner.invoke(cli, [*words.split()[1:], option]) for option in ("-h", "--help"))
        assert short.exit_code == 0, words
        assert short.output.startswith("Usage: ")
        assert short.output == long.output, words


def test_groff_has_nothing_to_say_of_the_pages(pages: Path) -> None:
    assert GROFF, "groff not found: install it (on Debian: apt-get install groff-base)"
    for page in pages.iterdir():
        done = subprocess.run([GROFF, "-man", "-ww", "-z", page], capture_output=True, text=True, check=True)
        assert done.stderr == "", page


READING = (
    "audit block chain coordinator/miners coordinator/status miner/show miner/status network/status receipt/show "
    "receipt/verify verify watch"
)


@pytest.mark.parametrize("name", READING.split())
def test_reading_commands_name_their_exit_code_and_have_json(name: str) -> None:
    command = dict(commands(cli, "traincert"))[f"traincert {name.replace('/', ' ')}"]
    assert any("--json" in option.opts for option in command.params)
    assert re.search(r"Exit code \d\b", command.help or "")
