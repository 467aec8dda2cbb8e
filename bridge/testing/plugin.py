"""pytest fixtures with training networks, for tests of other software.

`training_network` is for one test; `training_network_module` and `training_network_session` are shared by more tests.
The fixtures with plain nodes are in regtest/plugin.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

# Every start of pytest imports this file, in any project: all else is imported where it is needed.
if TYPE_CHECKING:
    from traincert.bridge.testing.network import TrainingNetwork
    from traincert.regtest.plugin import NetworkFactory


class TrainingNetworkFactory(Protocol):
    """What the fixture `training_network` gives."""

    def __call__(self, nodes: int = 1, *, start_height: int = 1) -> TrainingNetwork:
        """Start a training network, see TrainingNetwork. Its nodes are stopped when the fixture ends."""


def _factory(bitcoin_network: NetworkFactory) -> Iterator[TrainingNetworkFactory]:
    from traincert.bridge.testing.network import TrainingNetwork

    with ExitStack() as stack:
        yield lambda nodes=1, *, start_height=1: stack.enter_context(
            TrainingNetwork(bitcoin_network, nodes, start_height=start_height)
        )


@pytest.fixture
def training_network(bitcoin_network: NetworkFactory) -> Iterator[TrainingNetworkFactory]:
    """Give a function that starts training networks: `training_network(nodes=1, start_height=1)`."""
    yield from _factory(bitcoin_network)


@pytest.fixture(scope="module")
def training_network_module(bitcoin_network_module: NetworkFactory) -> Iterator[TrainingNetworkFactory]:
    """Give a function that starts training networks for a module's tests."""
    yield from _factory(bitcoin_network_module)


@pytest.fixture(scope="session")
def training_network_session(bitcoin_network_session: NetworkFactory) -> Iterator[TrainingNetworkFactory]:
    """Give a function that starts training networks for all tests."""
    yield from _factory(bitcoin_network_session)
