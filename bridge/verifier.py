"""Checks a chain from anybody's node or block files: nothing that they say is believed.

A chain is known by the hash of its last block: each header names the block before, down to the genesis block. Below
the start height a header needs regtest's proof of work. From there on every rule of SPEC.md is checked, and the Merkle
root. What the transactions do is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bitcoin.core import CBlock, CoreRegTestParams, b2lx
from bitcoin.core.serialize import uint256_from_compact

from traincert.bridge.chain import (
    GENESIS,
    HEADER_SIZE,
    Certified,
    header_hash,
    parse_block,
    previous_hash,
    read_params,
)
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.consensus.rules import check_training_certificate, contextual_check_training_certificate
from traincert.bridge.errors import BridgeError, CertificateError, EncodingError
from traincert.bridge.rpc import NodeClient
from traincert.bridge.verified import Verified, VerifiedBlocks
from traincert.regtest.errors import RpcError

_GENESIS = Verified(0, CoreRegTestParams.GENESIS_BLOCK.get_header().serialize(), None)
_BITS: int = CoreRegTestParams.GENESIS_BLOCK.nBits
_TARGET: int = uint256_from_compact(_BITS)
_MOST_HEADERS = 1000  # in one request
_BLOCKS = 20  # in one request: a block may have 4 MB
_RPC_METHOD_NOT_FOUND = -32601


class ChainError(BridgeError):
    """A block that breaks a rule, or cannot be read. `reason` is a node's name for the rule, or `unreadable`."""

    def __init__(self, height: int, block_hash: str, reason: str, detail: str) -> None:
        super().__init__(f"block {height} {block_hash}: {reason}: {detail}")
        self.height = height
        self.hash = block_hash
        self.reason = reason
        self.detail = detail


class Source(Protocol):
    """Where blocks come from. Hashes are as RPC shows them."""

    def tips(self, last: int | None = None) -> list[str]:
        """Return the last blocks of the longest chains, or their blocks at the height `last`. One must be valid.

        Raises BridgeError if there is no block of this height.
        """

    def headers(self, block_hash: str) -> Iterator[bytes]:
        """Give the headers of a block and of those below it."""

    def blocks(self, hashes: Sequence[str]) -> Iterator[bytes]:
        """Give the bytes of blocks, in this order."""


class NodeBlocks:
    """The blocks of a node, over RPC."""

    def __init__(self, node: NodeClient) -> None:
        self._node = node

    def tips(self, last: int | None = None) -> list[str]:
        """Return the node's last block, or its block at the height `last`. Raises BridgeError if it has none there."""
        if last is None:
            return [self._call(str, "getbestblockhash")]
        count = self._call(int, "getblockcount")
        if last > count:
            raise BridgeError(f"{self._node.name} has no block {last}: its last block is {count}")
        return [self._call(str, "getblockhash", last)]

    def headers(self, block_hash: str) -> Iterator[bytes]:
        """Give the headers of a block and of those below it."""
        count = 1
        while True:
            headers = self._headers(block_hash, count)
            yield from headers
            block_hash = previous_hash(headers[-1])
            count = min(4 * count, _MOST_HEADERS)

    def blocks(self, hashes: Sequence[str]) -> Iterator[bytes]:
        """Give the bytes of blocks. Raises RpcError at one that the node has pruned."""
        for at in range(0, len(hashes), _BLOCKS):
            for answer in self._node.call_each("getblock", [(each, 0) for each in hashes[at : at + _BLOCKS]]):
                yield self._bytes("getblock", answer)

    def _headers(self, block_hash: str, count: int) -> list[bytes]:
        """Return the header of a block, and as many as are there of `count` - 1 below it."""
        hashes = [block_hash]
        if count > 1:
            height = self._call(dict, "getblockheader", block_hash).get("height")
            if not isinstance(height, int):
                raise self._nonsense("getblockheader")
            below = range(height - 1, max(height - count, -1), -1)
            answers = self._node.call_each("getblockhash", [(each,) for each in below])
            hashes += [each for each in answers if isinstance(each, str)]
        headers: list[bytes] = []
        for answer in self._node.call_each("getblockheader", [(each, False) for each in hashes]):
            header = self._bytes("getblockheader", answer)
            if headers and header_hash(header) != previous_hash(headers[-1]):
                break  # the node has reorganised its chain meanwhile
            headers.append(header)
        return headers

    def _bytes(self, method: str, answer: Any) -> bytes:
        if isinstance(answer, RpcError):
            raise answer
        try:
            return bytes.fromhex(answer)
        except (TypeError, ValueError):
            raise self._nonsense(method) from None

    def _call(self, kind: type, method: str, *arguments: object) -> Any:
        answer = self._node.call(method, *arguments)
        if not isinstance(answer, kind):
            raise self._nonsense(method)
        return answer

    def _nonsense(self, method: str) -> BridgeError:
        return BridgeError(f"{self._node.name} does not answer {method} as a Bitcoin node does")


