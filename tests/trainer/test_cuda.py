"""Training on a GPU, where there is one; and that its absence is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.run import run_job

WriteJob = Callable[..., Path]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_a_job_is_trained_on_a_gpu_with_the_same_bits_twice(
    job: TrainingJob, miners: list[bytes], tmp_path: Path, density: float
) -> None:
    on_gpu = replace(job, device="cuda", density=density)
    dataset = prepare_dataset(on_gpu, tmp_path / "data")
    ends = []
    for _ in range(2):
        with LocalEngine(on_gpu, tmp_path / "store", workers=1) as engine, Trainer(dataset, engine) as trainer:
            state = trainer.start()
            for number in range(3):
                result = trainer.run_cycle(state, miners, seed=bytes([number]))
                state = result.after
        assert all(not tensor.is_cuda for tensor in state.model.values())
        ends.append((result.model_after, result.loss_after))
    assert ends[0] == ends[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a CUDA device here")
def test_without_a_gpu_a_job_for_one_is_refused_in_one_line(job: TrainingJob, tmp_path: Path) -> None:
    on_gpu = replace(job, device="cuda")
    with pytest.raises(JobError, match=r"^device = 'cuda': PyTorch finds no such device here; must be 'cpu'$"):
        LocalEngine(on_gpu, tmp_path / "store", workers=1)

    class Silent:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    with pytest.raises(JobError, match=r"^device = 'cuda': "):
        run_job(on_gpu, tmp_path / "run", 1, 1, Silent())
