"""Differential privacy: clipping, noise, secrets, and the epsilon that is recorded."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import nn

from traincert.trainer import accounting
from traincert.trainer.accounting import epsilon
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.executor import Executor
from traincert.trainer.errors import IntegrityError, JobError
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.export import export_model
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.privacy import Noise, check_private, check_private_training
from traincert.trainer.records import Record, RunFolder, spent
from traincert.trainer.replay import replay_tasks
from traincert.trainer.report import write_report
from traincert.trainer.segments import Layout, Segment, cut_segments
from traincert.trainer.spot_checks import Drawn, SpotChecker, memories_of
from traincert.trainer.state import initial_state
from traincert.trainer.store import read_blob, write_blob
from traincert.trainer.tasks import Task
from traincert.trainer.training import train_task
from traincert.trainer.updates import read_update

MakeTrainer = Callable[..., AbstractContextManager[Trainer]]
WriteJob = Callable[..., Path]

TASK = Task(miner=bytes(32), segment=0, shard=0, seed=bytes(range(32)), cycle=0)
SECRET = hashlib.sha256(b"secret").digest()


@pytest.fixture(scope="module")
def private(job: TrainingJob) -> TrainingJob:
    """One step of plain SGD with the learning rate 1: the update is the gradient, negated."""
    return replace(
        job,
        segments=3,
        privacy="dp-sgd",
        noise_multiplier=0.5,
        max_grad_norm=1.5,
        shard_examples=0,
        optimizer_options={},
        learning_rate=1.0,
        local_steps=1,
    )


@pytest.fixture(scope="module")
def shard(dataset: Dataset) -> Examples:
    return read_examples(dataset.job, dataset.shard_folder, dataset.shards[0])


def moved(job: TrainingJob, shard: Examples, segment: int = 0, secret: bytes = SECRET) -> torch.Tensor:
    """The move of a task's update."""
    part, state = cut_segments(build_model(job), job)[segment], initial_state(job)
    data = train_task(job, state, part, shard, TASK, {}, secret=secret).update
    return read_update(data, replace(job, max_update_norm=1e9), part, state).move


def example_gradient(job: TrainingJob, part: Segment, shard: Examples, row: int) -> torch.Tensor:
    """The gradient of one example's loss by a segment's parameters, by plain PyTorch."""
    model = build_model(job)
    loss = nn.functional.cross_entropy(model(shard.inputs[0][row : row + 1]), shard.target[row : row + 1].long())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients])[part.start : part.end]


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_each_examples_gradient_is_clipped_before_they_are_summed_up(
    private: TrainingJob, shard: Examples, segment: int
) -> None:
    """Compared with a loop over single examples. Segments begin and end inside a tensor."""
    part = cut_segments(build_model(private), private)[segment]
    noise = Noise(SECRET)
    chosen = noise.chosen(len(shard), 32 / len(shard))
    assert len(chosen) > 10
    gradients = [example_gradient(private, part, shard, int(row)) for row in chosen]
    norms = [float(each.norm()) for each in gradients]
    most = statistics.median(norms)  # half of them are clipped
    total = torch.stack([each * min(1.0, most / norm) for each, norm in zip(gradients, norms, strict=True)]).sum(0)
    pieces = Layout(build_model(private)).pieces(part)
    drawn = torch.cat([noise.normal(end - begin) for _, begin, end in pieces])
    found = moved(replace(private, max_grad_norm=most), shard, segment)
    torch.testing.assert_close(found, -(total + 0.5 * most * drawn) / 32, atol=1e-5, rtol=1e-4)


def test_one_example_moves_a_step_by_its_norm_at_most(private: TrainingJob, shard: Examples) -> None:
    """Even if it is absurd; and one whose gradient is no number changes nothing."""
    all_drawn = replace(private, segments=1, batch_size=10_000)
    few = shard.batch(slice(8))
    without = moved(all_drawn, few)
    for inputs in (1e6, math.nan, math.inf):
        absurd = few.batch(slice(None))
        absurd.inputs[0][3] = inputs
        found = moved(all_drawn, absurd)
        assert float((found - without).norm()) <= 2 * 1.5 / 8 * (1 + 1e-5)  # it is in the place of another one
        assert not torch.equal(found, without)


