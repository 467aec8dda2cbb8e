"""A coordinator without training. Its cycles change no model, and their certificates say so.

It is for networks on which other software is tested: a block takes milliseconds, and the caller can choose the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitcoin.core import lx

from traincert.bridge.chain import read_params
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate, Draw, draw_winner, new_certificate
from traincert.bridge.consensus.lottery import ContributionTable
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.keys import create_network_keys, load_network_keys, xonly_key
from traincert.bridge.producer import Producer, ask_for_template
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer

NO_TABLE = ContributionTable([])
NO_MODEL = bytes(32)
"""The hash of the model, where there is none."""

_KEYS = "keys"
_COORDINATORS, _THRESHOLD = 3, 2
_MINERS = 4


class AppointingCoordinator:
    """Certifies cycles that train nothing, and has their winners append their blocks.

    All that it knows of the chain it asks the node, so another process can go on where this one ends. `sign` returns a
    certificate with the coordinator's signatures: usually `Signer.sign`. `next_round` returns the first round for which
    nothing was signed, of the slot after a block: usually `Signer.next_round`. `producers` are the miners.
    """

    def __init__(
        self,
        params: TrainingParams,
        sign: Callable[[Certificate], Certificate],
        next_round: Callable[[bytes], int],
        beacon: Beacon,
        producers: Sequence[Producer],
    ) -> None:
        self.params = params
        self.producers = producers
        self._sign = sign
        self._next_round = next_round
        self._beacon = beacon
        self._tables: dict[str, ContributionTable] = {}  # by the hash of their block

    def append(
        self,
        node: NodeClient,
        *,
        miner: int | bytes | None = None,
        table: ContributionTable | None = None,
        round_: int | None = None,
    ) -> str:
        """Append a block to a node's tip, and return its hash as RPC shows it.

        Where the parent has a table, the draw decides who wins. Elsewhere `miner` wins, given by number or key; by
        default the miners take turns. If `miner` is given and another miner was drawn, that is an error. `table` is the
        block's own, from which its child's winner will be drawn; by default it is empty.

        By default it is the slot's first round that has no certificate yet, above 0 after a reorganisation: a winner
        that signs two blocks with one certificate is an equivocator. The block's time is the round's then. With
        `round_` the node's clock must have come to that round's time.

        Raises BridgeError if there is no such miner, if another was drawn, or if only another coordinator knows the
        parent's table; JournalError if this slot was certified otherwise; RpcError or BridgeError if the node refuses
        the block, or does not make it its tip; NodeUnreachableError if it does not answer.
        """
        template = dict(ask_for_template(node, self.params))
        table = table or NO_TABLE
        if round_ is None:
            round_ = self._next_round(lx(template["previousblockhash"]))
            if round_:
                parent_time = node.call("getblockheader", template["previousblockhash"])["time"]
                template["curtime"] = max(template["curtime"], parent_time + round_ * self.params.round_seconds)
        certificate = self.next_certificate(node, template, miner, table, round_)
        producer = self._producer(certificate.winner_key)
        block_hash = producer.append(node, template, self._sign(certificate), self.params)
        if node.call("getbestblockhash") != block_hash:
            raise BridgeError(f"{node.name} took block {certificate.height} {block_hash}, but it is not its tip")
        if table.count:
            self._tables[block_hash] = table
        return block_hash

    def next_certificate(
        self,
        node: NodeClient,
        template: Mapping[str, Any],
        miner: int | bytes | None,
        table: ContributionTable,
        round_: int,
    ) -> Certificate:
        """Return the certificate that `append` would sign for a node's template."""
        height, prev_hash = template["height"], template["previousblockhash"]
        prev_block, start = lx(prev_hash), self.params.start_height
        model = self.params.model
        if height > start:
            model = bytes.fromhex(node.call("gettrainingcertificate", prev_hash)["model_after"])
        beacon_reveal = self._beacon.reveal(height - start)
        parent_table = self.parent_table(template)
        winner: tuple[bytes, Draw | None]
        if parent_table.count:
            winner = draw_winner(parent_table, beacon_reveal, prev_block, round_)
            self._check_drawn(winner[0], miner, height)
        else:
            turn = (height + round_) % len(self.producers)
            winner = self._producer(turn if miner is None else miner).miner_key, None
        return new_certificate(
            height=height,
            prev_block=prev_block,
            round_=round_,
            beacon_reveal=beacon_reveal,
            model_before=model,
            model_after=model,
            dataset_root=bytes(32),
            record=bytes(32),
            losses=(0, 0),
            table=table,
            winner=winner,
        )

    def parent_table(self, template: Mapping[str, Any]) -> ContributionTable:
        """Return the table from which the winner of a template's slot is drawn.

        Raises BridgeError if that table is not empty and its block was not appended by this coordinator.
        """
        if not template["training"]["contributions_count"]:
            return NO_TABLE
        parent = template["previousblockhash"]
        if parent not in self._tables:
            raise BridgeError(
                f"the winner of block {template['height']} is drawn from the table of block {parent}, which only the "
                "coordinator that certified it has"
            )
        return self._tables[parent]

    def _check_drawn(self, winner_key: bytes, miner: int | bytes | None, height: int) -> None:
        drawn = self._producer(winner_key)
        if miner is not None and self._producer(miner) is not drawn:
            wanted = self.producers.index(self._producer(miner))
            raise BridgeError(f"block {height}: miner {self.producers.index(drawn)} was drawn, not miner {wanted}")

    def _producer(self, miner: int | bytes) -> Producer:
        for number, producer in enumerate(self.producers):
            if miner in (number, producer.miner_key):
                return producer
        name = miner.hex() if isinstance(miner, bytes) else miner
        raise BridgeError(f"there is no miner {name}: there are {len(self.producers)}, from 0 on")


def make_keys(folder: Path, start_height: int) -> TrainingParams:
    """Make the keys of a network without training, in a new folder, and return the network's parameters.

    Raises KeyFileError if they cannot be written.
    """
    create_network_keys(folder / _KEYS, _COORDINATORS, _MINERS)
    keys = load_network_keys(folder / _KEYS)
    coordinators = TrainingKeys(_THRESHOLD, tuple(map(xonly_key, keys.coordinators)))
    return TrainingParams({start_height: coordinators}, Beacon(keys.beacon).anchor, NO_MODEL)


def load_coordinator(folder: Path, node: NodeClient, payout_script: bytes) -> AppointingCoordinator:
    """Return the coordinator with the keys that `make_keys` made, for the network that a node is on.

    All blocks pay to `payout_script`, a scriptPubKey.

    Raises KeyFileError, JournalError, BridgeError if the node is on another network, and RpcError if it is on none.
    """
    keys, params = load_network_keys(folder / _KEYS), read_params(node)
    beacon = Beacon(keys.beacon)
    if params.beacon != beacon.anchor:
        raise BridgeError(f"{node.name} is on network {params.chain_id.hex()}, which the keys in {folder} are not for")
    secrets = dict(enumerate(keys.coordinators[:_THRESHOLD]))
    signer = Signer(folder / "journal.sqlite", params.chain_id, secrets)
    return AppointingCoordinator(
        params,
        signer.sign,
        signer.next_round,
        beacon,
        [Producer(secret, payout_script, f"miner{number}") for number, secret in enumerate(keys.miners)],
    )
