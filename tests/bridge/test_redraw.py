"""A winner may be absent: its slot is drawn again, and the chain grows on.

Nodes, coordinator, producers and training are real; only the faults are made here, at the moments that count.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from threading import Event, Lock, Thread

import pytest
from bitcoin.core import CBlock

from traincert.bridge import coordinator as coordinator_module
from traincert.bridge import rpc as rpc_module
from traincert.bridge.chain import read_chain, read_params
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.consensus.rules import contextual_check_training_certificate, read_training_payload
from traincert.bridge.coordinator import ClosedSlot, Coordinator, Slot
from traincert.bridge.errors import BridgeError, JournalError
from traincert.bridge.producer import NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.bridge.testing.invalid import digest
from traincert.regtest import Network, Node, NodeUnreachableError, RegtestError, WaitTimeoutError, wait_for
from traincert.regtest.plugin import NetworkFactory
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import RunFolder
from traincert.trainer.state import save_state, state_hash
from training_chain import COORDINATORS, PAYOUT_SCRIPT

MINERS = 6
SLOTS = 30
BEFORE_CERTIFICATE, BEFORE_SUBMIT, AFTER_SUBMIT = "before the certificate", "before submit", "after submit"

Fault = Callable[[str, Certificate], None]
"""Called at each of the three moments, with the certificate that is on its way."""


def no_fault(_: str, __: Certificate) -> None:
    """Nothing happens."""


class FaultyProducer(NodeProducer):
    """A miner that something happens to around its submitblock."""

    fault: Fault

    def submit(self, node: NodeClient, certificate: Certificate, block: CBlock) -> None:
        self.fault(BEFORE_SUBMIT, certificate)
        super().submit(node, certificate, block)
        self.fault(AFTER_SUBMIT, certificate)


class FaultySigner(Signer):
    """A signer that something happens to when its journal has a certificate which is not signed yet."""

    fault: Fault = staticmethod(no_fault)

    def _record(self, certificate: Certificate) -> None:
        super()._record(certificate)
        self.fault(BEFORE_CERTIFICATE, certificate)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A small model, trained little, so that there is a contribution in every cycle, and it takes no time."""
    options = {"inputs": 64, "hidden": [8], "classes": 10}
    job = replace(TrainingJob.named("digits"), model_options=options, local_steps=9)
    dataset = prepare_dataset(job, tmp_path_factory.mktemp("data"))
    with LocalEngine(job, tmp_path_factory.mktemp("store"), workers=1) as engine, Trainer(dataset, engine) as trainer:
        yield trainer


class LocalMiners:
    """Miners in this process: their producers by key. They are coordinator.Miners."""

    def __init__(self, params: TrainingParams, producers: dict[bytes, NodeProducer]) -> None:
        self.params, self.producers = params, producers
        self.handovers: dict[int, Future[str]] = {}
        self.closed_slots: list[ClosedSlot] = []

    def open(self, slot: Slot, cycle: int) -> tuple[Sequence[bytes], bytes]:
        assert slot.height == self.params.start_height + cycle
        return sorted(self.producers), b""

    def award(self, certificate: Certificate) -> None:
        handover = self.handovers[certificate.round] = Future[str]()

        def produce() -> None:
            try:
                if certificate.winner_key not in self.producers:
                    raise BridgeError("it takes part no longer")
                handover.set_result(self.producers[certificate.winner_key].produce(certificate, self.params))
            except BaseException as error:
                handover.set_exception(error)

        Thread(target=produce, daemon=True).start()

    def why_absent(self, certificate: Certificate) -> str:
        handover = self.handovers[certificate.round]
        if not handover.done():
            return "no answer yet"
        error = handover.exception()
        assert error is None or isinstance(error, BridgeError | RegtestError)
        return str(error) if error else "its node took the block"

    def closed(self, slot: ClosedSlot) -> None:
        self.closed_slots.append(slot)


def begin(run: RunFolder, trainer: Trainer) -> None:
    """Begin a run. The trainer has put its files into its own store, which all trials share."""
    state = trainer.start()
    save_state(run.store, state.model)
    save_state(run.store, {"velocity": state.velocity})
    run.begin(state, trainer.dataset)