def test_an_update_is_clipped_and_has_noise_for_twice_its_norm(private: TrainingJob, shard: Examples) -> None:
    noised = replace(private, segments=1, privacy="noised-update", max_grad_norm=0.1, local_steps=5)
    plain = replace(noised, privacy="", noise_multiplier=None, max_grad_norm=None)
    raw = moved(plain, shard)
    assert raw.norm() > 0.1
    expected = raw / raw.norm() * 0.1 + 2 * 0.5 * 0.1 * Noise(SECRET).normal(len(raw))
    torch.testing.assert_close(moved(noised, shard), expected, atol=1e-6, rtol=1e-4)


def test_residual_and_optimizer_state_come_after_the_noise(private: TrainingJob, shard: Examples) -> None:
    """A task goes on with both, and sends no more than the rest of what it keeps."""
    kept = replace(private, density=0.25, keep_optimizer_state=True, optimizer_options={"momentum": 0.9}, segments=1)
    part, state = cut_segments(build_model(kept), kept)[0], initial_state(kept)
    first = train_task(kept, state, part, shard, TASK, {}, secret=SECRET)
    sent = read_update(first.update, replace(kept, max_update_norm=1e9), part, state).move
    whole = moved(replace(kept, density=1.0), shard)
    torch.testing.assert_close(sent + first.memory["residual"], whole)
    gradient = torch.cat([each.flatten() for name, each in sorted(first.memory.items()) if name.endswith("buffer")])
    assert float(gradient.norm()) == pytest.approx(float(whole.norm()), rel=1e-3)


# Noise.


def test_noise_is_normal_and_its_values_do_not_depend_on_each_other() -> None:
    noise = Noise(SECRET)
    values = noise.normal(400_001).double()
    normal = NormalDist()
    assert len(values) == 400_001
    for bound in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3):
        share = normal.cdf(bound)
        error = 5 * math.sqrt(share * (1 - share) / len(values))
        assert float((values < bound).double().mean()) == pytest.approx(share, abs=error), bound
    assert float(values.std()) == pytest.approx(1, abs=0.005)
    half = len(values) // 2
    for shift in (1, 2, half, half + 1):  # half: the other value of the same pair
        assert abs(float((values[:-shift] * values[shift:]).mean())) < 5 / math.sqrt(len(values) - shift), shift
    assert not torch.equal(values[:1000], noise.normal(1000).double())


def test_each_example_is_drawn_by_its_own_chance() -> None:
    noise = Noise(SECRET)
    counts = [len(noise.chosen(1000, 0.05)) for _ in range(2000)]
    mean = sum(counts) / len(counts)
    variance = sum((each - mean) ** 2 for each in counts) / len(counts)
    assert mean == pytest.approx(50, abs=1)
    assert variance == pytest.approx(1000 * 0.05 * 0.95, rel=0.15)  # batches of one size would have 0
    assert noise.chosen(7, 1.0).tolist() == list(range(7))


def test_the_secret_alone_decides_the_noise(private: TrainingJob, shard: Examples) -> None:
    longer = replace(private, local_steps=3)
    other = hashlib.sha256(b"another secret").digest()
    assert torch.equal(moved(longer, shard), moved(longer, shard))
    assert not torch.equal(moved(longer, shard), moved(longer, shard, secret=other))
    chosen = [Noise(secret).chosen(len(shard), 0.1).tolist() for secret in (SECRET, other)]
    assert chosen[0] != chosen[1]


# Secrets and spot checks.


