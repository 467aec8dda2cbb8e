"""pytest fixtures with real nodes, for this project's tests and for other projects'.

A failing test's report carries the last log lines of the nodes that it used. Override a fixture to use other programs
or options.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from traincert.regtest.build import NodeKind, build_node
from traincert.regtest.network import Network
from traincert.regtest.node import Node, Options

_NODES = pytest.StashKey[list[Node]]()


class NetworkFactory(Protocol):
    """What the fixture `bitcoin_network` gives."""

    def __call__(self, count: int, options: Options | None = None) -> Network:
        """Start and connect `count` nodes; they are stopped after the test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our option."""
    parser.getgroup("bitcoin nodes").addoption(
        "--bitcoind",
        metavar="PATH",
        type=Path,
        help="the bitcoind to test with, bitcoin-cli beside it (default: the one built from the patch)",
    )


@pytest.fixture(scope="session")
def node_programs(pytestconfig: pytest.Config) -> Path:
    """Return the folder with bitcoind and bitcoin-cli, built first if they are not in the cache."""
    bitcoind: Path | None = pytestconfig.getoption("--bitcoind")
    return bitcoind.absolute().parent if bitcoind else build_node() / "bin"


@pytest.fixture(scope="session")
def stock_programs() -> Path:
    """Return the folder with bitcoind and bitcoin-cli as upstream has them, built first if need be."""
    return build_node(NodeKind(stock=True)) / "bin"


@pytest.fixture(scope="session")
def base28_programs() -> Path:
    """Return the folder with the programs of the patched node of base 28, built first if need be."""
    return build_node(NodeKind(base="28")) / "bin"


@pytest.fixture
def bitcoind(node_programs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Node]:
    """Give a running node of its own to the test, with no options but ours."""
    node = Node(node_programs / "bitcoind", tmp_path / "node0")
    _show_log_on_failure(request, [node])
    with node:
        yield node


@pytest.fixture
def bitcoin_network(node_programs: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NetworkFactory]:
    """Give a function that starts networks for the test."""
    with ExitStack() as stack:
        started: list[Network] = []

        def start(count: int, options: Options | None = None) -> Network:
            network = Network(node_programs / "bitcoind", tmp_path / f"network{len(started)}", count, options)
            started.append(network)
            _show_log_on_failure(request, network.nodes)
            return stack.enter_context(network)

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the nodes' last log lines to a failed test's report."""
    report = yield
    if report.failed:
        report.sections += [(f"{node.name}: end of debug.log", node.log_tail()) for node in item.stash.get(_NODES, [])]
    return report


def _show_log_on_failure(request: pytest.FixtureRequest, nodes: list[Node]) -> None:
    request.node.stash.setdefault(_NODES, []).extend(nodes)
