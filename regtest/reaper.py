"""A program: waits for the end of its input, which comes when its parent ends, and removes what is left in Docker.

    reaper.py LABEL

removes the containers with their volumes, and then the networks, that have a label.
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