@pytest.fixture(scope="module")
def done(
    make_trainer: MakeTrainer, private: TrainingJob, miners: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Drawn]:
    """A task that was done, with a memory, in a second cycle; and what is known of it when it is drawn."""
    kept = replace(private, keep_optimizer_state=True, optimizer_options={"momentum": 0.9}, local_steps=3)
    with make_trainer(kept, tmp_path_factory.mktemp("done")) as trainer:
        state = trainer.run_cycle(trainer.start(), miners, seed=b"first").after
        (order,) = [each for each in trainer.assign(state, miners, b"second") if each.memory_hash][:1]
        (commit,) = trainer._engine.collect(trainer.dataset.shard_folder, [order])
        began = order._replace(noise_hash=commit.noise_hash)  # type: ignore[union-attr]
        drawn = Drawn(began, commit.update_hash, commit.memory_after, commit.numeric_class)  # type: ignore[union-attr]
        return trainer, drawn


def test_a_task_is_done_again_with_its_secret(done: tuple[Trainer, Drawn]) -> None:
    trainer, drawn = done
    found = SpotChecker(trainer.dataset, trainer._engine.store, trainer.segments).check(drawn)
    assert found.passed, found.failure
    assert found.found == drawn.update_hash


def test_what_is_sent_for_a_check_is_this_tasks_secret_and_no_other(done: tuple[Trainer, Drawn]) -> None:
    """The memory that the task began with tells nothing of the noise before."""
    trainer, drawn = done
    store = trainer._engine.store
    sent = memories_of(drawn, drawn.numeric_class)
    assert sent == [drawn.order.memory_hash, drawn.order.noise_hash]
    secret = read_blob(store, sent[1])
    assert len(secret) == 32
    secrets = {data for path in store.iterdir() if len(data := path.read_bytes()) == 32}
    assert len(secrets) == 5  # one for each of the first cycle's tasks, and this one
    memory = read_blob(store, sent[0])
    assert not any(each in memory for each in secrets)


def test_nobody_finds_the_noise_by_what_is_public(done: tuple[Trainer, Drawn]) -> None:
    """The same order gives another secret and another update each time."""
    trainer, drawn = done
    executor = Executor(trainer.job, trainer._engine.store)
    order = drawn.order._replace(noise_hash=None)
    answers = [executor.execute(trainer.dataset.shard_folder, order) for _ in range(2)]
    assert len({each.update for each in answers}) == len({each.noise_hash for each in answers}) == 2
    assert drawn.order.noise_hash not in [each.noise_hash for each in answers]


def test_another_secret_fails_a_spot_check(done: tuple[Trainer, Drawn]) -> None:
    trainer, drawn = done
    store = trainer._engine.store
    checker = SpotChecker(trainer.dataset, store, trainer.segments)

    def check(secret: bytes, memory: bytes | None = drawn.order.memory_hash) -> str:
        order = drawn.order._replace(noise_hash=write_blob(store, secret), memory_hash=memory)
        return checker.check(drawn._replace(order=order)).failure

    assert check(SECRET).startswith("the update is ")
    assert check(b"short").startswith("the task cannot be done with what its miner sent")
    assert check(b"x" * 16, None).startswith("the task cannot be done with what its miner sent")
    (store / drawn.order.noise_hash.hex()).rename(store / "kept")  # type: ignore[union-attr]
    with pytest.raises(IntegrityError):
        checker.check(drawn)
    (store / "kept").rename(store / drawn.order.noise_hash.hex())  # type: ignore[union-attr]


# Epsilon.


def exact_gaussian(noise_multiplier: float, times: int, delta: float) -> float:
    """The least epsilon of the Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8), by bisection."""
    mu, normal = math.sqrt(times) / noise_multiplier, NormalDist()
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        found = normal.cdf(mu / 2 - middle / mu) - math.exp(middle) * normal.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if found > delta else (low, middle)
    return high


