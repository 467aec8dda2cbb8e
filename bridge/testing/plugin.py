"""pytest fixtures with training networks, for tests of other software; those with plain nodes are in regtest/plugin.py.

`training_network`, and, shared by more tests, `training_network_module` and `training_network_session`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

import pytest

# As in regtest/plugin.py the rest is imported where it is needed.
if TYPE_CHECKING:
    from traincert.bridge.testing.network import TrainingNetwork
    from traincert.regtest.plugin import NetworkFactory


class TrainingNetworkFactory(Protocol):
    """What the fixture `training_network` gives."""

    def __call__(self, nodes: int = 1, *, start_height: int = 1) -> TrainingNetwork:
        """Start a training network, see TrainingNetwork; its nodes are stopped with the fixture."""


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
