"""Coins for who needs some: a wallet on a network's first node, and blocks that pay it."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import partial

from traincert.regtest.errors import NodeError, RpcError
from traincert.regtest.network import Network
from traincert.regtest.node import Node, wait_for

WALLET = "faucet"
MATURITY = 100  # blocks on a coinbase before it can be spent
_FEE_RATES = (2, 5, 10, 20, 50)  # sat/vB
_FEE_BLOCKS = 12
RELAY_TIMEOUT = 60.0  # seconds
_WALLET_NOT_FOUND = -18
_WALLET_ALREADY_LOADED = -35

Mine = Callable[[int, str], None]
"""Makes so many blocks that pay an address, on the first node."""


class Faucet:
    """The wallet `faucet` of a network's first node; `mine` makes the blocks that it lives from."""

    def __init__(self, network: Network, mine: Mine) -> None:
        self._network = network
        self._node = network.nodes[0]
        self._mine = mine
        try:
            self._node.rpc("loadwallet", WALLET)
        except RpcError as error:
            if error.code == _WALLET_NOT_FOUND:
                self._node.rpc("createwallet", WALLET)
            elif error.code != _WALLET_ALREADY_LOADED:
                raise

    def mine(self, count: int) -> None:
        """Make blocks that pay the faucet."""
        self._mine(count, self._address())

    def fund(self, address: str, amount: Decimal) -> str:
        """Pay an amount, in BTC, to an address, and confirm it by a block; return the txid.

        Blocks are made as long as there is not enough. Raises NodeError if the address is none, or if there is no end.
        """
        if not self._node.rpc("validateaddress", address)["isvalid"]:
            raise NodeError(f"{address} is no address of regtest")
        while self._balance() <= amount:
            height = self._node.rpc("getblockcount")
            if height > MATURITY and self._node.rpc("getblockstats", height)["subsidy"] < 10**6:
                raise NodeError(f"{amount} BTC is more than blocks pay: the faucet has {self._balance()}")
            self.mine(MATURITY + 1 if height <= MATURITY else 10)
        txid: str = self._node.rpc("sendtoaddress", address, str(amount), wallet=WALLET)
        self.mine(1)
        return txid

    def make_fee_history(self) -> None:
        """Pay fees in some blocks, so that estimatesmartfee has an answer on every node."""
        if self._balance() < 1:
            self.mine(MATURITY + 1)
        # Coins of their own for the payments, so that they need not wait for each other.
        outputs = {self._address(): "0.1" for _ in range(4 * len(_FEE_RATES))}
        self._node.rpc("sendmany", "", outputs, wallet=WALLET)
        self.mine(1)
        for _ in range(_FEE_BLOCKS):
            txids = {self._pay(rate) for rate in _FEE_RATES}
            for node in self._network.nodes:
                what = f"{node.name} to hear of {len(txids)} transactions"
                wait_for(partial(_has_heard, node, txids), RELAY_TIMEOUT, what)
            self.mine(1)
        self._network.wait_until_same_tip()

    def _pay(self, rate: int) -> str:
        amount = {self._address(): "0.001"}
        txid: str = self._node.rpc("send", amount, None, "unset", rate, wallet=WALLET)["txid"]
        return txid

    def _address(self) -> str:
        address: str = self._node.rpc("getnewaddress", wallet=WALLET)
        return address

    def _balance(self) -> Decimal:
        return Decimal(str(self._node.rpc("getbalances", wallet=WALLET)["mine"]["trusted"]))


def _has_heard(node: Node, txids: set[str]) -> bool:
    return txids <= set(node.rpc("getrawmempool"))
