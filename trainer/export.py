"""Write a run's model as a checkpoint that plain PyTorch loads."""

import io
import json
import logging
from pathlib import Path

import safetensors.torch
import torch

from traincert.trainer.accounting import guarantee
from traincert.trainer.errors import IntegrityError, JobError, RunError
from traincert.trainer.models import build_model
from traincert.trainer.records import RunFolder, spent
from traincert.trainer.state import load_state, set_state
from traincert.trainer.store import write_file

_LOG = logging.getLogger(__name__)


def export_model(run: RunFolder, cycle: int, path: Path) -> None:
    """Write the model after a cycle, as `model.state_dict()` has it, to `path`: .pt or .safetensors.

    The file has tied parameters under all of their names, and the buffers. If the job prepares its data, a JSON file
    beside it, with the same name and the ending .json, says how: by column the mean and the deviation (`normalize`),
    the values in the order of their codes (`encode`), and what replaces a missing value (`missing`). With `privacy` it
    has the epsilon of the whole run. If the run's data is gone, only the model is written, with a warning.

    Raises RunError if the run has no such cycle, its store no longer has the model, or the name ends otherwise;
    IntegrityError if the model's file is damaged, and JobError if the job's model cannot be built.
    """
    if path.suffix not in (".pt", ".safetensors"):
        raise RunError(f"{path}: the name must end with .pt or .safetensors")
    if not path.parent.is_dir():
        raise RunError(f"{path.parent}: no such folder")
    if not 0 <= cycle <= run.cycles or not run.records:
        raise RunError(f"{run.folder} has no cycle {cycle}; it has {run.cycles}")
    digest = bytes.fromhex(run.records[cycle]["model_after"])
    if not (run.store / digest.hex()).exists():
        raise RunError(f"{run.folder} has no longer the model of cycle {cycle}: history = {run.job.history}")
    model = build_model(run.job)
    set_state(model, load_state(run.store, digest))
    tensors = model.state_dict()
    if path.suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    else:  # this format has no shared tensors
        data = safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})
    write_file(path, data, 0o644)
    if run.job.normalize or run.job.encode or run.job.missing or run.job.privacy:
        try:
            manifest = run.dataset().manifest()
        except (JobError, IntegrityError) as error:
            _LOG.warning("%s is not written, because the run's data is gone: %s", path.with_suffix(".json"), error)
            return
        prepared = {
            "normalize": {
                name: {"mean": mean, "deviation": deviation}
                for name, (mean, deviation) in manifest["statistics"].items()
            },
            "encode": manifest["codes"],
            "missing": manifest["fills"],
        }
        if run.job.privacy:  # of all cycles: the best model was chosen among all
            prepared["privacy"] = guarantee(run.job, spent(run.records[-1]).values())
        write_file(path.with_suffix(".json"), json.dumps(prepared, indent=1).encode() + b"\n", 0o644)
