"""What the programs of a network say: lines for people on stderr, or lines of JSON for programs on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from traincert.bridge.status import write_status


class Events:
    """A view that says each event in a line. With `as_json` each line is an object with the key `event`."""

    def __init__(self, *, as_json: bool, folder: Path | None = None) -> None:
        """Events of the program in `folder`, whose status.json has the last one."""
        self._as_json = as_json
        self._folder = folder

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Say an event: its name and facts for programs, a sentence for people."""
        if self._folder:
            write_status(self._folder, {"event": event, "text": text, **facts})
        if self._as_json:
            click.echo(json.dumps({"event": event, "time": round(time.time(), 3), "text": text, **facts}))
        else:
            click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


class CoordinatorEvents(Events):
    """The same, as a coordinator's view."""

    def step(self, text: str) -> None:
        """Say which step begins."""
        self.say("step", text)

    def update(self, done: int, total: int) -> None:
        """Say how many of the cycle's tasks have a commit."""
        self.say("commits", f"{done} of {total} commits", done=done, total=total)

    def absent(self, height: int, winner: str, reason: str) -> None:
        """Say that a winner's block did not come within its round."""
        text = f"block {height}: {winner} is absent, drawing again ({reason})"
        self.say("absent", text, height=height, winner=winner, reason=reason)

    def closed(self, cycle: Mapping[str, Any]) -> None:
        """Say that the chain has a cycle's block."""
        from traincert.bridge.cli.view import updates_text  # imports rich, which members do not need

        updates = updates_text(cycle["tasks"], cycle["refusals"])
        self.say(
            "closed", f"block {cycle['height']} by {cycle['winner']}: updates {updates}, {cycle['block']}", **cycle
        )
