"""Whole cycles: the same hashes whatever the workers, and a model that learns."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from evaluation import evaluate
from traincert.trainer import state as state_module
from traincert.trainer.cycle import Checkpoint, CycleResult, Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit
from traincert.trainer.errors import IntegrityError, JobError, Reason
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import State, initial_state, load_state, save_state, state_bytes, state_hash, state_parts
from traincert.trainer.store import prune, read_blob, write_blob
from traincert.trainer.updates import Update, encode_update, read_update

WriteJob = Callable[..., Path]
MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


def run(
    trainer: Trainer, miners: Sequence[bytes], cycles: int, state: Checkpoint | None = None, seeds: int = 0
) -> list[CycleResult]:
    results: list[CycleResult] = []
    state = state or trainer.start()
    for number in range(cycles):
        seed = hashlib.sha256(bytes([seeds + number])).digest()
        results.append(trainer.run_cycle(state, miners, seed=seed))
        state = results[-1].after
    return results


def facts(result: CycleResult) -> tuple[object, ...]:
    """All of a result that can be compared: `after` is tensors, but model_after is its hash."""
    tasks = [
        replace(task, commit=task.commit and task.commit._replace(seconds=0.0, resources=None)) for task in result.tasks
    ]
    others = {name: value for name, value in vars(result).items() if name not in ("after", "tasks")}
    return (others, tasks, result.after.memories, state_hash({"velocity": result.after.velocity}))


def test_a_cycle_serializes_its_model_once_and_its_checkpoint_has_the_hash(
    trainer: Trainer, miners: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = trainer.start()
    serialized = []

    def counted(tensors: State) -> list[memoryview]:
        serialized.append(tensors.keys() == start.model.keys())
        return state_parts(tensors)

    monkeypatch.setattr(state_module, "state_parts", counted)
    (result,) = run(trainer, miners, 1, start)
    assert serialized.count(True) == 1
    monkeypatch.undo()
    assert result.after.model_hash == state_hash(result.after.model) == result.model_after
    assert start.model_hash == state_hash(start.model) == result.model_before


def test_neither_workers_nor_the_miners_order_matter(
    make_trainer: MakeTrainer, job: TrainingJob, trainer: Trainer, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(job, tmp_path) as without_workers:
        expected = [facts(result) for result in run(without_workers, miners, 3)]
    assert [facts(result) for result in run(trainer, miners[::-1], 3)] == expected


def test_a_result_is_consistent(trainer: Trainer, miners: list[bytes]) -> None:
    first, second = run(trainer, miners, 2)
    model, job = build_model(trainer.job), trainer.job
    assert first.model_before == state_hash(initial_state(job))
    assert first.model_after == second.model_before == state_hash(first.after.model)
    assert first.dataset_root == trainer.dataset.root
    assert first.loss_before == evaluate(model, job, initial_state(job), trainer.validation).loss
    found = evaluate(model, job, first.after.model, trainer.validation)
    assert first.loss_after == second.loss_before == found.loss < first.loss_before
    assert first.metric == first.after.evaluation.metric == found.metric
    assert [task.order.task.miner for task in first.tasks] == sorted(miners)
    assert all((task.contribution is None) != (task.refusal is None) for task in first.tasks)
    assert first.params_trained == sum(score.params for score in first.contributions) > 0
    assert (first.after.cycle, second.after.cycle) == (1, 2)
    assert {task.order.task.segment for task in first.tasks} == set(range(len(trainer.segments)))
    assert {task.order.task.cycle for task in second.tasks} == {1}


def test_a_run_goes_on_from_a_model_that_was_trained(
    make_trainer: MakeTrainer, job: TrainingJob, trainer: Trainer, miners: list[bytes], tmp_path: Path
) -> None:
    trained = run(trainer, miners, 2)[-1].after
    path = tmp_path / "trained.safetensors"
    path.write_bytes(state_bytes(trained.model))
    with make_trainer(replace(job, initial_model=str(path)), tmp_path) as going_on:
        start = going_on.start()
        assert state_hash(start.model) == state_hash(trained.model)
        assert start.evaluation == trained.evaluation
        assert run(going_on, miners, 1)[0].model_before == state_hash(trained.model)


def test_a_cycle_without_updates_keeps_everything(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(replace(job, outer_momentum=0.5, density=0.5), tmp_path) as trainer:
        (first,) = run(trainer, miners, 1)
        (empty,) = run(trainer, [], 1, first.after)
    assert first.after.velocity.any()
    assert torch.equal(empty.after.velocity, first.after.velocity)
    assert empty.after.memories == first.after.memories
    assert empty.model_after == empty.model_before
    kept = {empty.model_after, *first.after.memories.values()}
    prune(tmp_path / "store", kept)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {digest.hex() for digest in kept}


def test_the_seed_changes_the_outcome(trainer: Trainer, miners: list[bytes]) -> None:
    one, other = run(trainer, miners, 1), run(trainer, miners, 1, seeds=1)
    assert one[0].model_before == other[0].model_before
    assert one[0].model_after != other[0].model_after


def test_progress_is_reported(trainer: Trainer, miners: list[bytes]) -> None:
    reports: list[tuple[int, int]] = []
    trainer.run_cycle(trainer.start(), miners, seed=b"", on_commit=lambda done, total: reports.append((done, total)))
    assert reports[0] == (0, 4)
    assert reports[-1] == (4, 4)
    assert reports == sorted(reports)


def test_the_number_of_miners_may_change_between_cycles(trainer: Trainer, miners: list[bytes]) -> None:
    state = trainer.start()
    for count in (1, 4, 0, 3):
        result = trainer.run_cycle(state, miners[:count], seed=bytes([count]))
        assert len(result.tasks) == count
        state = result.after
    assert state.evaluation.loss < trainer.start().evaluation.loss


def test_no_miners_leave_the_model_as_it_is(trainer: Trainer) -> None:
    (result,) = run(trainer, [], 1)
    assert result.model_after == result.model_before
    assert result.contributions == ()
    assert result.refusals == ()
    assert result.params_trained == 0


def test_a_cycle_in_which_nothing_helps_has_an_empty_table_and_the_same_model(
    make_trainer: MakeTrainer, write_job: WriteJob, miners: list[bytes], tmp_path: Path
) -> None:
    """A loss whose gradient has the wrong sign; the next cycle goes on."""
    module = """
        from torch.nn.functional import cross_entropy

        def loss(outputs, target):
            value = cross_entropy(outputs, target)
            return 2 * value.detach() - value
    """
    job = TrainingJob.load(write_job(module, loss='"{module}:loss"', outer_momentum="0.9"))
    with make_trainer(job, tmp_path) as trainer:
        first, second = run(trainer, miners, 2)
    for result in (first, second):
        assert result.contributions == ()
        assert [no.reason for no in result.refusals] == [Reason.NO_IMPROVEMENT] * 4
        assert result.model_after == result.model_before
        assert result.loss_after == result.loss_before
        assert not result.after.velocity.any()


@pytest.mark.parametrize("density", ["1.0", "0.1"])
def test_numbers_that_are_none_are_refused_as_that(
    make_trainer: MakeTrainer, write_job: WriteJob, miners: list[bytes], tmp_path: Path, density: str
) -> None:
    """A loss whose gradient is NaN."""
    module = """
        import torch

        def loss(outputs, target):
            return torch.sqrt(outputs.sum() * 0)
    """
    job = TrainingJob.load(write_job(module, loss='"{module}:loss"', density=density))
    with make_trainer(job, tmp_path) as trainer:
        (result,) = run(trainer, miners, 1)
    assert [no.reason for no in result.refusals] == [Reason.NOT_FINITE] * 4
    assert result.after.memories == {}
    assert result.model_after == result.model_before


def test_a_hostile_update_is_refused_and_the_others_count(
    trainer: Trainer, engine: LocalEngine, miners: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real updates, except that on their way one is replaced by a whole model, and one is lost."""
    train = engine._run

    def tampered(*arguments: object) -> list[Commit | Reason]:
        commits = train(*arguments)  # type: ignore[arg-type]
        model = save_state(engine.store, initial_state(replace(trainer.job, seed=7)))
        return [Commit(model, 1, None, None, 0.0), Reason.WORKER_DIED, *commits[2:]]

    monkeypatch.setattr(engine, "_run", tampered)
    (result,) = run(trainer, miners, 1)
    first, second, *others = sorted(miners)
    assert [(no.miner, no.reason) for no in result.refusals] == [
        (first, Reason.WRONG_NAMES),
        (second, Reason.WORKER_DIED),
    ]
    assert [score.miner for score in result.contributions] == others
    assert result.loss_after < result.loss_before
    assert result.tasks[0].commit is not None
    assert result.tasks[1].commit is None


