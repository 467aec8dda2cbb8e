"""A real broker in a folder of its own, for tests."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from traincert.bridge.broker import Members, create_broker, server_command
from traincert.regtest import wait_for
from traincert.regtest.node import free_ports
from traincert.regtest.processes import kill, spawn

PATIENCE = 60  # seconds; on a busy machine all takes long


class BrokerProcess:
    """A broker, and its process. It may be stopped (SIGKILL) and started again, on the same port."""

    def __init__(self, folder: Path, hosts: Sequence[str], **options: Any) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        create_broker(folder, hosts, self.port, **options)
        self.members = Members(folder)
        self.process: psutil.Popen | None = None

    def start(self, command: list[str] | None = None) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = spawn(command or server_command(self.folder), keep=False, stderr=log)
        wait_for(self.listens, PATIENCE, "the broker to listen")

    def listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return False

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)
