"""`TrainingJob`: everything that defines a run, read from TOML and checked.

Nothing here imports torch, so that a command line can read jobs without waiting for it.

    TrainerError
    ├── JobError          a job's file, key or value
    ├── IntegrityError    a stored file that is not what its name says (datasets.py)
    ├── UpdateError       a miner's update (scoring.py)
    └── EngineError       a task that could not be run (engines/)
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DATASETS = ("digits",)
MODELS = ("mlp",)

_SHIPPED = Path(__file__).parent / "jobs"

# Key: its type, the smallest and the greatest value allowed.
_NUMBERS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "seed": (int, 0, 2**63 - 1),
    "cycles": (int, 1, 1_000_000),
    "target_accuracy": (float, 0.0, 1.0),
    "validation_examples": (int, 1, 1_000_000),
    "test_examples": (int, 1, 1_000_000),
    "shards": (int, 1, 4096),
    "segments": (int, 1, 4096),
    "local_epochs": (int, 1, 1000),
    "batch_size": (int, 1, 65536),
    "learning_rate": (float, 1e-6, 10.0),
    "momentum": (float, 0.0, 0.999),
    "max_update_norm": (float, 1e-6, 1e6),
}


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class JobError(TrainerError):
    """A job cannot be used; the message names file, key, value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training run. Equal jobs on the same kind of machine give the same hashes.

    Every field is a TOML key of the same name; none has a default, so a job's file says all there is.
    The number of miners and of workers is no part of it: miners come and go, and workers must not matter.
    """

    seed: int
    """Decides the initial model."""
    cycles: int
    """How many cycles the run is meant to take."""
    target_accuracy: float
    """Test accuracy, 0 to 1, that the model should reach after `cycles`."""

    dataset: str
    """One of `DATASETS`."""
    validation_examples: int
    """Examples held out from the miners, on which updates are scored and models accepted."""
    test_examples: int
    """Examples that neither training nor scoring ever sees; for the final accuracy."""
    shards: int
    """Into how many equal parts (± 1 example) the remaining examples are cut."""

    model: str
    """One of `MODELS`."""
    hidden: tuple[int, ...]
    """Widths of the model's hidden layers."""
    segments: int
    """Into how many parts the model's parameters are cut; at most one for each parameter tensor."""

    local_epochs: int
    """How often a task passes over its shard."""
    batch_size: int
    """Examples in one optimizer step."""
    learning_rate: float
    """Of plain SGD."""
    momentum: float
    """Of plain SGD; starts from zero in each task."""
    max_update_norm: float
    """An update whose L2 norm over all its tensors is greater is refused."""

    def __post_init__(self) -> None:
        """Raise JobError, naming key, value and what is allowed, for a value that no run can have."""
        for key, (kind, low, high) in _NUMBERS.items():
            value: Any = getattr(self, key)
            # type(), because True is an int to isinstance; the comparison is also false for NaN
            if type(value) is not kind or not low <= value <= high:
                raise JobError(f"{key} = {value!r}: must be {_name(kind)} from {low} to {high}")
        for key, known in (("dataset", DATASETS), ("model", MODELS)):
            if getattr(self, key) not in known:
                raise JobError(f"{key} = {getattr(self, key)!r}: must be one of {', '.join(known)}")
        hidden = self.hidden
        if not (isinstance(hidden, tuple) and 1 <= len(hidden) <= 16):
            raise JobError(f"hidden = {hidden!r}: must be 1 to 16 layer widths")
        for width in hidden:
            if type(width) is not int or not 1 <= width <= 65536:
                raise JobError(f"hidden = {list(hidden)}: a width must be an integer from 1 to 65536, not {width!r}")
        tensors = 2 * (len(hidden) + 1)  # each layer has a weight and a bias
        if self.segments > tensors:
            raise JobError(f"segments = {self.segments}: must be at most {tensors}, the model's parameter tensors")

    @classmethod
    def load(cls, path: Path) -> "TrainingJob":
        """Read a job from a TOML file.

        Raises JobError, naming the file, the key, its value and what is allowed.
        """
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise JobError(f"{path}: cannot be read as TOML: {error}") from error
        known = [field.name for field in fields(cls)]
        for key, value in values.items():
            if key not in known:
                raise JobError(f"{path}: {key} = {value!r}: unknown key; the keys are {', '.join(known)}")
        for key in known:
            if key not in values:
                raise JobError(f"{path}: {key} is missing")
        if isinstance(values["hidden"], list):
            values["hidden"] = tuple(values["hidden"])
        try:
            return cls(**values)
        except JobError as error:
            raise JobError(f"{path}: {error}") from None

    @classmethod
    def named(cls, name: str) -> "TrainingJob":
        """Read one of the jobs that come with the trainer, such as `digits`.

        Raises JobError, listing those there are, if there is none of this name.
        """
        shipped = sorted(path.stem for path in _SHIPPED.glob("*.toml"))
        if name not in shipped:
            raise JobError(f"no job {name!r}; there are: {', '.join(shipped)}")
        return cls.load(_SHIPPED / f"{name}.toml")


def _name(kind: type[int] | type[float]) -> str:
    return "an integer" if kind is int else "a float"
