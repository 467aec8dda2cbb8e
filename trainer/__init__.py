"""One cycle of collaborative training (PyTorch), without Bitcoin."""

from typing import TYPE_CHECKING

from traincert.lazy import importer

if TYPE_CHECKING:
    from traincert.trainer.compare import Compared, differences, plot_runs, read_run
    from traincert.trainer.cycle import Checkpoint, CycleResult, Trainer
    from traincert.trainer.datasets import Chunk, RawDataset
    from traincert.trainer.engines.local import LocalEngine
    from traincert.trainer.errors import EngineError, IntegrityError, JobError, Reason, RunError, TrainerError
    from traincert.trainer.examples import Dataset
    from traincert.trainer.export import export_model
    from traincert.trainer.job import TrainingJob
    from traincert.trainer.judging import TaskResult
    from traincert.trainer.preprocessing import prepare_dataset
    from traincert.trainer.records import Record, RunFolder
    from traincert.trainer.replay import Replayed, replay_tasks
    from traincert.trainer.run import Finished, run_job
    from traincert.trainer.scoring import Contribution, Evaluation, Refusal
    from traincert.trainer.updates import UpdateError

__all__ = [
    "Checkpoint",
    "Chunk",
    "Compared",
    "Contribution",
    "CycleResult",
    "Dataset",
    "EngineError",
    "Evaluation",
    "Finished",
    "IntegrityError",
    "JobError",
    "LocalEngine",
    "RawDataset",
    "Reason",
    "Record",
    "Refusal",
    "Replayed",
    "RunError",
    "RunFolder",
    "TaskResult",
    "Trainer",
    "TrainerError",
    "TrainingJob",
    "UpdateError",
    "differences",
    "export_model",
    "plot_runs",
    "prepare_dataset",
    "read_run",
    "replay_tasks",
    "run_job",
]

__getattr__ = importer(
    __name__,
    {
        "Checkpoint": "cycle",
        "Chunk": "datasets",
        "Compared": "compare",
        "Contribution": "scoring",
        "CycleResult": "cycle",
        "Dataset": "examples",
        "EngineError": "errors",
        "Evaluation": "scoring",
        "Finished": "run",
        "IntegrityError": "errors",
        "JobError": "errors",
        "LocalEngine": "engines.local",
        "RawDataset": "datasets",
        "Reason": "errors",
        "Record": "records",
        "Refusal": "scoring",
        "Replayed": "replay",
        "RunError": "errors",
        "RunFolder": "records",
        "TaskResult": "judging",
        "Trainer": "cycle",
        "TrainerError": "errors",
        "TrainingJob": "job",
        "UpdateError": "updates",
        "differences": "compare",
        "export_model": "export",
        "plot_runs": "compare",
        "prepare_dataset": "preprocessing",
        "read_run": "compare",
        "replay_tasks": "replay",
        "run_job": "run",
    },
)
