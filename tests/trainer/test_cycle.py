"""Whole cycles: the same hashes whatever the workers, and a model that learns."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from traincert.trainer.cycle import CycleResult, run_cycle
from traincert.trainer.datasets import Dataset, prepare_dataset, read_examples
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.scoring import Reason, evaluate
from traincert.trainer.state import State, initial_state, state_bytes, state_hash


def run(
    dataset: Dataset, engine: LocalEngine, miners: Sequence[bytes], cycles: int, state: State | None = None
) -> list[CycleResult]:
    results: list[CycleResult] = []
    state = state or initial_state(dataset.job)
    for number in range(cycles):
        seed = hashlib.sha256(bytes([number])).digest()
        results.append(run_cycle(dataset, state, miners, engine, seed=seed))
        state = results[-1].state
    return results


def facts(result: CycleResult) -> tuple[object, ...]:
    """All of a result that can be compared: `state` is tensors, but model_after is its hash."""
    return tuple(value for name, value in vars(result).items() if name != "state")


def test_the_number_of_workers_does_not_matter(
    job: TrainingJob, dataset: Dataset, engine: LocalEngine, miners: list[bytes], tmp_path: Path
) -> None:
    two_workers = [facts(result) for result in run(dataset, engine, miners, 3)]
    assert [facts(result) for result in run(dataset, engine, miners[::-1], 3)] == two_workers
    with LocalEngine(job, tmp_path, workers=1) as one_worker:
        assert [facts(result) for result in run(dataset, one_worker, miners, 3)] == two_workers


def test_a_result_is_consistent(dataset: Dataset, engine: LocalEngine, miners: list[bytes]) -> None:
    first, second = run(dataset, engine, miners, 2)
    model, job = build_model(dataset.job), dataset.job
    validation, test = (read_examples(dataset.directory, digest) for digest in (dataset.validation, dataset.test))
    assert first.model_before == state_hash(initial_state(job))
    assert first.model_after == second.model_before == state_hash(first.state)
    assert first.dataset_root == dataset.root
    assert first.loss_before == evaluate(model, initial_state(job), validation).loss
    assert first.loss_after == second.loss_before == evaluate(model, first.state, validation).loss < first.loss_before
    assert first.accuracy == evaluate(model, first.state, test).accuracy
    assert list(first.contributions) == sorted(first.contributions)
    assert {score.miner for score in first.contributions} | {no.miner for no in first.refusals} == set(miners)
    assert first.params_trained == sum(score.params for score in first.contributions) > 0


def test_the_seed_changes_the_outcome(dataset: Dataset, engine: LocalEngine, miners: list[bytes]) -> None:
    state = initial_state(dataset.job)
    one, other = (run_cycle(dataset, state, miners, engine, seed=seed) for seed in (b"one", b"other"))
    assert one.model_before == other.model_before
    assert one.model_after != other.model_after


def test_progress_is_reported(dataset: Dataset, engine: LocalEngine, miners: list[bytes]) -> None:
    reports: list[tuple[int, int]] = []
    run_cycle(
        dataset,
        initial_state(dataset.job),
        miners,
        engine,
        seed=b"",
        on_update=lambda done, total: reports.append((done, total)),
    )
    assert reports[0] == (0, 4)
    assert reports[-1] == (4, 4)
    assert reports == sorted(reports)


def test_no_miners_leave_the_model_as_it_is(dataset: Dataset, engine: LocalEngine) -> None:
    (result,) = run(dataset, engine, [], 1)
    assert result.model_after == result.model_before
    assert result.contributions == ()
    assert result.refusals == ()
    assert result.params_trained == 0


def test_a_hostile_update_is_refused_and_the_others_count(
    dataset: Dataset, engine: LocalEngine, miners: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real updates, except that on their way one is replaced by the whole model, and one is lost."""
    train = engine.train

    def tampered(*arguments: object) -> list[bytes | None]:
        updates = train(*arguments)  # type: ignore[arg-type]
        return [state_bytes(initial_state(dataset.job)), None, *updates[2:]]

    monkeypatch.setattr(engine, "train", tampered)
    (result,) = run(dataset, engine, miners, 1)
    first, second, *others = sorted(miners)
    assert [(no.miner, no.reason) for no in result.refusals] == [
        (first, Reason.WRONG_NAMES),
        (second, Reason.WORKER_DIED),
    ]
    assert [score.miner for score in result.contributions] == others
    assert result.loss_after < result.loss_before


def test_an_engine_of_another_job_is_an_error(
    dataset: Dataset, engine: LocalEngine, miners: list[bytes], tmp_path: Path
) -> None:
    other = prepare_dataset(replace(dataset.job, seed=5), tmp_path)
    with pytest.raises(ValueError, match="different jobs"):
        run_cycle(other, initial_state(other.job), miners, engine, seed=b"")


def test_the_shipped_job_reaches_its_target_accuracy(miners: list[bytes], tmp_path: Path) -> None:
    job = TrainingJob.named("digits")
    dataset = prepare_dataset(job, tmp_path)
    with LocalEngine(job, tmp_path, workers=2) as engine:
        results = run(dataset, engine, miners, job.cycles)
    assert results[-1].accuracy >= job.target_accuracy
    assert all(result.contributions for result in results)
