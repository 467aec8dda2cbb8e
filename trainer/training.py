"""One task → one update, deterministic on one kind of machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from traincert.trainer.datasets import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.segments import cut_segments
from traincert.trainer.state import State, state_bytes
from traincert.trainer.tasks import Task


@contextmanager
def deterministic() -> Iterator[None]:
    """Make what runs inside, or a function decorated with this, give the same bits each time; restored at the end.

    Not promised: the same bits on another kind of CPU, with another version of torch, or in another build of it,
    each of which may add in another order. Randomness is not set here: every draw uses its own seeded generator.
    """
    threads = torch.get_num_threads()
    strictness = torch.get_deterministic_debug_mode()
    precision = torch.get_float32_matmul_precision()
    # The number of threads decides how sums are divided, and so how they are rounded.
    torch.set_num_threads(1)
    # An operation that has no deterministic implementation raises, instead of being a little different each time.
    # (torch.use_deterministic_algorithms does the same, but first imports torch's compiler: a second in each worker.)
    torch.set_deterministic_debug_mode("error")
    # Lower settings let the CPU backend multiply in bfloat16 where it has the instructions.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(strictness)
        torch.set_float32_matmul_precision(precision)


@deterministic()
def train_task(job: TrainingJob, state: State, shard: Examples, task: Task) -> bytes:
    """Train the task's segment, all else frozen, on `shard`, starting from `state`.

    Returns the update: for each parameter of the segment, how much it changed, encoded by `state_bytes`.
    """
    model = build_model(job)
    model.load_state_dict(dict(state))
    model.train()
    segment = cut_segments(model, job.segments)[task.segment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in segment)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What torch.optim.SGD does; making one of those, too, imports torch's compiler.
    velocities = [torch.zeros_like(parameter) for parameter in trained]
    generator = torch.Generator().manual_seed(int.from_bytes(task.seed[:8], "little", signed=True))
    for _ in range(job.local_epochs):
        order = torch.randperm(len(shard.labels), generator=generator)
        for batch in torch.split(order, job.batch_size):
            loss = nn.functional.cross_entropy(model(shard.inputs[batch]), shard.labels[batch])
            gradients = torch.autograd.grad(loss, trained)
            with torch.no_grad():
                for parameter, velocity, gradient in zip(trained, velocities, gradients, strict=True):
                    velocity.mul_(job.momentum).add_(gradient)
                    parameter.sub_(velocity, alpha=job.learning_rate)
    parameters = dict(model.named_parameters())
    return state_bytes({name: parameters[name].detach() - state[name] for name in segment})
