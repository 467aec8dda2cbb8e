"""The coordinator's loop: cycle, table, draw, certificate, wait for the block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bitcoin.core import lx
from coincurve import PrivateKey

from traincert.bridge.beacon import Beacon
from traincert.bridge.certificate import Certificate, Draw
from traincert.bridge.codec import tagged_hash
from traincert.bridge.errors import BridgeError
from traincert.bridge.journal import Journal
from traincert.bridge.lottery import ContributionTable, Leaf, draw_ticket
from traincert.bridge.node import NodeClient
from traincert.bridge.params import TrainingParams
from traincert.bridge.producer import Producer
from traincert.trainer.cycle import CycleResult, run_cycle
from traincert.trainer.datasets import Dataset
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.state import State


@dataclass(frozen=True)
class ClosedSlot:
    """A cycle and the block that closed it."""

    certificate: Certificate
    block_hash: str
    result: CycleResult


class Coordinator:
    """Runs cycles and certifies them.

    `secrets` are its secret keys by their position among those in force: as many as must sign. `state` is the model
    that the next cycle starts from, and `table` the one that the next winner is drawn from.
    """

    def __init__(
        self,
        params: TrainingParams,
        secrets: Mapping[int, PrivateKey],
        beacon: Beacon,
        journal: Journal,
        node: NodeClient,
        dataset: Dataset,
        state: State,
        engine: LocalEngine,
    ) -> None:
        self.params = params
        self.state = state
        self.table = ContributionTable([])
        self._secrets = secrets
        self._beacon = beacon
        self._journal = journal
        self._node = node
        self._dataset = dataset
        self._engine = engine

    def close_slot(
        self, producers: Mapping[bytes, Producer], on_update: Callable[[int, int], None] | None = None
    ) -> ClosedSlot:
        """Run one cycle with all miners, certify it, and wait for the winner's block.

        `producers` are the miners by their key; `on_update` is called with the number of tasks done and their total.

        Raises BridgeError if the winner's block does not come within the round's time.
        """
        tip = self._node.call("getbestblockhash")
        prev_block: bytes = lx(tip)
        height = self._node.call("getblockheader", tip)["height"] + 1
        # Nobody chooses who trains what: nobody knows the parent's hash before its winner has signed it.
        seed = tagged_hash("traincert/assignment", self._dataset.job.seed.to_bytes(8, "little") + prev_block)
        result = run_cycle(self._dataset, self.state, list(producers), self._engine, seed=seed, on_update=on_update)
        table = ContributionTable(
            Leaf(each.miner, each.update_hash, each.params, each.loss_reduction, each.weight)
            for each in result.contributions
        )
        beacon_reveal = self._beacon.reveal(height - self.params.start_height)
        winner_key, draw = self._draw(beacon_reveal, prev_block, height, sorted(producers))
        certificate = Certificate(
            height=height,
            prev_block=prev_block,
            beacon_reveal=beacon_reveal,
            model_before=result.model_before,
            model_after=result.model_after,
            dataset_root=result.dataset_root,
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            params_trained=result.params_trained,
            contributions_root=table.root,
            contributions_weight=table.weight,
            contributions_count=table.count,
            winner_key=winner_key,
            draw=draw,
        )
        self._journal.record(certificate, self.params.chain_id)
        certificate = certificate.sign(self.params.chain_id, self._secrets)
        block_hash = producers[winner_key].produce(certificate, self.params.chain_id)
        if not self._node.wait_for_block(block_hash, self.params.round_seconds):
            raise BridgeError(
                f"{self._node.name} did not get block {height} {block_hash} of miner {winner_key.hex()} within "
                f"{self.params.round_seconds} s"
            )
        self.state, self.table = result.state, table
        return ClosedSlot(certificate, block_hash, result)

    def _draw(
        self, beacon_reveal: bytes, prev_block: bytes, height: int, miners: list[bytes]
    ) -> tuple[bytes, Draw | None]:
        if not self.table.count:  # nothing to draw from: the coordinator appoints, one miner after the other
            return miners[height % len(miners)], None
        index = self.table.find(draw_ticket(beacon_reveal, prev_block, 0, self.table.weight))
        leaf = self.table.leaves[index]
        siblings = self.table.path(index)
        return leaf.miner_key, Draw(leaf.update_hash, leaf.params, leaf.loss_reduction, leaf.weight, index, siblings)