class Trial:
    """A network whose first node is the coordinator's alone; the miners share the others. `fault` may be set."""

    def __init__(self, start: NetworkFactory, stack: ExitStack, trainer: Trainer, path: Path) -> None:
        state = trainer.start()
        beacon = Beacon(digest("beacon"))
        keys = TrainingKeys(2, tuple(key.public_key_xonly.format() for key in COORDINATORS))
        self.params = TrainingParams({1: keys}, beacon.anchor, state_hash(state.model), round_seconds=1)
        self.network: Network = start(4, self.params.node_options())
        self.nodes: dict[bytes, Node] = {}
        self.producers: dict[bytes, NodeProducer] = {}
        for number in range(MINERS):
            secret = digest(f"miner {number}")
            node = self.network.nodes[1 + number % 3]
            producer = FaultyProducer(secret, PAYOUT_SCRIPT, node.datadir)
            producer.fault = self._fault
            self.nodes[producer.miner_key], self.producers[producer.miner_key] = node, producer
        self.fault: Fault = no_fault
        self.absent: list[tuple[Certificate, str]] = []
        self.journal = path / "journal.sqlite"
        signer = self.make_signer(self.journal)
        signer.fault = self._fault
        client = stack.enter_context(NodeClient.from_datadir(self.network.nodes[0].datadir))
        self.run = stack.enter_context(RunFolder(path / "run", trainer.job))
        begin(self.run, trainer)
        self.miners = LocalMiners(self.params, self.producers)

        def make_coordinator(signer: Signer, run: RunFolder) -> Coordinator:
            return Coordinator(self.params, signer.sign, beacon, client, trainer, run, self.miners)

        self.make_coordinator = make_coordinator
        self.coordinator = make_coordinator(signer, self.run)

    def make_signer(self, journal: Path) -> FaultySigner:
        return FaultySigner(journal, self.params.chain_id, {i: COORDINATORS[i].secret for i in (0, 2)})

    def _fault(self, moment: str, certificate: Certificate) -> None:
        self.fault(moment, certificate)

    def close_slot(self) -> ClosedSlot:
        return self.coordinator.close_slot(on_absent=lambda *absent: self.absent.append(absent))

    def signed(self) -> dict[tuple[int, bytes, int], bytes]:
        """Bodies in the journal by height, parent and round."""
        with closing(sqlite3.connect(self.journal)) as database:
            rows = database.execute("SELECT height, prev_block, round, body FROM signed").fetchall()
        signed = {(height, prev_block, round_): body for height, prev_block, round_, body in rows}
        assert len(signed) == len(rows)
        return signed

    def check(self, height: int) -> None:
        """Whether all nodes agree on a valid chain, and nobody has seen two certificates for a slot and round.

        Each block commits to the record of its cycle.

        A winner that was late, which a busy machine is enough for where a round takes a second, leaves a rival to the
        last block: the next slot decides.
        """
        try:
            self.network.wait_until_same_tip()
        except WaitTimeoutError:
            assert {node.rpc("getblockcount") for node in self.network.nodes} == {height}
            assert any(certificate.height == height for certificate, _ in self.absent)
            height = self.close_slot().certificate.height
            self.network.wait_until_same_tip()
        seen = defaultdict(set)
        for node in self.network.nodes:
            with NodeClient.from_datadir(node.datadir) as client:
                assert read_params(client) == self.params
                chain = read_chain(client, self.params)
                assert len(chain) == height
                assert [block.certificate.record for block in chain] == self.run.hashes[1:]
            for certificate in certificates_of(node):
                slot = (certificate.height, certificate.prev_block, certificate.round)
                seen[slot].add(certificate.body())
        signed = self.signed()
        assert {slot: {signed[slot]} for slot in seen} == seen


def certificates_of(node: Node) -> Iterator[Certificate]:
    """The certificates of all blocks whose bodies a node has, in its chain or not."""
    done = {node.rpc("getblockhash", 0)}
    for tip in node.rpc("getchaintips"):
        if tip["status"] in ("headers-only", "invalid"):
            assert tip["status"] != "invalid", tip
            continue
        block_hash = tip["hash"]
        while block_hash not in done:
            done.add(block_hash)
            block = CBlock.deserialize(bytes.fromhex(node.rpc("getblock", block_hash, 0)))
            yield read_training_payload(block.vtx[0]).certificate
            block_hash = block.hashPrevBlock[::-1].hex()


@pytest.fixture
def trial(bitcoin_network: NetworkFactory, trainer: Trainer, tmp_path: Path) -> Iterator[Trial]:
    with ExitStack() as stack:
        yield Trial(bitcoin_network, stack, trainer, tmp_path)


