"""The images' check of health, without an image: it needs only a node's command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from traincert.regtest import wait_for
from traincert.regtest.node import free_ports

SCRIPT = Path(__file__).parents[2] / "docker/healthcheck"


@pytest.mark.parametrize("chain", ["-regtest", "-signet", "-testnet4", "-chain=signet"])
def test_the_node_of_each_chain_is_asked(chain: str, node_programs: Path, tmp_path: Path) -> None:
    options = ["-connect=0", "-listen=0", f"-rpcport={free_ports(1)[0]}", "-printtoconsole=0"]
    node = subprocess.Popen([node_programs / "bitcoind", f"-datadir={tmp_path}", chain, *options])
    script = SCRIPT.read_text().replace("/proc/1/", f"/proc/{node.pid}/")
    path = f"{node_programs}:{os.environ['PATH']}"
    said: list[str] = []

    def healthy() -> bool:
        command = ["/bin/sh", "-c", script]
        answer = subprocess.run(command, env={"PATH": path}, check=False, capture_output=True, text=True)
        said[:] = [answer.stdout, answer.stderr]
        return answer.returncode == 0

    try:
        wait_for(healthy, 60, "the node to be healthy", lambda: said)
        assert said[0] == "0\n"
    finally:
        node.terminate()
        node.wait()