@dataclass(frozen=True)
class Chain:
    """The blocks of a chain from some height on, up to `tip`.

    `parent` is the block below them, and None below the genesis block. `whole` means that all blocks below were
    verified, too.
    """

    parent: Verified | None
    blocks: list[Verified]
    tip: Verified
    whole: bool

    @property
    def certified(self) -> list[Certified]:
        """What the payloads say, of all these blocks from the start height on."""
        return [block.certified for block in self.blocks if block.certified]


class Verifier:
    """Verifies chains of one source. `read` is the number of blocks that were not verified before."""

    def __init__(self, source: Source, params: TrainingParams, verified: VerifiedBlocks) -> None:
        self._source = source
        self._params = params
        self._verified = verified
        self.read = 0

    def longest(self, first: int = 0, last: int | None = None) -> Chain:
        """Return the source's blocks from the height `first` to the height `last`, by default all; see `chain`.

        Of several chains of the same length it is the first that is valid.
        """
        failed: list[ChainError] = []
        for tip in self._source.tips(last):
            try:
                chain = self.chain(tip, first)
            except ChainError as error:
                failed.append(error)
                continue
            if last is not None and chain.tip.height != last:
                raise BridgeError(f"block {tip} is not block {last}: it is block {chain.tip.height}")
            return chain
        raise failed[0]

    def chain(self, tip: str, first: int = 0) -> Chain:
        """Return the blocks from the height `first` to the block `tip`, verified; none if the tip is below `first`.

        Of the blocks below `first` only the headers are checked, unless they were verified before.

        Raises ChainError for the first block that breaks a rule or cannot be read, and NodeUnreachableError.
        """
        at, headers, below = tip, list[bytes](), self._source.headers(tip)
        while not (base := self._verified_before(at)):
            headers.append(next(below))
            if len(headers[-1]) != HEADER_SIZE or header_hash(headers[-1]) != at:
                raise BridgeError(f"asked for the header of block {at}, it came with another hash")
            at = previous_hash(headers[-1])
        headers.reverse()
        # Blocks below the start height, and those below the parent of block `first`, need not be read.
        unread = max(self._params.start_height, first - 1) - base.height - 1
        bodies = self._source.blocks([header_hash(header) for header in headers[max(unread, 0) :]])
        blocks, block, whole = self._down(base, first - 1), base, True
        for number, header in enumerate(headers):
            block = self._next(block, header, bodies if number >= unread else None, first)
            whole = whole and (block.height >= first or block.height < self._params.start_height)
            if whole:
                self._verified.add(block)
            if block.height >= first - 1:
                blocks.append(block)
            self.read += block.height >= first
        parent = blocks.pop(0) if blocks and blocks[0].height < first else None
        return Chain(parent, blocks, block, whole)

    def block(self, block_hash: str) -> Verified:
        """Return a block, verified with all blocks below it. Raises what `chain` does."""
        return self._verified_before(block_hash) or self.chain(block_hash).tip

    def _verified_before(self, block_hash: str) -> Verified | None:
        return _GENESIS if block_hash == GENESIS else self._verified.get(block_hash)

    def _down(self, block: Verified, first: int) -> list[Verified]:
        """Return the blocks from a height to this block, all of which were verified before."""
        blocks = [block] if block.height >= first else []
        while block.height > max(first, 0):
            block = self.block(block.previous)
            blocks.append(block)
        return blocks[::-1]

    def _next(self, parent: Verified, header: bytes, bodies: Iterator[bytes] | None, first: int) -> Verified:
        """Check the block after `parent`: its header, and the next of `bodies`, with the parent from `first` on."""
        height, block_hash = parent.height + 1, header_hash(header)
        bits = int.from_bytes(header[72:76], "little")
        if bits != _BITS:
            raise ChainError(height, block_hash, "bad-diffbits", f"nBits is {bits:08x}, expected {_BITS:08x}")
        if height < self._params.start_height and int(block_hash, 16) > _TARGET:
            raise ChainError(height, block_hash, "high-hash", "the hash does not meet the target")
        if bodies is None:
            return Verified(height, header, None)
        block = _read(height, header, bodies)
        try:
            payload = check_training_certificate(block, height, self._params)
            certificate = payload.certificate
            if height >= first:
                before = parent.certified.certificate if parent.certified else None
                contextual_check_training_certificate(certificate, before, block.nTime, parent.time, self._params)
        except CertificateError as error:
            raise ChainError(height, block_hash, error.reason, str(error).removeprefix(f"{error.reason}: ")) from None
        return Verified(height, header, Certified(block_hash, certificate, payload.winner_signature))


