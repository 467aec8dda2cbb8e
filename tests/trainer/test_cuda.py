"""Training on a GPU, where there is one; and that its absence is told."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation import evaluate
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.errors import JobError
from traincert.trainer.examples import read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import RunFolder
from traincert.trainer.replay import replay_tasks
from traincert.trainer.run import run_job
from traincert.trainer.state import initial_state, state_hash
from users_models import MODELS, MODULE, run

WriteJob = Callable[..., Path]
MakeTrainer = Callable[..., AbstractContextManager[Trainer]]

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a CUDA device here")


class Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@with_gpu
@pytest.mark.parametrize("name", ["digits", "fashion", "text"])
def test_a_job_is_trained_on_a_gpu_with_the_same_bits_twice(name: str, tmp_path: Path) -> None:
    """By worker processes, and when its tasks are replayed."""
    job = replace(TrainingJob.named(name), device="cuda", cycles=3, local_steps=20, warmup_cycles=0)
    first, second = (run_job(job, tmp_path / number, 2, 1, Silent()) for number in ("first", "second"))
    assert first.head == second.head
    with RunFolder(tmp_path / "first") as finished:
        losses = [record["loss_after"] for record in finished.records]
        assert losses[-1] < losses[0]
        replayed = list(replay_tasks(finished))
    assert len(replayed) == 6
    assert all(each.same for each in replayed)


@with_gpu
@pytest.mark.parametrize("name", ["digits", "fashion", "text"])
def test_a_gpu_measures_what_a_cpu_does(name: str, tmp_path: Path) -> None:
    job = TrainingJob.named(name)
    dataset = prepare_dataset(job, tmp_path / "data")
    examples = read_examples(job, dataset.held_out_folder, dataset.validation)
    model, state = build_model(job), initial_state(job)
    on_cpu = evaluate(model, job, state, examples)
    on_gpu = evaluate(model.cuda(), replace(job, device="cuda"), state, examples)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)
    assert on_gpu.metric == pytest.approx(on_cpu.metric, abs=0.01)


@with_gpu
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_users_model_is_trained_on_a_gpu(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path, name: str, segments: int
) -> None:
    path = write_job(
        MODULE,
        device='"cuda"',
        model=f'"{{module}}:{name}"',
        model_options=None,
        segments=str(segments),
        cycles="3",
        outer_learning_rate="0.7",
    )
    ends = []
    for number in ("one", "again"):
        with make_trainer(TrainingJob.load(path), tmp_path / number) as trainer:
            results = run(trainer, miners[:2], 3)
        assert results[-1].loss_after < 0.95 * results[0].loss_before
        assert not any(tensor.is_cuda for tensor in results[-1].after.model.values())
        ends.append(state_hash(results[-1].after.model))
    assert ends[0] == ends[1]


@without_gpu
def test_without_a_gpu_a_job_for_one_is_refused_in_one_line(job: TrainingJob, tmp_path: Path) -> None:
    on_gpu = replace(job, device="cuda")
    refusal = r"^device = 'cuda': PyTorch finds no such device here; must be 'cpu'$"
    with pytest.raises(JobError, match=refusal):
        LocalEngine(on_gpu, tmp_path / "store", workers=1)
    with pytest.raises(JobError, match=refusal):
        run_job(on_gpu, tmp_path / "run", 1, 1, Silent())
    with RunFolder(tmp_path / "run") as begun, pytest.raises(JobError, match=refusal):
        list(replay_tasks(begun))
