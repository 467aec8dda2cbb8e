"""Makes a chain with coins to spend, and copies it. Copying is faster than making the chain for each node."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from traincert.regtest.errors import NodeError, RpcError
from traincert.regtest.node import Node, Options

MATURE_COINS = 150
"""The number of blocks whose coins can be spent. Each block pays 50 BTC, the last one 25 BTC."""

COINBASE_MATURITY = 100  # blocks on top of a block, before its coins can be spent

COINS_KEY = "cMahea7zqjxrtgAbB7LSGbcQUr1uX1ojuat9jZodMN87JcbXMTcA"
"""The private key of all coins, in WIF. It is the number 1. The coins are at its P2WPKH address."""

WALLET = "default"

OPTIONS: Options = {
    "keypool": "1",  # by default a wallet makes 8,000 keys in advance, which takes a second
    "unsafesqlitesync": "1",  # no fsync for the coin of each block
}
"""Options for nodes with this wallet. They make `make_snapshot` faster: less than 1 s instead of up to 15 s."""

_RPC_METHOD_NOT_FOUND = -32601


def make_snapshot(bitcoind: Path, datadir: Path) -> None:
    """Make a data directory with the chain. If this bitcoind has wallets, the wallet `default` owns the coins.

    Raises NodeError if the node cannot be started or refuses a call.
    """
    with Node(bitcoind, datadir, OPTIONS) as node:
        private = f"wpkh({COINS_KEY})"
        info = node.rpc("getdescriptorinfo", private)
        try:
            node.rpc("createwallet", WALLET, False, False, "", False, True, True)  # load_on_startup is the last
        except RpcError as error:
            if error.code != _RPC_METHOD_NOT_FOUND:
                raise
        else:
            node.rpc("importdescriptors", [{"desc": f"{private}#{info['checksum']}", "timestamp": "now"}])
        node.rpc("generatetodescriptor", MATURE_COINS + COINBASE_MATURITY, info["descriptor"])


def copy_snapshot(snapshot: Path, datadir: Path) -> None:
    """Copy a data directory that no node uses. See `copy_files` for the disk space.

    Raises NodeError if it cannot be copied.
    """
    copy_files([snapshot], datadir)
    (datadir / "regtest/debug.log").unlink()  # it belongs to the node that made the snapshot


def copy_files(paths: Sequence[Path], target: Path) -> None:
    """Copy files and folders into the folder `target`. A single one can also be copied to the new name `target`.

    If the file system supports reflinks, a copy needs no disk space until it is changed.
    Raises NodeError if something cannot be copied.
    """
    command = ["cp", "--archive", "--reflink=auto", "--", *map(str, paths), str(target)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise NodeError(f"cannot copy to {target}: {answer.stderr.strip()}")
