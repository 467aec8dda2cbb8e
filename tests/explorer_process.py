"""The explorer as a process, as `traincert explorer` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

TRAINCERT = str(Path(sys.executable).parent / "traincert")


class Event(NamedTuple):
    """A server-sent event."""

    number: int
    kind: str
    data: Any


class Explorer:
    """A running explorer. Use it as a context manager."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [TRAINCERT, "explorer", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("explorer: http://127.0.0.1:"), self.process.communicate()
        self.url = line.split()[1]
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.client.close()
        self.process.terminate()
        _, errors = self.process.communicate(timeout=30)
        assert "Traceback" not in errors, errors

    def get(self, path: str) -> Any:
        """The JSON of a page of the API."""
        answer = self.client.get(f"/api/{path}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, path: str) -> str:
        """Why there is no such thing, as the API says it."""
        answer = self.client.get(f"/api/{path}")
        assert answer.status_code in (400, 404), answer.text
        error: str = answer.json()["error"]
        assert error.isprintable()
        return error

    def events(self, since: int | None = None) -> Iterator[Event]:
        """What the explorer tells, after an event, or from now on."""
        headers = {} if since is None else {"Last-Event-ID": str(since)}
        with self.client.stream("GET", "/api/changes", headers=headers) as answer:
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "event" in fields:
                    yield Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))
                    fields = {}
