"""`traincert node`, and the example of a workflow that uses it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from traincert.regtest import NodeKind, node_folder

TRAINCERT = Path(sys.executable).with_name("traincert")
WORKFLOW = Path(__file__).parents[3] / "examples/outside-project/.github/workflows/test.yml"


@pytest.mark.parametrize("options", [[], ["--stock"], ["--base", "28"]])
def test_key_is_the_builds_own(options: list[str]) -> None:
    key = subprocess.check_output([TRAINCERT, "node", "key", *options], text=True)
    base = "28" if "28" in options else None
    assert key == node_folder(NodeKind(base=base, stock="--stock" in options)).name + "\n"


def test_commands_of_the_example_workflow_are_ours() -> None:
    commands = re.findall(r"traincert ([a-z]+ [a-z]+)", WORKFLOW.read_text())
    assert commands == ["node key", "node build"]
    for command in commands:
        subprocess.run([TRAINCERT, *command.split(), "--help"], check=True, stdout=subprocess.DEVNULL)
