"""A chain of certificate blocks that the tests of this folder show to other tools, and one without proof of work."""

from __future__ import annotations

from pathlib import Path

import pytest
from bitcoin.core import CBlock

from compat.made_chain import make_chain
from traincert.regtest import Node
from training_chain import TrainingChain


@pytest.fixture(scope="session")
def certificate_chain(
    node_programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingChain, list[CBlock]]:
    """200 blocks that also meet regtest's trivial target, and what is needed for the next."""
    return _made(node_programs, tmp_path_factory, compat_pow=True)


@pytest.fixture(scope="session")
def chain_without_work(
    node_programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingChain, list[CBlock]]:
    """200 blocks whose nonces nobody searched."""
    return _made(node_programs, tmp_path_factory, compat_pow=False)


def _made(
    node_programs: Path, tmp_path_factory: pytest.TempPathFactory, *, compat_pow: bool
) -> tuple[TrainingChain, list[CBlock]]:
    chain = TrainingChain(round_seconds=1)
    with Node(node_programs / "bitcoind", tmp_path_factory.mktemp("made"), chain.params.node_options()) as node:
        return chain, make_chain(chain, node, compat_pow=compat_pow)
