"""A plain loop that measures a model: tests compare the trainer's Scorer with it, and benches use it for plain PyTorch.

It shares no code with the Scorer, which does the same with threads. Keep it independent.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from traincert.trainer.determinism import deterministic
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.scoring import Evaluation, nano_nats
from traincert.trainer.state import State, set_state
from traincert.trainer.usercode import resolve


@deterministic()
def evaluate(
    model: nn.Module, job: TrainingJob, state: State, examples: Examples, *, batch_size: int | None = None
) -> Evaluation:
    """Measure `state` on `examples`. `model` is the job's, on the job's device, and has that state afterwards.

    By default batches are as large as the Scorer's, so that both round alike.
    """
    set_state(model, state)
    model.eval()
    loss_function, metric_function = resolve(job.loss, "loss"), resolve(job.metric, "metric")
    size = batch_size or min(128, math.ceil(len(examples) / 4))
    losses, weights, every = [], [], []
    with torch.inference_mode():
        for start in range(0, len(examples), size):
            inputs, target = examples.batch(slice(start, start + size), job.device)
            outputs = model(*inputs)
            found = loss_function(outputs, target)
            loss, weight = found if isinstance(found, tuple) else (float(found) * len(target), len(target))
            losses.append(float(loss))
            weights.append(float(weight))
            every.append(outputs.cpu())
        metric = float(metric_function(torch.cat(every), examples.target))
    return Evaluation(nano_nats(math.fsum(losses) / math.fsum(weights), job.loss_offset), metric)
