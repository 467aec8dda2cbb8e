"""Settings of all tests, and nodes that only this project's tests need."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from traincert.regtest import NodeKind
from traincert.regtest.plugin import build_programs

settings.register_profile("traincert", deadline=None)  # machines are shared: no test asserts a time
settings.load_profile("traincert")

# A shell's background jobs ignore Ctrl-C, and so would all that they start: tests of it must not depend on that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stock_programs(pytestconfig: pytest.Config) -> Path:
    """The folder with bitcoind and bitcoin-cli as upstream has them, built first if need be."""
    return build_programs(pytestconfig, NodeKind(stock=True))


@pytest.fixture(scope="session")
def base28_programs(pytestconfig: pytest.Config) -> Path:
    """The folder with the programs of the patched node of base 28, built first if need be."""
    return build_programs(pytestconfig, NodeKind(base="28"))
