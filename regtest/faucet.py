"""Pays coins to addresses, from a wallet on a network's first node. New blocks fill this wallet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from typing import Any

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

    The wallet is loaded only while it is used: with another wallet loaded, calls that name no wallet would fail. All
    methods raise NodeError if it cannot be loaded or made.
    """

    def __init__(self, network: Network, mine: Mine) -> None:
        self._network = network
        self._node = network.nodes[0]
        self._mine = mine

    @contextmanager
    def _wallet(self) -> Iterator[Callable[..., Any]]:
        """Load the wallet, and give the function that calls RPC methods for it."""
        try:
            self._node.rpc("loadwallet", WALLET)
        except RpcError as error:
            if error.code == _WALLET_NOT_FOUND:
                self._node.rpc("createwallet", WALLET)
            elif error.code != _WALLET_ALREADY_LOADED:
                raise
        try:
            yield partial(self._node.rpc, wallet=WALLET)
        finally:
            self._node.rpc("unloadwallet", WALLET)

    def address(self) -> str:
        """Return a new address of the faucet."""
        with self._wallet() as wallet:
            address: str = wallet("getnewaddress")
            return address

    def mine(self, count: int) -> None:
        """Make `count` blocks that pay the faucet."""
        self._mine(count, self.address())

    def fund(self, address: str, amount: Decimal) -> str:
        """Pay `amount` BTC to an address, make a block that confirms the payment, and return the txid.

        If the faucet has too few coins, it first makes blocks that pay it. Raises NodeError if the address is not a
        regtest address, or if new blocks pay too little because the subsidy has halved too often.
        """
        if not self._node.rpc("validateaddress", address)["isvalid"]:
            raise NodeError(f"{address} is not a regtest address")
        with self._wallet() as wallet:
            own: str = wallet("getnewaddress")
            while _balance(wallet) <= amount:
                height = self._node.rpc("getblockcount")
                if height > MATURITY and self._node.rpc("getblockstats", height)["subsidy"] < 10**6:
                    raise NodeError(
                        f"the faucet cannot pay {amount} BTC: it has {_balance(wallet)} BTC, "
                        "and new blocks pay almost nothing"
                    )
                self._mine(MATURITY + 1 if height <= MATURITY else 10, own)
            txid: str = wallet("sendtoaddress", address, amount)
        self._mine(1, own)
        return txid

    def make_fee_history(self) -> None:
        """Make blocks with payments of different fees, so that estimatesmartfee has an answer.

        It has one on all nodes that can hear of the first node.

        Raises NodeError, or WaitTimeoutError if a node does not hear of a payment within RELAY_TIMEOUT seconds.
        """
        with self._wallet() as wallet:
            own: str = wallet("getnewaddress")
            if _balance(wallet) < 1:
                self._mine(MATURITY + 1, own)
            # Each payment of a block gets its own coins. So no payment must wait until another one is confirmed.
            wallet("sendmany", "", {wallet("getnewaddress"): "0.1" for _ in range(4 * len(_FEE_RATES))})
            self._mine(1, own)
            for _ in range(_FEE_BLOCKS):
                payments = [wallet("send", {own: "0.001"}, None, "unset", rate) for rate in _FEE_RATES]
                txids = {payment["txid"] for payment in payments}
                for node in self._network.linked(0):
                    what = f"{node.name} to hear of {len(txids)} transactions"
                    wait_for(partial(_has_heard, node, txids), RELAY_TIMEOUT, what)
                self._mine(1, own)
        self._network.wait_until_synced()


def _balance(wallet: Callable[..., Any]) -> Decimal:
    balance: Decimal = wallet("getbalances")["mine"]["trusted"]
    return balance


def _has_heard(node: Node, txids: set[str]) -> bool:
    return txids <= set(node.rpc("getrawmempool"))
