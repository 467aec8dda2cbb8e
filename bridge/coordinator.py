"""The coordinator's loop: run a cycle, record it, certify the drawn winner, wait for its block, draw again if absent.

A cycle's record is on disk before its certificate is signed. So a coordinator that is killed trains nothing again, and
never has two results for one slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitcoin.core import lx

from traincert.bridge.chain import read_certificate
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate, Draw, draw_winner, new_certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.messages import assignment_seed, commits_root, score_seed
from traincert.bridge.rpc import NodeClient
from traincert.trainer.cycle import Trainer
from traincert.trainer.energy import Spending
from traincert.trainer.engines.orders import Commit, OnCommit
from traincert.trainer.failpoints import reached
from traincert.trainer.records import Record, RunFolder, contributions, record_hash

MAX_ROUND = 2**16 - 1
OWN_NODE_TIME = 30.0  # seconds for the coordinator's node to come back to its tip after a restart


@dataclass(frozen=True)
class Slot:
    """A block to be made. `prev_block` is in header byte order, `parent_time` is the parent's nTime."""

    height: int
    prev_block: bytes
    parent_time: int


@dataclass(frozen=True)
class ClosedSlot:
    """A cycle's record, and the block that closed the cycle."""

    certificate: Certificate
    block_hash: str
    record: Record


class Miners(Protocol):
    """How the coordinator reaches its miners. The trainer's engine reaches the same ones."""

    def open(self, slot: Slot, cycle: int) -> tuple[Sequence[bytes], bytes]:
        """Wait for miners, and open a cycle with those that are present.

        Return their keys, and the statement that announces the cycle. A cycle that was open before is not changed.
        """

    def award(self, certificate: Certificate) -> None:
        """Give a certificate to its winner, and to nobody else. Do not wait for the winner's block."""

    def why_absent(self, certificate: Certificate) -> str:
        """Return what is known of a winner whose block did not come."""

    def closed(self, slot: ClosedSlot) -> None:
        """Tell the miners what came of their tasks."""


def contribution_table(record: Record) -> ContributionTable:
    """Return the table of a record's contributions."""
    return ContributionTable(
        Leaf(each.miner, each.update_hash, each.params, each.loss_reduction, each.weight)
        for each in contributions(record)
    )


def certificate_of(records: Sequence[Record], slot: Slot, round_: int, beacon_reveal: bytes) -> Certificate:
    """Return the unsigned certificate of the last record's cycle, for a round of its slot.

    The winner is drawn from the table of the record before. Where that has none, the miners are appointed in turn.
    """
    before, record = records[-2:]
    parent_table = contribution_table(before)
    winner: tuple[bytes, Draw | None]
    if parent_table.count:
        winner = draw_winner(parent_table, beacon_reveal, slot.prev_block, round_)
    else:
        miners = [bytes.fromhex(task["miner"]) for task in record["tasks"]]
        winner = miners[(slot.height + round_) % len(miners)], None
    return new_certificate(
        height=slot.height,
        prev_block=slot.prev_block,
        round_=round_,
        beacon_reveal=beacon_reveal,
        model_before=bytes.fromhex(record["model_before"]),
        model_after=bytes.fromhex(record["model_after"]),
        dataset_root=bytes.fromhex(record["dataset_root"]),
        record=record_hash(record),
        losses=(record["loss_before"], record["loss_after"]),
        table=contribution_table(record),
        winner=winner,
    )


