"""Pays coins to addresses, from a wallet on a network's first node. New blocks fill this wallet."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from functools import partial

from traincert.regtest.errors import NodeError, RpcError
from traincert.regtest.network import Network
from traincert.regtest.node import Node, wait_for

WALLET = "faucet"
MATURITY = 100  # blocks on top of a coinbase transaction before its coins can be spent
_FEE_RATES = (2, 5, 10, 20, 50)  # sat/vB
_FEE_BLOCKS = 12  # blocks with payments, enough for estimatesmartfee
RELAY_TIMEOUT = 60.0  # seconds
_WALLET_NOT_FOUND = -18
_WALLET_ALREADY_LOADED = -35

Mine = Callable[[int, str], None]
"""Makes the given number of blocks on the first node. They pay the given address."""


class Faucet:
    """The wallet `faucet` of a network's first node. It gets its coins from the blocks that `mine` makes.

    Raises NodeError if the wallet cannot be loaded or made.
    """

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
        """Make `count` blocks that pay the faucet."""
        self._mine(count, self._address())

    def fund(self, address: str, amount: Decimal) -> str:
        """Pay `amount` BTC to an address, make a block that confirms the payment, and return the txid.

        If the faucet has too few coins, it first makes blocks that pay it. Raises NodeError if the address is not a
        regtest address, or if new blocks pay too little because the subsidy has halved too often.
        """
        if not self._node.rpc("validateaddress", address)["isvalid"]:
            raise NodeError(f"{address} is not a regtest address")
        while self._balance() <= amount:
            height = self._node.rpc("getblockcount")
            if height > MATURITY and self._node.rpc("getblockstats", height)["subsidy"] < 10**6:
                raise NodeError(
                    f"the faucet cannot pay {amount} BTC: it has {self._balance()} BTC, "
                    "and new blocks pay almost nothing"
                )
            self.mine(MATURITY + 1 if height <= MATURITY else 10)
        txid: str = self._node.rpc("sendtoaddress", address, str(amount), wallet=WALLET)
        self.mine(1)
        return txid

    def make_fee_history(self) -> None:
        """Make blocks with payments of different fees, so that estimatesmartfee has an answer on every node.

        Raises NodeError, or WaitTimeoutError if a node does not hear of a payment within RELAY_TIMEOUT seconds.
        """
        if self._balance() < 1:
            self.mine(MATURITY + 1)
        # Each payment of a block gets its own coins. So no payment must wait until another one is confirmed.
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
