"""Doing a task again finds who did not do it, and nobody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from traincert.trainer.cycle import Trainer
from traincert.trainer.determinism import numeric_class
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.errors import EngineError, IntegrityError, Reason
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder
from traincert.trainer.spot_checks import Drawn, SpotCheck, SpotChecker
from traincert.trainer.state import load_state, save_state
from traincert.trainer.store import write_blob
from traincert.trainer.updates import Update, encode_update, read_update

MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


class Done:
    """A task of a job with memories that was done, in its second cycle, and a checker of it."""

    def __init__(self, trainer: Trainer, miners: list[bytes]) -> None:
        self.trainer, self.store = trainer, trainer._engine.store
        state = trainer.run_cycle(trainer.start(), miners, seed=b"first").after
        self.model = state.model
        self.order = trainer.assign(state, miners, b"second")[0]
        (commit,) = trainer._engine.collect(trainer.dataset.shard_folder, [self.order])
        assert isinstance(commit, Commit)
        self.commit = commit
        self.checker = SpotChecker(trainer.dataset, self.store, trainer.segments)

    def check(self, **changes: object) -> SpotCheck:
        """Do the task again, with changes of what the miner was given or has committed to."""
        order = self.order._replace(memory_hash=self.commit.memory_before)
        drawn = Drawn(order, self.commit.update_hash, self.commit.memory_after, numeric_class("cpu"))
        return self.checker.check(drawn._replace(**changes))  # type: ignore[arg-type]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
        """Store another update, and return its SHA-256."""
        job, segment = self.trainer.job, self.trainer.segments[self.order.task.segment]
        data = (self.store / self.commit.update_hash.hex()).read_bytes()
        update = read_update(data, job, segment, self.model)
        return write_blob(self.store, encode_update(Update(change(update.move)), 1)[0])


@pytest.fixture(scope="module")
def done(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Done:
    memories = replace(job, keep_optimizer_state=True)
    with make_trainer(memories, tmp_path_factory.mktemp("done")) as trainer:
        return Done(trainer, miners)


def test_an_honest_task_passes(done: Done) -> None:
    found = done.check()
    assert found.passed
    assert found.found == found.committed == done.commit.update_hash
    assert found.distance is None


def test_another_update_or_memory_fails_in_the_same_class(done: Done) -> None:
    other = done.changed(lambda move: move * (1 + 1e-6))
    found = done.check(update_hash=other)
    assert not found.passed
    assert other.hex() in found.failure
    assert done.commit.update_hash.hex() in found.failure
    assert done.check(memory_after=other).failure == "the update is right, the new memory is not"


def test_another_class_may_be_a_little_off(done: Done) -> None:
    near = done.check(update_hash=done.changed(lambda move: move * 1.01), numeric_class="another machine")
    assert near.passed
    assert near.distance == pytest.approx(0.01, rel=1e-3)
    far = done.check(update_hash=done.changed(lambda move: move * 1.1), numeric_class="another machine")
    assert far.distance == pytest.approx(0.1, rel=1e-3)
    assert far.failure == "the update is 0.1 away from ours, at most 0.05 is allowed"


def test_another_class_does_not_free_from_the_right_memory(done: Done) -> None:
    assert done.commit.memory_after
    memory = load_state(done.store, done.commit.memory_after)
    made_up = save_state(done.store, {name: each * 2 for name, each in memory.items()})
    assert not done.check(memory_after=made_up, numeric_class="another machine").passed
    assert not done.check(memory_after=None, numeric_class="another machine").passed
    other = save_state(done.store, {"x": torch.zeros(1)})
    assert done.check(memory_after=other, numeric_class="another machine").distance == float("inf")


def test_who_does_not_send_its_memory_is_refused_and_checked_again_but_not_barred(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    checked = replace(job, spot_checks=1.0, keep_optimizer_state=True)
    away = miners[0]
    with make_trainer(checked, tmp_path) as trainer:
        store = trainer._engine.store

        def bring(wanted: Mapping[bytes, Sequence[bytes]]) -> None:
            for digest in wanted[away]:
                (store / digest.hex()).rename(tmp_path / "memory")

        first = trainer.run_cycle(trainer.start(), miners, seed=b"1", score_seed=lambda _: b"1")
        trainer._engine.bring = bring  # type: ignore[method-assign]
        second = trainer.run_cycle(first.after, miners, seed=b"2", score_seed=lambda _: b"2")
        (tmp_path / "memory").rename(store / first.after.memories[away].hex())
        del trainer._engine.bring
        third = trainer.run_cycle(second.after, miners, seed=b"3", score_seed=lambda _: b"3")
    assert [(each.miner, each.reason) for each in second.refusals] == [(away, Reason.MEMORY_WITHHELD)]
    assert away not in [each.order.task.miner for each in second.after.drawn]
    assert second.after.memories[away] == first.after.memories[away]
    assert (second.after.standings[away].proven, second.after.standings[away].barred_until) == (False, 0)
    assert third.refusals == ()
    assert away in [each.order.task.miner for each in third.after.drawn]


def test_a_memory_of_nonsense_fails_and_does_not_end_the_checker(done: Done) -> None:
    nonsense = write_blob(done.store, b"\0" * 100)
    found = done.check(order=done.order._replace(memory_hash=nonsense))
    assert found.failure.startswith("the task cannot be done with what its miner sent")
    assert "\n" not in found.failure


def test_a_model_of_ours_that_is_missing_is_not_the_miners_fault(done: Done) -> None:
    lost = done.order._replace(model_hash=bytes(32), memory_hash=None)
    with pytest.raises(IntegrityError):
        SpotChecker(done.trainer.dataset, done.store, done.trainer.segments).check(
            Drawn(lost, done.commit.update_hash, None, numeric_class("cpu"))
        )


def test_who_cheats_is_refused_in_the_next_cycle_and_barred_after_it(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    """Also if the run is loaded from its records in between; and the cheat's memory is forgotten."""
    checked = replace(job, spot_checks=1.0, penalty_cycles=2, keep_optimizer_state=True)
    cheat = miners[0]
    refusals = []
    with RunFolder(tmp_path / "run", checked) as run, make_trainer(checked, tmp_path / "run") as trainer:
        run.begin(trainer.start(), trainer.dataset)
        execute = trainer._engine._executor.execute  # type: ignore[attr-defined]
        cheats = True

        def scaled(shards: Path, order: Order) -> object:
            answer = execute(shards, order)
            if order.task.miner != cheat or not cheats:
                return answer
            segment = trainer.segments[order.task.segment]
            update = read_update(answer.update, checked, segment, load_state(run.store, order.model_hash))
            return answer._replace(update=encode_update(Update(update.move * 1.5), 1)[0])

        trainer._engine._executor.execute = scaled  # type: ignore[attr-defined]
        for cycle in range(6):
            cheats = cycle == 1
            result = trainer.run_cycle(run.load(), miners, seed=run.seed(), score_seed=lambda _: run.seed())
            run.save(run.next_record(result))
            refusals.append({refusal.miner: refusal.reason for refusal in result.refusals})
            failed = [check.miner for check in result.spot_checks if not check.passed]
            assert failed == ([cheat] if cycle == 2 else [])
            assert (cheat in run.memories()) == (cycle not in (2, 3, 4))
    barred = [each.get(cheat) for each in refusals]
    assert barred == [None, None, Reason.SPOT_CHECK_FAILED, Reason.BARRED, Reason.BARRED, None]
    assert all(set(each) <= {cheat} for each in refusals[:3])


def test_closing_ends_a_task_after_its_step(done: Done) -> None:
    """Not at the end of Python: a thread that is in torch then crashes it."""
    begun = Event()
    checker = SpotChecker(done.trainer.dataset, done.store, done.trainer.segments)
    checker._job = replace(done.trainer.job, local_steps=1_000_000)
    on_step = checker._on_step

    def step() -> None:
        begun.set()
        on_step()

    checker._on_step = step  # type: ignore[method-assign]
    order = done.order._replace(memory_hash=done.commit.memory_before)
    future = checker.begin([Drawn(order, done.commit.update_hash, done.commit.memory_after, numeric_class("cpu"))])
    assert begun.wait(60)
    checker.close()
    with pytest.raises(EngineError, match=r"^the spot checker is closed$"):
        future.result(0)
