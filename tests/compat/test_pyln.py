"""pyln-testing, the library for tests with Core Lightning, loads exported blocks into a fresh node, as the docs say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from compat.made_chain import append
from traincert.regtest import Node
from training_chain import TrainingChain

START = 3
LENGTH = 12
PAGE = Path(__file__).parents[2] / "docs/commands.md"


@pytest.fixture(scope="module")
def pyln(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the pinned pyln-testing, in an environment of its own: it brings another coincurve than ours."""
    venv = tmp_path_factory.mktemp("pyln") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(venv / "bin/python")]
    install = ["install", "--no-deps", "--requirement", str(Path(__file__).with_name("pyln.lock"))]
    installed = subprocess.run([*pip, *install], capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return venv / "bin/python"


def test_pyln_loads_the_exported_blocks(pyln: Path, node_programs: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(
        PAGE.read_text().partition("`traincert node path`. So:\n\n")[2].partition("\n\nThe fixture")[0]
    )
    chain = TrainingChain(start_height=START)
    with Node(node_programs / "bitcoind", tmp_path / "demo/node0", chain.params.node_options()) as node:
        node.rpc("generatetoaddress", START - 1, "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202")
        while node.rpc("getblockcount") < LENGTH:
            append(chain, node)
        export = [str(Path(sys.executable).with_name("traincert")), "export-blocks", "--datadir", "demo/node0"]
        subprocess.run([*export, "--out", "blocks.json"], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
        tip = node.rpc("getbestblockhash")

    # What pyln's own code saves, Core Lightning writes with json.dump.
    code = code.replace(
        "bitcoind.stop()", "Path('saved').write_text(json.dumps(bitcoind.save_blocks()))\nbitcoind.stop()"
    )
    path = f"{node_programs}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [pyln, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, error = process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the node, too, if the code has failed
    assert (process.returncode, printed) == (0, f"{tip}\n"), error
    assert (tmp_path / "saved").read_text() == (tmp_path / "blocks.json").read_text()
    assert len(json.loads((tmp_path / "saved").read_text())) == LENGTH
