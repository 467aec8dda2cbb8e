"""Removes a killed Python process's containers from Docker. Docker itself would keep them.

    reaper.py LABEL

This program runs beside the process that started it. That process holds the other end of stdin and sends nothing. When
it ends, stdin ends too. Then this program removes the containers, their volumes and the networks that have LABEL.
"""

from __future__ import annotations

import sys

import docker


def _main(label: str) -> None:
    sys.stdin.read()
    client = docker.from_env()
    for container in client.containers.list(all=True, filters={"label": label}):
        container.remove(v=True, force=True)
    for network in client.networks.list(filters={"label": label}):
        network.remove()


if __name__ == "__main__":
    _main(sys.argv[1])