def sampled_gaussian(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon of DP-SGD by the moments of integer orders (Mironov et al., arXiv 1908.10530, section 3.3)."""
    best = math.inf
    for order in range(2, 200):
        logs = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise_multiplier**2)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(logs)
        moment = steps * (top + math.log(math.fsum(math.exp(each - top) for each in logs))) / (order - 1)
        best = min(best, moment + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return best


@pytest.mark.parametrize(
    ("noise", "batch", "steps", "tasks"), [(1.0, 64, 120, 45), (0.7, 32, 18, 3), (2.0, 100, 10, 1)]
)
def test_epsilon_of_dp_sgd_is_that_of_another_computation(
    private: TrainingJob, noise: float, batch: int, steps: int, tasks: int
) -> None:
    job = replace(private, noise_multiplier=noise, batch_size=batch, local_steps=steps)
    expected = sampled_gaussian(noise, batch / 14_750, steps * tasks, 1e-5)
    assert epsilon(job, 14_750, tasks) == pytest.approx(expected, rel=0.03)  # Opacus has orders between integers, too
    assert epsilon(job, 14_750, tasks) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("tasks", [1, 20])
@pytest.mark.parametrize("noise", [0.8, 3.0, 12.0])
def test_epsilon_of_a_noised_update_is_a_bound_near_the_exact_one(
    private: TrainingJob, noise: float, tasks: int
) -> None:
    job = replace(private, privacy="noised-update", noise_multiplier=noise, delta=1e-6)
    exact = exact_gaussian(noise, tasks, 1e-6)
    assert exact <= epsilon(job, 100, tasks) <= 1.25 * exact


def test_a_batch_of_the_whole_shard_is_not_made_smaller_by_sampling(private: TrainingJob) -> None:
    whole = replace(private, batch_size=500, local_steps=4)
    assert epsilon(whole, 100, 2) == epsilon(replace(whole, privacy="noised-update"), 100, 8)


def test_without_opacus_a_job_with_privacy_is_one_line(private: TrainingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    accounting._epsilon.cache_clear()
    with pytest.raises(JobError, match=r"^privacy: needs Opacus, which is not installed: pip install '\.\[privacy\]'"):
        check_private(private)
    check_private(replace(private, privacy="", noise_multiplier=None, max_grad_norm=None))


# Runs.


@pytest.fixture(scope="module")
def learning(job: TrainingJob) -> TrainingJob:
    """A job that learns something at an epsilon of some units."""
    return replace(
        job,
        cycles=3,
        privacy="dp-sgd",
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        shard_examples=0,
        learning_rate=0.2,
        history=2,
    )


@pytest.fixture(scope="module")
def run(
    make_trainer: MakeTrainer, learning: TrainingJob, miners: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of three cycles. After the first it was killed in the middle of a cycle, and went on."""
    folder = tmp_path_factory.mktemp("private") / "run"
    for cycles in (1, 2):
        with RunFolder(folder, learning) as run, make_trainer(learning, folder) as trainer:
            if not run.records:
                run.begin(trainer.start(), trainer.dataset)
            for _ in range(cycles):
                result = trainer.run_cycle(run.load(), miners[:3], seed=run.seed(), score_seed=lambda _: b"score")
                run.save(run.next_record(result))
            trainer.run_cycle(run.load(), miners[:3], seed=run.seed())  # is not saved
    return folder


def records(folder: Path) -> list[Record]:
    with RunFolder(folder) as run:
        return run.records


def test_the_record_has_the_epsilon_of_each_task_and_the_sum_of_each_shard(run: Path, learning: TrainingJob) -> None:
    with RunFolder(run, learning) as opened:
        sizes = dict(zip((each.hex() for each in opened.dataset().shards), [285, 284, 284, 284], strict=True))
        found = opened.records
    assert found[0]["spent"] == {}
    tasks: dict[str, int] = {}
    for record in found[1:]:
        for task in record["tasks"]:
            tasks[task["shard"]] = tasks.get(task["shard"], 0) + 1
            assert task["epsilon"] == epsilon(learning, sizes[task["shard"]], 1) > 0
        assert record["spent"] == {
            shard: [count, epsilon(learning, sizes[shard], count)] for shard, count in sorted(tasks.items())
        }
    assert sum(tasks.values()) == 9
    assert max(tasks.values()) > 1


def test_updates_with_noise_are_scored_and_the_model_learns(run: Path) -> None:
    found = records(run)
    accepted = [task for record in found for task in record["tasks"] if not task["refusal"]]
    assert len(accepted) > 4
    assert all(task["weight"] > 0 for task in accepted)
    assert found[-1]["loss_after"] < 0.8 * found[0]["loss_after"]


def test_a_run_is_replayed_with_the_secrets_that_it_kept(run: Path) -> None:
    with RunFolder(run) as opened:
        replayed = list(replay_tasks(opened, cycle=3))
        assert len(replayed) == 3
        assert all(each.same for each in replayed)
        secret = opened.records[-1]["tasks"][0]["noise"]
        (opened.store / secret).rename(opened.store / "kept")
        assert next(replay_tasks(opened, cycle=3)).found == ""
        (opened.store / "kept").rename(opened.store / secret)
        assert not (opened.store / opened.records[1]["tasks"][0]["noise"]).exists()  # older than `history`


def test_report_and_export_say_what_was_spent(run: Path, tmp_path: Path) -> None:
    with RunFolder(run) as opened:
        most = max(each.epsilon for each in spent(opened.records[-1]).values())
        with_test = opened.load().evaluation
        report = write_report(tmp_path / "report", opened.job, opened.records, with_test)
        export_model(opened, 1, tmp_path / "model.pt")  # an early model: the choice of it is of all
    promised = {"privacy": "dp-sgd", "epsilon": most, "delta": 1e-5}
    assert json.loads((tmp_path / "report" / "report.json").read_text())["privacy"] == promised
    assert f"dp-sgd: epsilon {most:.3g} at delta" in report.read_text()
    assert json.loads((tmp_path / "model.json").read_text())["privacy"] == promised


def test_a_job_without_privacy_has_neither_secrets_nor_epsilons(go_on: Callable[..., Path], small: TrainingJob) -> None:
    for record in records(go_on(1, job=small)):
        assert record["spent"] == {}
        assert all(task["noise"] is task["epsilon"] is None for task in record["tasks"])


# What cannot be private.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": '"dp-sgd"'}, "privacy = 'dp-sgd' needs noise_multiplier and max_grad_norm"),
        ({"noise_multiplier": "1.0"}, "noise_multiplier and max_grad_norm need privacy"),
        (
            {"privacy": '"dp-sgd"', "noise_multiplier": "1.0", "max_grad_norm": "1.0"},
            "shard_examples = 64: should be 0 with privacy",
        ),
        (
            {
                "privacy": '"noised-update"',
                "noise_multiplier": "1.0",
                "max_grad_norm": "1.0",
                "shard_examples": "0",
                "keep_optimizer_state": "true",
            },
            "keep_optimizer_state: should be false with privacy = 'noised-update'",
        ),
        ({"noise_multiplier": "0.0"}, "noise_multiplier = 0.0"),
    ],
)
def test_settings_that_contradict_are_refused(write_job: WriteJob, changes: dict[str, str], message: str) -> None:
    with pytest.raises(JobError) as error:
        TrainingJob.load(write_job(**changes))
    assert message in str(error.value)


