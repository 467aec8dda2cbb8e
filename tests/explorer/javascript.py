"""The explorer's rules in JavaScript, run by Node.js without a browser: twin.mjs answers questions to them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

STATIC = Path(__file__).parents[2] / "bridge/explorer/static"
SCRIPT = Path(__file__).with_name("twin.mjs")
LARGEST = 2**53
"""Integers below it are exact as a double, JavaScript's number."""


class JavaScript:
    """A process of Node.js, with copies of the files in `folder`. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        node = shutil.which("node")
        assert node is not None, "node not found: install Node.js 18 or newer (on Debian: apt-get install nodejs)"
        for name in ("check", "vendor"):
            shutil.copytree(STATIC / name, folder / name)
        shutil.copy(SCRIPT, folder)
        (folder / "package.json").write_text('{"type": "module"}')  # as a browser reads .js files
        self._process = subprocess.Popen(
            [node, folder / SCRIPT.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> JavaScript:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def ask(self, question: str, **details: Any) -> Any:
        """Return the answer to a question of twin.mjs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"question": question, **exact(details)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.communicate()[1]
        return json.loads(line)


def exact(value: Any) -> Any:
    """The value with integers that a double cannot hold as strings."""
    if isinstance(value, dict):
        return {name: exact(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [exact(each) for each in value]
    return str(value) if isinstance(value, int) and value >= LARGEST else value