def test_the_chain_grows_while_winners_are_killed_at_random(trial: Trial) -> None:
    """In three of four slots the first winner's node is killed, at a moment and for a time that are drawn."""
    random = Random(1)  # noqa: S311 - it has to be the same again, not secret
    lock, must_redraw = Lock(), 0
    for height in range(1, SLOTS + 1):
        moment = random.choice([BEFORE_CERTIFICATE, BEFORE_SUBMIT, AFTER_SUBMIT, None])
        killed = Event()

        def kill(when: tuple[int, str | None], killed: Event, now: str, certificate: Certificate) -> None:
            with lock:
                if trial.fault is not no_fault and (certificate.height, now) == when and certificate.round == 0:
                    trial.nodes[certificate.winner_key].kill()
                    killed.set()

        trial.fault = partial(kill, (height, moment), killed)
        slot = trial.close_slot()
        assert slot.certificate.height == height
        if moment in (BEFORE_CERTIFICATE, BEFORE_SUBMIT):
            assert slot.certificate.round > 0
            must_redraw += 1
        if moment and slot.certificate.round == 0:
            assert killed.wait(60)
        with lock:  # a winner that is late is spared now: its node may be one that is started again
            trial.fault = no_fault
        stopped = [node for node in trial.network.nodes if node.pid is None]
        for node in stopped:
            if len(stopped) > 1 or random.random() < 0.5:  # one that is killed next must not be the last
                node.start()
        trial.network.connect()
    assert must_redraw > 8
    assert len(trial.absent) >= must_redraw
    for node in trial.network.nodes:
        node.start()
    trial.network.connect()
    trial.check(SLOTS)
    assert len(trial.signed()) == trial.coordinator.state.cycle + len(trial.absent)


def test_a_winner_whose_node_hangs_holds_up_nobody(trial: Trial) -> None:
    hung: list[Node] = []

    def hang(now: str, certificate: Certificate) -> None:
        if now == BEFORE_SUBMIT and certificate.round == 0:
            hung.append(trial.nodes[certificate.winner_key])
            assert hung[-1].pid is not None
            os.kill(hung[-1].pid, signal.SIGSTOP)

    trial.fault = hang
    try:
        slot = trial.close_slot()
        assert slot.certificate.round > 0
        assert "no answer yet" in {reason for _, reason in trial.absent}
        assert all(trial.nodes[certificate.winner_key] is hung[0] for certificate, _ in trial.absent)
    finally:
        for node in hung:
            assert node.pid is not None
            os.kill(node.pid, signal.SIGCONT)
    # Its submitblock comes through now: a rival for a slot that is closed, which the next slot decides.
    wait_for(lambda: len(hung[0].rpc("getchaintips")) == 2, 30, "the late block to be stored")
    trial.fault = no_fault
    assert trial.close_slot().certificate.height == 2
    trial.check(2)


def test_a_late_block_of_an_earlier_round_closes_the_slot(trial: Trial) -> None:
    """The first winner's block comes after the second winner was drawn, but before it has made its own."""
    redrawn = Event()

    def fault(now: str, certificate: Certificate) -> None:
        if now == BEFORE_CERTIFICATE and certificate.round == 1:
            redrawn.set()
        if now == BEFORE_SUBMIT:
            assert redrawn.wait(60)
            if certificate.round > 0:
                raise BridgeError("gone for good")

    trial.fault = fault
    slot = trial.close_slot()
    assert slot.certificate.round == 0
    assert [(certificate.round, reason) for certificate, reason in trial.absent] == [(0, "no answer yet")]
    assert sorted(round_ for _, __, round_ in trial.signed()) == [0, 1]
    trial.fault = no_fault
    assert trial.close_slot().certificate.height == 2
    trial.check(2)


def test_each_round_draws_again_from_the_same_tables(trial: Trial) -> None:
    """With all miners absent but one round's winner, its certificate differs from the first one's in nothing else."""
    first = trial.close_slot()

    def fault(now: str, certificate: Certificate) -> None:
        if now == BEFORE_SUBMIT and certificate.round < 3:
            raise BridgeError(f"not in round {certificate.round}")

    trial.fault = fault
    slot = trial.close_slot()
    assert slot.certificate.round == 3
    assert [reason for _, reason in trial.absent] == [f"not in round {round_}" for round_ in range(3)]
    for certificate, _ in trial.absent:
        contextual_check_training_certificate(certificate, first.certificate, 2**32 - 1, 0, trial.params)
        last = slot.certificate
        assert replace(certificate, round=3, winner_key=last.winner_key, draw=last.draw).body() == last.body()
    trial.check(2)


