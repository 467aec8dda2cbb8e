"""Follows a node's chain and finds the payments to an address."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from payments.rpc import Rpc


@dataclass(frozen=True)
class Payment:
    """A transaction output that pays the address."""

    txid: str
    output: int
    """The index of the output in its transaction."""
    satoshis: int
    height: int
    """The height of its block."""


@dataclass(frozen=True)
class _Block:
    hash: str
    payments: tuple[Payment, ...]


class Watcher:
    """The payments to an address, in blocks from height `start` on. The chain must have a block at this height."""

    def __init__(self, rpc: Rpc, address: str, start: int = 0) -> None:
        self._rpc = rpc
        self.address = address
        self._start = start
        self._blocks: list[_Block] = []

    @property
    def confirmations(self) -> dict[Payment, int]:
        """The number of confirmations of each payment, as of the last `poll()`."""
        top = self._start + len(self._blocks)
        return {payment: top - payment.height for block in self._blocks for payment in block.payments}

    def poll(self) -> list[Payment]:
        """Follow the chain to its tip. Return the payments that a reorganisation has removed from the chain."""
        gone: list[Payment] = []
        while self._blocks and not self._is_in_chain(self._blocks[-1]):
            gone += self._blocks.pop().payments
        following = self._next_hash()
        while following is not None:
            self._blocks.append(_Block(following, tuple(self._read(following))))
            following = self._next_hash()
        return [payment for payment in gone if payment not in self.confirmations]

    def _is_in_chain(self, block: _Block) -> bool:
        return bool(self._rpc("getblockheader", block.hash)["confirmations"] >= 0)

    def _next_hash(self) -> str | None:
        """The hash of the block after our last block.

        None if our last block is the tip, or if it has just left the chain: the next `poll()` then notices.
        """
        if not self._blocks:
            first: str = self._rpc("getblockhash", self._start)
            return first
        following: str | None = self._rpc("getblockheader", self._blocks[-1].hash).get("nextblockhash")
        return following

    def _read(self, block_hash: str) -> Iterator[Payment]:
        block: dict[str, Any] = self._rpc("getblock", block_hash, 2)
        for transaction in block["tx"]:
            for output in transaction["vout"]:
                if output["scriptPubKey"].get("address") == self.address:
                    satoshis = int(output["value"] * 10**8)
                    yield Payment(transaction["txid"], output["n"], satoshis, block["height"])