class Coordinator:
    """Runs cycles, records them in `run`, which has begun, and certifies them.

    `sign` returns a certificate with all signatures that it needs. It journals first, and raises JournalError if there
    is another certificate for the slot and round.
    """

    def __init__(
        self,
        params: TrainingParams,
        sign: Callable[[Certificate], Certificate],
        beacon: Beacon,
        node: NodeClient,
        trainer: Trainer,
        run: RunFolder,
        miners: Miners,
    ) -> None:
        self.params = params
        self.state = run.load()
        """What the next cycle starts from."""
        self._sign = sign
        self._beacon = beacon
        self._node = node
        self._trainer = trainer
        self._run = run
        self._miners = miners
        self.awaiting = "the start of a cycle"
        """What the coordinator waits for, for people."""
        self._tip, self.closed = self._find_tip()
        """How many of the run's cycles have their block."""

    def close_slot(
        self, on_commit: OnCommit | None = None, on_absent: Callable[[Certificate, str], None] | None = None
    ) -> ClosedSlot:
        """Run one cycle, certify it, and wait for its block.

        If the block does not come within the round's time, the next round's winner gets a certificate for the same
        cycle, and so on. A late block of an earlier round's winner closes the slot too.

        `on_commit` is called with the number of commits and of tasks. `on_absent` is called for each winner whose time
        is over, with its certificate and what is known of the reason.

        Raises BridgeError if the coordinator's own node leaves the chain that is being built, RegtestError if that node
        fails, and JournalError if the journal has another certificate for the slot.
        """
        if not self._node.wait_for_tip(self._tip, OWN_NODE_TIME):
            raise BridgeError(f"{self._node.name} has left block {self._tip}, which closed the slot before")
        parent = self._node.call("getblockheader", self._tip)
        slot = Slot(parent["height"] + 1, lx(self._tip), parent["time"])
        if self._run.cycles == self.closed:
            self._train(slot, on_commit)
        closed = self._certify(slot, on_absent or (lambda _certificate, _reason: None))
        self._tip, self.closed = closed.block_hash, self._run.cycles
        self._miners.closed(closed)
        return closed

    def _find_tip(self) -> tuple[str, int]:
        """Return the block that closed the last slot, and how many cycles have a block: all, or all but the last."""
        hashes, cycles = self._run.hashes, self._run.cycles
        below = self.params.start_height - 1
        oldest = max(0, cycles - 1)
        if not self._node.wait_for_height(below + oldest, OWN_NODE_TIME):
            raise BridgeError(f"{self._node.name} has no block {below + oldest}, which closed the slot before")
        closed = cycles if self._node.call("getblockcount") >= below + cycles else oldest
        block_hash: str = self._node.call("getblockhash", below + closed)
        if closed and read_certificate(self._node, block_hash).record != hashes[closed]:
            raise BridgeError(f"{self._node.name}: block {block_hash} does not certify the record of cycle {closed}")
        return block_hash, closed

    def _train(self, slot: Slot, on_commit: OnCommit | None) -> None:
        """Run the slot's cycle, and record it."""
        cycle = self._run.cycles
        self.awaiting = f"miners for cycle {cycle + 1}"
        miners, opening = self._miners.open(slot, cycle)
        self.awaiting = f"commits and updates of cycle {cycle + 1}"
        beacon_reveal = self._beacon.reveal(cycle)

        def draw_examples(commits: Mapping[bytes, Commit]) -> bytes:
            root = commits_root({miner: commit.update_hash for miner, commit in commits.items()})
            return score_seed(beacon_reveal, root)

        with Spending() as spending:
            result = self._trainer.run_cycle(
                self.state,
                miners,
                seed=assignment_seed(self._trainer.job.seed, slot.prev_block),
                score_seed=draw_examples,
                on_commit=on_commit,
            )
            record = self._run.next_record(result, opening)
            reached("judged")
            self._run.save(record)
        self._run.save_costs(result, spending)
        reached("recorded")
        self.state = result.after

    def _certify(self, slot: Slot, on_absent: Callable[[Certificate, str], None]) -> ClosedSlot:
        """Certify the last record, round by round, until our node has the slot's block."""
        beacon_reveal = self._beacon.reveal(self._run.cycles - 1)
        certificates: list[Certificate] = []
        for round_ in range(MAX_ROUND + 1):
            unsigned = certificate_of(self._run.records, slot, round_, beacon_reveal)
            self.awaiting = f"signatures for block {slot.height}, round {round_}"
            certificates.append(self._sign(unsigned))
            reached("signed")
            # A winner has the whole round from now on. The next round's block must also be late enough for the rules.
            begin = max(time.time(), slot.parent_time + round_ * self.params.round_seconds)
            self.awaiting = f"block {slot.height}, round {round_}"
            self._miners.award(certificates[-1])
            reached("awarded")
            if self._wait_for_block(slot.height, begin + self.params.round_seconds):
                reached("block")
                block_hash: str = self._node.call("getblockhash", slot.height)
                return ClosedSlot(self._read_certificate(block_hash, certificates), block_hash, self._run.records[-1])
            on_absent(certificates[-1], self._miners.why_absent(certificates[-1]))
        raise BridgeError(f"block {slot.height}: {MAX_ROUND + 1} winners were absent, and no round is left")

    def _wait_for_block(self, height: int, until: float) -> bool:
        """Wait for our node to have a block at a height, until the clock says `until`. Returns whether it has one."""
        while (left := until - time.time()) > 0:  # a loop, because the clock may be set while we wait
            if self._node.wait_for_height(height, left):
                return True
        return False

    def _read_certificate(self, block_hash: str, certificates: Sequence[Certificate]) -> Certificate:
        """Return the certificate of ours that a block carries. Raises BridgeError if it carries another."""
        body = read_certificate(self._node, block_hash).body()
        for certificate in certificates:
            if certificate.body() == body:
                return certificate
        raise BridgeError(f"{self._node.name} has block {block_hash}, whose certificate is none of this coordinator's")