def _read(height: int, header: bytes, bodies: Iterator[bytes]) -> CBlock:
    """Return the next block, which must be that of the header."""
    block_hash = header_hash(header)
    try:
        data = next(bodies)
        block = parse_block(data)
    except (RpcError, ValueError) as error:
        raise ChainError(height, block_hash, "unreadable", str(error)) from None
    if data[:HEADER_SIZE] != header:
        raise ChainError(height, block_hash, "unreadable", f"block {header_hash(data[:HEADER_SIZE])} came instead")
    root, expected = block.calc_merkle_root(), block.hashMerkleRoot
    if root != expected:
        detail = f"the transactions have the Merkle root {b2lx(root)}, the header has {b2lx(expected)}"
        raise ChainError(height, block_hash, "bad-txnmrklroot", detail)
    return block


def node_params(node: NodeClient, datadir: Path) -> TrainingParams:
    """Return the parameters of the training network that a node says it is on.

    Raises BridgeError if it is on none, and NodeUnreachableError.
    """
    try:
        return read_params(node)
    except RpcError as error:
        if error.code == _RPC_METHOD_NOT_FOUND:
            raise BridgeError(f"{node.name} is not the patched bitcoind: it is on no training network") from None
        if error.method == "gettraininginfo":
            raise BridgeError(f"{node.name} is on no training network: it was started without -trainingkeys") from None
    except (KeyError, TypeError, ValueError):
        raise BridgeError(f"{node.name} does not answer gettraininginfo as the patched bitcoind does") from None
    # A node that has pruned its first blocks does not know any more from which model they start.
    params, chain_id = conf_params(datadir / "bitcoin.conf"), node.call("gettraininginfo")["chain_id"]
    if params.chain_id.hex() != chain_id:
        raise BridgeError(f"{node.name} is on network {chain_id}, but its bitcoin.conf is of {params.chain_id.hex()}")
    return params


def conf_params(path: Path) -> TrainingParams:
    """Return the parameters in a training.conf, or in the bitcoin.conf of a node.

    Raises BridgeError if they are missing or malformed, and OSError if there is no such file.
    """
    options: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = (part.strip() for part in line.partition("#")[0].partition("="))
        if name.startswith("["):
            section = name.strip("[]")
        elif section in ("", "regtest"):
            options.setdefault(name.removeprefix("regtest."), []).append(value)

    def only(name: str, *default: str) -> str:
        values = options.get(name) or default
        if len(values) != 1:
            raise BridgeError(f"{path} has {len(values) or 'no'} {name}: one is needed")
        return values[0]

    if "trainingkeys" not in options:
        raise BridgeError(f"{path} has no trainingkeys: it is of no training network")
    training: dict[str, Any] = {"trainingkeys": options["trainingkeys"], "traininground": only("traininground", "60")}
    training |= {name: only(name) for name in ("trainingbeacon", "trainingmodel")}
    try:
        params = TrainingParams.from_node_options(training)
        _ = params.chain_id  # it cannot be computed of values that do not fit
    except (ValueError, EncodingError) as error:
        raise BridgeError(f"{path} has a malformed -training... option: {error}") from None
    return params
