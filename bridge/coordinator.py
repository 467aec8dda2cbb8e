"""The coordinator's loop: run a cycle, certify the drawn winner, wait for its block, draw again if it is absent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from bitcoin.core import CBlock, lx

from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate, Draw, draw_winner, new_certificate
from traincert.bridge.consensus.codec import tagged_hash
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.consensus.rules import read_training_payload
from traincert.bridge.errors import BridgeError
from traincert.bridge.producer import NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.regtest.errors import RegtestError
from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.records import RunFolder, record_hash
from traincert.trainer.scoring import Contribution

MAX_ROUND = 2**16 - 1
OWN_NODE_TIME = 30.0  # seconds for the coordinator's node to come back to its tip after a restart


@dataclass(frozen=True)
class ClosedSlot:
    """A cycle and the block that closed it."""

    certificate: Certificate
    block_hash: str
    result: CycleResult


def contribution_table(contributions: Iterable[Contribution]) -> ContributionTable:
    """Return the table of a cycle's contributions."""
    return ContributionTable(
        Leaf(each.miner, each.update_hash, each.params, each.loss_reduction, each.weight) for each in contributions
    )


class Coordinator:
    """Runs cycles, certifies them, and saves them in `run`.

    The run has begun. Its last record says what the next cycle starts from, and from which table the next winner is
    drawn. So a coordinator goes on after a crash.
    """

    def __init__(
        self,
        params: TrainingParams,
        signer: Signer,
        beacon: Beacon,
        node: NodeClient,
        trainer: Trainer,
        run: RunFolder,
    ) -> None:
        self.params = params
        self.state = run.load()
        self.table = contribution_table(run.contributions())
        self._signer = signer
        self._beacon = beacon
        self._node = node
        self._trainer = trainer
        self._run = run
        self._tip: str | None = None  # the block that closed the last slot

    def close_slot(
        self,
        producers: Mapping[bytes, NodeProducer],
        on_update: Callable[[int, int], None] | None = None,
        on_absent: Callable[[Certificate, str], None] | None = None,
    ) -> ClosedSlot:
        """Run one cycle with all miners, certify it, wait for the winner's block, and save the cycle's record.

        If the block does not come within the round's time, the next round's winner gets a certificate for the same
        cycle, and so on. A late block of an earlier round's winner closes the slot too. So does a block that the chain
        has from before a crash, if this cycle's result is what that block certifies.

        `producers` are the miners by their key. `on_update` is called with the number of tasks done and their total.
        `on_absent` is called for each winner whose time is over, with its certificate and what is known of the reason.

        Raises BridgeError if the coordinator's own node leaves the chain that is being built, RegtestError if that node
        fails, and JournalError if the journal has another certificate for the slot.
        """
        height = self.params.start_height + self.state.cycle
        tip = self._find_parent(height)
        parent = self._node.call("getblockheader", tip)
        prev_block: bytes = lx(tip)
        # The parent's hash decides who trains what: nobody knows it before the parent's winner has signed, so nobody
        # can choose.
        seed = tagged_hash("traincert/assignment", self._trainer.job.seed.to_bytes(8, "little") + prev_block)
        result = self._trainer.run_cycle(self.state, list(producers), seed=seed, on_update=on_update)
        table = contribution_table(result.contributions)
        record = self._run.next_record(result)
        beacon_reveal = self._beacon.reveal(self.state.cycle)
        present = self._certificate_at(height)
        certificates: list[Certificate] = []
        for round_ in range(MAX_ROUND + 1):
            certificate = new_certificate(
                height=height,
                prev_block=prev_block,
                round_=round_,
                beacon_reveal=beacon_reveal,
                model_before=result.model_before,
                model_after=result.model_after,
                dataset_root=result.dataset_root,
                record=record_hash(record),
                losses=(result.loss_before, result.loss_after),
                table=table,
                winner=self._draw(beacon_reveal, prev_block, height, round_, sorted(producers)),
            )
            certificates.append(self._signer.sign(certificate))
            if present:
                if round_ < present.round:
                    continue
                break
            # A winner has the whole round from now on. The next round's block must also be late enough for the rules.
            begin = max(time.time(), parent["time"] + round_ * self.params.round_seconds)
            handover = _hand_over(certificates[-1], producers.get(certificate.winner_key), self.params)
            if self._wait_for_block(height, begin + self.params.round_seconds):
                break
            reason = _why_absent(handover)
            if on_absent:
                on_absent(certificates[-1], reason)
        else:
            raise BridgeError(f"block {height}: {MAX_ROUND + 1} winners were absent, and no round is left")
        block_hash: str = self._node.call("getblockhash", height)
        certificate = self._read_certificate(block_hash, certificates)
        self._run.save(record)
        self.state, self.table = result.after, table
        self._tip = None if present else block_hash  # more blocks from before the crash may follow
        return ClosedSlot(certificate, block_hash, result)

    def _find_parent(self, height: int) -> str:
        """Return the hash of the block below a height: the block that closed the last slot."""
        if self._tip:
            if not self._node.wait_for_tip(self._tip, OWN_NODE_TIME):
                raise BridgeError(f"{self._node.name} has left block {self._tip}, which closed the slot before")
            return self._tip
        if not self._node.wait_for_height(height - 1, OWN_NODE_TIME):
            raise BridgeError(f"{self._node.name} has no block {height - 1}, which closed the slot before")
        block_hash: str = self._node.call("getblockhash", height - 1)
        if self.state.cycle and self._certificate_in(block_hash).record != self._run.head:
            raise BridgeError(
                f"{self._node.name}: block {block_hash} does not certify the record of cycle {self.state.cycle}"
            )
        return block_hash

    def _certificate_at(self, height: int) -> Certificate | None:
        """Return the certificate of our node's block at a height, or None if there is no block."""
        if self._node.call("getblockcount") < height:
            return None
        return self._certificate_in(self._node.call("getblockhash", height))

    def _certificate_in(self, block_hash: str) -> Certificate:
        block = CBlock.deserialize(bytes.fromhex(self._node.call("getblock", block_hash, 0)))
        return read_training_payload(block.vtx[0]).certificate

    def _wait_for_block(self, height: int, until: float) -> bool:
        """Wait for our node to have a block at a height, until the clock says `until`. Returns whether it has one."""
        while (left := until - time.time()) > 0:  # a loop, because the clock may be set while we wait
            if self._node.wait_for_height(height, left):
                return True
        return False

    def _read_certificate(self, block_hash: str, certificates: Sequence[Certificate]) -> Certificate:
        """Return the certificate of ours that a block carries. Raises BridgeError if it carries another."""
        body = self._certificate_in(block_hash).body()
        for certificate in certificates:
            if certificate.body() == body:
                return certificate
        raise BridgeError(f"{self._node.name} has block {block_hash}, whose certificate is none of this coordinator's")

    def _draw(
        self, beacon_reveal: bytes, prev_block: bytes, height: int, round_: int, miners: list[bytes]
    ) -> tuple[bytes, Draw | None]:
        if not self.table.count:  # no table to draw from: the coordinator appoints the miners in turn
            return miners[(height + round_) % len(miners)], None
        return draw_winner(self.table, beacon_reveal, prev_block, round_)


def _hand_over(certificate: Certificate, producer: NodeProducer | None, params: TrainingParams) -> Future[str]:
    """Give a certificate to its winner, and to nobody else, without waiting for the winner's block.

    A winner whose node hangs may answer much later, or never. A daemon thread delays neither the loop nor the end of
    the process.
    """
    handover = Future[str]()

    def produce() -> None:
        try:
            if producer is None:
                raise BridgeError("it takes part no longer")
            handover.set_result(producer.produce(certificate, params))
        except BaseException as error:  # _why_absent tells it, or raises it
            handover.set_exception(error)

    Thread(target=produce, name=f"block {certificate.height}, round {certificate.round}", daemon=True).start()
    return handover


def _why_absent(handover: Future[str]) -> str:
    """Return what is known of a winner whose block did not come. Raises an error that is not the winner's fault."""
    if not handover.done():
        return "no answer yet"
    error = handover.exception()
    if error is None:
        return f"its node took block {handover.result()}, but ours has not heard of it"
    if not isinstance(error, BridgeError | RegtestError):
        raise error
    return str(error)