def test_a_winner_that_has_left_is_absent(trial: Trial) -> None:
    def fault(now: str, certificate: Certificate) -> None:
        if now == BEFORE_CERTIFICATE and certificate.round == 0:
            del trial.producers[certificate.winner_key]

    trial.fault = fault
    assert trial.close_slot().certificate.round == 1
    assert [reason for _, reason in trial.absent] == ["it takes part no longer"]


def test_the_last_round_is_told(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "MAX_ROUND", 1)

    def fault(now: str, _: Certificate) -> None:
        if now == BEFORE_SUBMIT:
            raise BridgeError("away")

    trial.fault = fault
    with pytest.raises(BridgeError, match="block 1: 2 winners were absent, and no round is left"):
        trial.close_slot()


def test_where_there_is_no_table_each_round_appoints_another_miner(trial: Trial) -> None:
    def fault(now: str, certificate: Certificate) -> None:
        if now == BEFORE_SUBMIT and certificate.round < 1:
            raise BridgeError("away")

    trial.fault = fault
    slot = trial.close_slot()
    ((absent, reason),) = trial.absent
    assert (slot.certificate.round, slot.certificate.award, reason) == (1, "appointed", "away")
    assert absent.winner_key != slot.certificate.winner_key


def test_a_coordinator_that_was_killed_signs_the_same_certificate_again_and_no_other(
    trial: Trial, trainer: Trainer
) -> None:
    """It ended after the journal had the certificate, and before anyone else did."""

    class Killed(BaseException):
        pass

    def fault(_: str, __: Certificate) -> None:
        raise Killed

    trial.fault = fault
    with pytest.raises(Killed):
        trial.close_slot()
    (body,) = trial.signed().values()
    trial.fault = no_fault
    trial.producers.popitem()  # other miners now; but the cycle is recorded, and is not run again
    shutil.copytree(trainer._engine.store, trial.run.store, dirs_exist_ok=True)  # all trials share the trainer
    trial.coordinator = trial.make_coordinator(trial.make_signer(trial.journal), trial.run)
    assert trial.close_slot().certificate.body() == body
    trial.check(1)


def test_a_coordinator_whose_records_are_lost_cannot_sign_another_certificate(
    trial: Trial, trainer: Trainer, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def fault(_: str, __: Certificate) -> None:
        raise Killed

    trial.fault = fault
    with pytest.raises(Killed):
        trial.close_slot()
    trial.producers.popitem()  # other miners, another cycle
    with RunFolder(tmp_path / "another run", trainer.job) as run:
        begin(run, trainer)
        coordinator = trial.make_coordinator(trial.make_signer(trial.journal), run)
        with pytest.raises(JournalError, match="block 1, round 0"):
            coordinator.close_slot()


def test_the_coordinator_goes_on_after_its_own_node_was_restarted(trial: Trial) -> None:
    trial.close_slot()
    own = trial.network.nodes[0]
    own.kill()
    own.start()
    trial.network.connect()

    def fault(now: str, certificate: Certificate) -> None:
        if now == BEFORE_SUBMIT and certificate.round == 0:
            own.restart()
            trial.network.connect()

    trial.fault = fault
    assert trial.close_slot().certificate.height == 2
    trial.check(2)


def test_the_coordinator_ends_when_its_own_node_is_gone(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "RETRY_TIME", 0.2)

    def fault(now: str, _: Certificate) -> None:
        if now == BEFORE_SUBMIT:
            trial.network.nodes[0].kill()

    trial.fault = fault
    with pytest.raises(NodeUnreachableError, match=r"^node0 at .* does not answer: "):
        trial.close_slot()


def test_a_block_of_another_coordinator_with_the_same_keys_is_told(
    trial: Trial, trainer: Trainer, tmp_path: Path
) -> None:
    with RunFolder(tmp_path / "another run", trainer.job) as run:
        begin(run, trainer)
        other = trial.make_coordinator(trial.make_signer(tmp_path / "another journal"), run)

        def fault(now: str, _: Certificate) -> None:
            if now == BEFORE_CERTIFICATE:
                trial.fault = no_fault
                trial.producers.popitem()
                other.close_slot()

        trial.fault = fault
        with pytest.raises(BridgeError, match="whose certificate is none of this coordinator's"):
            trial.close_slot()
