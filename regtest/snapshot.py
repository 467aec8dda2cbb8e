"""A chain with coins to spend, made once and copied for each node that starts from it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from traincert.regtest.errors import NodeError, RpcError
from traincert.regtest.node import Node, Options

MATURE_COINS = 150
"""Blocks whose coins can be spent; all of 50 BTC, but for the last of 25."""

COINBASE_MATURITY = 100  # blocks on top, until the wallet spends a block's coins

COINS_KEY = "cMahea7zqjxrtgAbB7LSGbcQUr1uX1ojuat9jZodMN87JcbXMTcA"
"""The private key of all coins, which are paid to its P2WPKH address, as bitcoin-cli has it (WIF): the number 1."""

WALLET = "default"

OPTIONS: Options = {
    "keypool": "1",  # not the 8,000 keys in advance that take a second
    "unsafesqlitesync": "1",  # no fsync for every block's coin
}
"""For nodes with the wallet: with them the chain is made in less than a second, without in up to a quarter minute."""

_RPC_METHOD_NOT_FOUND = -32601


def make_snapshot(bitcoind: Path, datadir: Path) -> None:
    """Make a data directory with the chain; with a wallet that has its coins, if this bitcoind has wallets.

    Raises NodeError if the node cannot be started or refuses a call.
    """
    with Node(bitcoind, datadir, OPTIONS) as node:
        private = f"wpkh({COINS_KEY})"
        info = node.rpc("getdescriptorinfo", private)
        try:
            node.rpc("createwallet", WALLET, False, False, "", False, True, True)  # the last: loaded at each start
        except RpcError as error:
            if error.code != _RPC_METHOD_NOT_FOUND:
                raise
        else:
            node.rpc("importdescriptors", [{"desc": f"{private}#{info['checksum']}", "timestamp": "now"}])
        node.rpc("generatetodescriptor", MATURE_COINS + COINBASE_MATURITY, info["descriptor"])


def copy_snapshot(snapshot: Path, datadir: Path) -> None:
    """Copy a data directory that no node runs on, sharing its blocks on disk where the file system can.

    Raises NodeError if it cannot be copied.
    """
    copy_files([snapshot], datadir)
    (datadir / "regtest/debug.log").unlink()  # not this node's


def copy_files(paths: Sequence[Path], target: Path) -> None:
    """Copy files and folders into a folder, or one to a new name; they share on disk what neither side has changed.

    That is, where the file system can. Raises NodeError if they cannot be copied.
    """
    command = ["cp", "--archive", "--reflink=auto", "--", *map(str, paths), str(target)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise NodeError(f"cannot copy to {target}: {answer.stderr.strip()}")
