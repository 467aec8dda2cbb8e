"""`submitblock` of certificate blocks on the patched node, and of stock blocks on a stock node, by turns.

All is wall time as a client sees it, and medians: on a busy machine the scheduler decides, for thousands of blocks on
end, whether a node's background thread runs before the answer or after it. So the nodes are also started several times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from coincurve import PrivateKey, PublicKeyXOnly

from bench.blocks import OPTIONS, WITHOUT_CHECKS, one_client_node
from bench.client import RawClient
from bench.rows import Row, row

BLOCKS = 500
STARTS = 4
SIGNATURES = 3  # in a certificate block: two coordinators' and the winner's


def measure(patched: Path, stock: Path, folder: Path, certificate: Sequence[str], plain: Sequence[str]) -> list[Row]:
    """Time both, with regtest's own checks of its consistency and without."""
    ours, theirs, verification = _submit(patched, stock, folder / "checked", certificate, plain, {})
    bare_ours, bare_theirs, _ = _submit(patched, stock, folder / "bare", certificate, plain, WITHOUT_CHECKS)
    rest = ours - SIGNATURES * verification
    return [
        row("submitblock: empty certificate block, 2-of-3 keys, table of 1,024 leaves", ours, "µs"),
        row("submitblock: empty block, stock node", theirs, "µs"),
        row("one BIP340 verification (coincurve's libsecp256k1)", verification, "µs"),
        row("submitblock: certificate block against stock block", ours / theirs, "ratio", 1.35),
        row("the same, less three verifications", rest / theirs, "ratio", 1.1),
        row("submitblock without regtest's own checks: certificate against stock", bare_ours / bare_theirs, "ratio"),
    ]


def _submit(
    patched: Path,
    stock: Path,
    folder: Path,
    certificate: Sequence[str],
    plain: Sequence[str],
    options: Mapping[str, str],
) -> tuple[float, float, float]:
    """The median times of a certificate block, a stock block and a verification, in microseconds."""
    ours: list[float] = []
    theirs: list[float] = []
    verifications: list[float] = []
    for start in range(STARTS):
        nodes = (
            one_client_node(patched, folder / f"patched{start}", {**OPTIONS, **options}),
            one_client_node(stock, folder / f"stock{start}", options),
        )
        with nodes[0], nodes[1]:
            clients = [RawClient(node) for node in nodes]
            for i in range(BLOCKS):
                turns = [(clients[0], certificate[i], ours), (clients[1], plain[i], theirs)]
                for client, block, times in turns if i % 2 else reversed(turns):
                    times.append(client.submit_block(block))
                verifications.append(_verification())
    return statistics.median(ours), statistics.median(theirs), statistics.median(verifications)


_KEY = PrivateKey(bytes([1] * 32))
_XONLY, _SIGNATURE = _KEY.public_key_xonly.format(), _KEY.sign_schnorr(bytes(32))


def _verification() -> float:
    """How many microseconds a verification takes, from a key and a signature in bytes, as the node does it."""
    start = time.perf_counter()
    holds = PublicKeyXOnly(_XONLY).verify(_SIGNATURE, bytes(32))
    microseconds = (time.perf_counter() - start) * 1e6
    if not holds:
        raise AssertionError("a valid signature does not verify")
    return microseconds