def test_updates_of_which_each_does_harm_count_if_their_mean_helps(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real updates with noise that is gone from their mean: each is scored at the share that it has of it."""
    whole = replace(job, segments=1, max_update_norm=100.0)
    with make_trainer(whole, tmp_path) as trainer:
        (plain,) = run(trainer, miners, 1)
        (segment,) = trainer.segments
        assert isinstance(trainer._engine, LocalEngine)
        train, store = trainer._engine._run, trainer._engine.store
        noise = torch.randn(segment.params, generator=torch.Generator().manual_seed(0)) * 0.5

        def noisy(*arguments: object) -> list[Commit | Reason]:
            commits: list[Commit | Reason] = []
            for commit, sign in zip(train(*arguments), (1, -1, 1, -1), strict=True):  # type: ignore[arg-type]
                assert isinstance(commit, Commit)
                update = read_update(read_blob(store, commit.update_hash), whole, segment, trainer.start().model)
                changed = Update(update.move + sign * noise)
                alone = trainer.evaluate(changed.applied(trainer.layout, segment, trainer.start().model))
                assert alone.loss > trainer.start().evaluation.loss
                commits.append(commit._replace(update_hash=write_blob(store, encode_update(changed, 1)[0])))
            return commits

        monkeypatch.setattr(trainer._engine, "_run", noisy)
        (result,) = run(trainer, miners, 1)
    assert len(result.contributions) == 4
    assert result.loss_after == pytest.approx(plain.loss_after, rel=0.1)


def test_a_move_that_makes_the_model_much_worse_is_halved_or_not_made(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update helps, but nineteen times their mean does not."""
    wild = replace(job, outer_learning_rate=10.0, outer_momentum=0.9, guard=0.2, density=0.5)
    with make_trainer(replace(wild, guard=1e9), tmp_path) as trainer:
        (unguarded,) = run(trainer, miners, 1)
    assert unguarded.loss_after > 1.2 * unguarded.loss_before
    with make_trainer(wild, tmp_path) as trainer:
        (halved,) = run(trainer, miners, 1)
        assert len(halved.contributions) == 4
        assert halved.loss_after <= 1.2 * halved.loss_before
        assert halved.model_after != halved.model_before
        shares = halved.after.velocity / unguarded.after.velocity
        (share,) = set(shares[unguarded.after.velocity != 0].tolist())
        assert share in (1 / 2, 1 / 4, 1 / 8, 1 / 16)
        monkeypatch.setattr("traincert.trainer.cycle.HALVINGS", 0)
        (refused,) = run(trainer, miners, 1)
    assert len(refused.contributions) == 4
    assert refused.model_after == refused.model_before
    assert refused.loss_after == refused.loss_before
    assert not refused.after.velocity.any()
    assert refused.after.memories == {}  # as if nothing had been sent


def test_a_norm_that_is_too_large_is_refused(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(replace(job, max_update_norm=1e-6), tmp_path) as trainer:
        (result,) = run(trainer, miners, 1)
    assert {no.reason for no in result.refusals} == {Reason.NORM_TOO_LARGE}
    assert result.model_after == result.model_before


def test_a_refused_update_leaves_its_miners_residual_as_it_was(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    """In the second cycle all is refused: its learning rate is far too high. A miner that rests keeps its own, too."""
    compressed = replace(job, density=0.1)
    with make_trainer(compressed, tmp_path / "good") as trainer:
        (first,) = run(trainer, miners, 1)
        accepted = {score.miner for score in first.contributions}
        assert accepted
        assert first.after.memories.keys() == accepted
        (again,) = run(trainer, miners[:1], 1, first.after, seeds=1)
        for miner in set(miners[1:]) & accepted:
            assert again.after.memories[miner] == first.after.memories[miner]
        for digest in first.after.memories.values():
            assert load_state(tmp_path / "good" / "store", digest)["residual"].shape == (trainer.layout.params,)
    wild = replace(compressed, max_update_norm=1e-6)
    with make_trainer(wild, tmp_path / "good") as trainer:
        (second,) = run(trainer, miners, 1, first.after, seeds=1)
    assert second.contributions == ()
    assert second.after.memories == first.after.memories
    assert {task.order.memory_hash for task in second.tasks} >= set(first.after.memories.values())


def test_residuals_change_what_is_sent(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(replace(job, density=0.1), tmp_path) as trainer:
        (first,) = run(trainer, miners, 1)
        (second,) = run(trainer, miners, 1, first.after, seeds=1)
        (without,) = run(trainer, miners, 1, replace(first.after, memories={}), seeds=1)
    assert second.model_after != without.model_after


def test_scoring_on_some_examples_does_not_change_what_the_model_is_measured_on(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(replace(job, score_examples=50), tmp_path) as trainer:
        (result,) = run(trainer, miners, 1)
        found = evaluate(build_model(job), job, result.after.model, trainer.validation)
    assert result.loss_after == found.loss
    assert result.contributions


def test_one_miner_with_all_data_and_segments_is_plain_training(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    plain = replace(
        job, segments=1, shards=1, optimizer="AdamW", optimizer_options={}, learning_rate=0.003, max_update_norm=1e9
    )
    with make_trainer(plain, tmp_path) as trainer:
        results = run(trainer, miners[:1], 2)
        shard = read_examples(plain, trainer.dataset.shard_folder, trainer.dataset.shards[0])
    model = build_model(plain)
    for result in results:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
        seed = int.from_bytes(result.tasks[0].order.task.seed[:8], "little", signed=True)
        order = torch.randperm(len(shard), generator=torch.Generator().manual_seed(seed))
        for step in range(plain.local_steps):
            batch = order[step * 32 : step * 32 + 32]
            optimizer.zero_grad()
            loss: torch.Tensor = torch.nn.functional.cross_entropy(model(shard.inputs[0][batch]), shard.target[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result.after.model[name], parameter.detach(), atol=1e-5, rtol=1e-4)


def test_a_miner_twice_is_an_error(trainer: Trainer, miners: list[bytes]) -> None:
    with pytest.raises(ValueError, match="only one task"):
        run(trainer, [miners[0], miners[0]], 1)


def test_an_engine_of_another_job_is_an_error(dataset: Dataset, engine: LocalEngine, tmp_path: Path) -> None:
    other = prepare_dataset(replace(dataset.job, seed=5), tmp_path)
    with pytest.raises(ValueError, match="different jobs"):
        Trainer(other, engine)


def test_a_damaged_validation_split_is_an_error_that_names_it(
    job: TrainingJob, engine: LocalEngine, tmp_path: Path
) -> None:
    dataset = prepare_dataset(job, tmp_path)
    path = dataset.held_out_folder / dataset.validation.hex()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"^{path}: the file's SHA-256 is"):
        Trainer(dataset, engine)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer_options": {"beta": 1}}, "optimizer_options = {'beta': 1}: "),
        ({"model_options": {"width": 1}}, r"model_options = {'width': 1}: mlp\(\) got an unexpected"),
        ({"model": "traincert.trainer.models:mpl"}, "has no function 'mpl'; did you mean 'mlp'"),
        ({"model": "builtins:str", "model_options": {}}, "returned str, not a"),
        ({"segments": 4096}, "segments = 4096: must be at most"),
        ({"loss": "traincert.trainer.models:entropy"}, "has no function 'entropy'"),
        ({"metric": "traincert.trainer.models:recall"}, "has no function 'recall'"),
    ],
)
def test_a_job_that_cannot_be_trained_is_refused_before_the_first_cycle(
    make_trainer: MakeTrainer, job: TrainingJob, tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    wrong = replace(job, **changed)  # type: ignore[arg-type]
    with pytest.raises(JobError, match=words), make_trainer(wrong, tmp_path) as trainer:
        trainer.start()


def test_the_shipped_job_reaches_its_target(make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path) -> None:
    job = TrainingJob.named("digits")
    with make_trainer(job, tmp_path) as trainer:
        results = run(trainer, miners, job.cycles)
        assert job.target_metric is not None
        assert trainer.test(results[-1].after.model).metric >= job.target_metric
    assert results[-1].loss_after < results[0].loss_before / 5


def test_a_late_task_counts_at_its_share(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(job, tmp_path / "in time") as trainer:
        (in_time,) = run(trainer, miners, 1)
    with make_trainer(replace(job, late_seconds=1e-6, late_share=0.5), tmp_path / "late") as trainer:
        (late,) = run(trainer, miners, 1)
    assert all(task.commit and task.commit.late for task in late.tasks)
    assert not any(task.commit and task.commit.late for task in in_time.tasks)
    for mine, whole in zip(late.contributions, in_time.contributions, strict=True):
        assert mine.weight == pytest.approx(whole.weight / 2, rel=1e-3)


def test_the_score_seed_decides_what_is_done_again_and_without_it_nothing_is(
    make_trainer: MakeTrainer, job: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with make_trainer(replace(job, spot_checks=0.5), tmp_path) as trainer:
        (trusted,) = run(trainer, miners, 1)
        start = trainer.start()
        found = [
            trainer.run_cycle(start, miners, seed=b"", score_seed=partial(lambda seed, _commits: bytes([seed]), seed))
            for seed in (1, 1, 2)
        ]
        second = trainer.run_cycle(found[0].after, miners, seed=b"2", score_seed=lambda _commits: b"3")
    assert trusted.after.drawn == ()
    assert all(task.own_shard is None for task in trusted.tasks)
    assert all(len(each.after.drawn) == 2 for each in found)
    assert found[0].after.drawn == found[1].after.drawn
    assert all(task.own_shard is not None for task in found[0].tasks)
    assert [check.miner for check in second.spot_checks] == [each.order.task.miner for each in found[0].after.drawn]
    assert all(check.passed for check in second.spot_checks)