MODULE = """
    import torch
    from torch import nn

    def data():
        raise AssertionError("the data was asked for")

    def normed():
        return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    def free():
        return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 10))

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.register_buffer("mean", torch.zeros(64))

        def forward(self, x):
            if self.training:
                with torch.no_grad():
                    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return self.layer(x - self.mean)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8, batch_first=True)
            self.layer = nn.Linear(8, 10)

        def forward(self, x):
            return self.layer(self.rnn(x.reshape(-1, 8, 8))[0][:, -1])

    def linear():
        return nn.Linear(64, 10)

    def worst(outputs, target):
        return nn.functional.cross_entropy(outputs, target.long(), reduction="none").max()

    def masked(outputs, target):
        each = nn.functional.cross_entropy(outputs, target.long(), reduction="none")
        return (each * (target > 4)).sum(), (target > 4).sum()
"""
PRIVATE = {"noise_multiplier": "1.0", "max_grad_norm": "1.0", "shard_examples": "0"}


def loaded(write_job: WriteJob, privacy: str, **changes: str) -> TrainingJob:
    keys = {**PRIVATE, "privacy": f'"{privacy}"', "model_options": "{}", **changes}
    return TrainingJob.load(write_job(MODULE, **keys))


@pytest.mark.parametrize(("privacy", "what"), [("dp-sgd", "mixes"), ("noised-update", "keeps statistics of")])
def test_batch_norm_is_refused_by_name_before_the_data_is_asked_for(
    write_job: WriteJob, tmp_path: Path, privacy: str, what: str
) -> None:
    job = loaded(write_job, privacy, model='"{module}:normed"', dataset='"{module}:data"')
    with RunFolder(tmp_path / "run", job) as run, pytest.raises(JobError) as error:
        run.dataset()
    assert f"privacy = '{privacy}': the model's 1 is BatchNorm1d, which {what}" in str(error.value)


def test_batch_norm_without_statistics_is_refused_only_where_examples_must_not_mix(write_job: WriteJob) -> None:
    with pytest.raises(JobError, match="the model's 1 is BatchNorm1d, which mixes the examples of a batch"):
        check_private(loaded(write_job, "dp-sgd", model='"{module}:free"'))
    check_private(loaded(write_job, "noised-update", model='"{module}:free"'))


@pytest.mark.parametrize("privacy", ["dp-sgd", "noised-update"])
def test_a_buffer_that_learns_is_refused_by_name(write_job: WriteJob, shard: Examples, privacy: str) -> None:
    """Before training and, if it is not seen there, before the update is sent."""
    job = loaded(write_job, privacy, model='"{module}:Mean"')
    with pytest.raises(JobError, match=f"^privacy = '{privacy}': training changes the model's buffer mean"):
        check_private_training(job, shard.batch(slice(4)))
    if privacy == "noised-update":
        with pytest.raises(JobError, match="training changed the model's buffer mean without noise"):
            moved(job, shard)


def test_a_loss_that_is_no_mean_is_refused(write_job: WriteJob, shard: Examples) -> None:
    few = shard.batch(slice(4))
    job = loaded(write_job, "dp-sgd", model='"{module}:linear"', loss='"{module}:worst"')
    with pytest.raises(JobError, match="the loss of 4 examples is not the mean of their losses"):
        check_private_training(job, few)
    check_private_training(replace(job, privacy="noised-update"), few)


def test_a_loss_with_weights_trains_also_where_all_of_an_example_is_masked(
    write_job: WriteJob, shard: Examples
) -> None:
    job = loaded(write_job, "dp-sgd", model='"{module}:linear"', loss='"{module}:masked"', batch_size="10000")
    job = replace(job, local_steps=1, optimizer_options={}, learning_rate=1.0)
    check_private_training(job, shard.batch(slice(4)))
    seen = shard.batch(shard.target > 4)
    noise = Noise(SECRET)
    noise.chosen(len(shard), 1.0)
    part = cut_segments(build_model(job), job)[0]
    gradients = [example_gradient(job, part, seen, row) for row in range(len(seen))]
    total = torch.stack([each * min(1.0, 1 / float(each.norm())) for each in gradients]).sum(0)
    drawn = torch.cat([noise.normal(640), noise.normal(10)])
    torch.testing.assert_close(moved(job, shard), -(total + drawn) / len(shard), atol=1e-5, rtol=1e-4)


def test_a_model_without_gradients_of_single_examples_takes_noised_updates(
    write_job: WriteJob, shard: Examples
) -> None:
    few = shard.batch(slice(4))
    job = loaded(write_job, "dp-sgd", model='"{module}:Recurrent"')
    with pytest.raises(JobError, match=r"has no gradients of single examples.*'noised-update' takes such a model"):
        check_private_training(job, few)
    noised = replace(job, privacy="noised-update")
    check_private_training(noised, few)
    assert moved(noised, shard).isfinite().all()
