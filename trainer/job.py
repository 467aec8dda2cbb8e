"""`TrainingJob`: everything that defines a run, read from TOML and checked.

Nothing here imports torch, so that a command line can read jobs without waiting for it.
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from traincert.trainer.errors import JobError

_SHIPPED = Path(__file__).parent / "jobs"


def _is_reference(value: str) -> str:
    module, _, name = value.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError("should be package.module:name")
    return value


Reference = Annotated[str, AfterValidator(_is_reference)]
"""`package.module:name`, which is imported when it is needed."""
Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists
Count = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True),
)
class TrainingJob:
    """One training run. Equal jobs on the same kind of machine give the same hashes.

    Every field is a TOML key of the same name. The number of miners and of workers is no part of it: miners come and
    go, and workers must not matter. Making one raises pydantic's ValidationError for a wrong value; `load` turns that
    into a JobError.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides the initial model, and who trains what."""
    cycles: Count
    """How many cycles the run takes."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models are trained and measured. With cuda, use one worker for each device."""

    dataset: Reference
    """A function that returns a datasets.RawDataset."""
    dataset_options: dict[str, Any] = Field(default_factory=dict)
    """The arguments it is called with."""
    inputs: Annotated[Names, Field(min_length=1)] = ("inputs",)
    """Columns that are given to the model, in this order."""
    target: str = "labels"
    """The column that is given to the loss."""
    drop: Names = ()
    """Columns that are left out. Every column must be an input, the target, or here."""
    normalize: dict[str, Literal["all", "each", "center"]] = Field(default_factory=dict)
    """Columns to subtract the mean from and divide by the standard deviation, both of the training split: of all the
    column's values together, or of each feature for itself; center: the mean of each feature, one deviation for all."""
    hash: dict[str, Annotated[int, Field(ge=2, lt=2**31)]] = Field(default_factory=dict)
    """Columns whose values are replaced by a keyed hash (HMAC-SHA256), and into how many buckets."""
    hash_key: str = ""
    """The file with the hash's secret key, 32 bytes, made if it is not there; relative to the job's file."""
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides which examples are held out, and the order in which they are cut into shards."""
    validation_examples: Count
    """Examples held out from the miners, on which updates are scored and models are measured."""
    test_examples: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Examples that neither training nor scoring ever sees; 0 if the dataset brings a test split of its own."""
    shards: Annotated[int, Field(ge=1, le=4096)]
    """Into how many equal parts (± 1 example) the remaining examples are cut."""

    model: Reference
    """A function that returns a torch.nn.Module."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """The arguments it is called with."""
    initial_model: str = ""
    """A safetensors file of the model's parameters and buffers by name, as a run's store has them, to start from
    instead of what `seed` gives; relative to the job's file."""
    loss: Reference = "traincert.trainer.models:cross_entropy"
    """A function of the model's outputs and the target that returns their mean loss, nats."""
    metric: Reference = "traincert.trainer.models:accuracy"
    """A function of the model's outputs and the target that returns a mean to be shown; greater is better."""
    target_metric: float | None = None
    """What the metric should be on the test examples in the end."""

    segments: Annotated[int, Field(ge=1, le=4096)] = 1
    """Into how many parts the model's trainable parameters are cut. 1: each miner trains the whole model."""
    balance: Literal["parameters", "flops"] = "parameters"
    """What segments have the same amount of: parameters (± 1), or measured floating-point operations of a step."""
    optimizer: Literal["SGD", "Adam", "AdamW"] = "SGD"
    """The class of torch.optim that a task trains with."""
    keep_optimizer_state: bool = False
    """Whether a miner's optimizer goes on with the state of its last task, as in DiLoCo, or starts from nothing."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """The arguments it is made with, besides lr."""
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    """The optimizer's lr, before `schedule`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the run's cycles, from `learning_rate` to nearly 0."""
    warmup_cycles: Annotated[int, Field(ge=0)] = 0
    """Cycles over which the learning rate rises first."""
    batch_size: Count
    """Examples in one step of the optimizer."""
    local_steps: Count
    """Steps of the optimizer in one task."""

    outer_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How much of the updates' mean the model moves by."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Nesterov momentum of the model's moves across cycles."""
    guard: Annotated[float, Field(gt=0)] = 0.2
    """A move after which the held-out loss would be this share above the lowest so far is halved, or not made."""
    density: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of an update's values that travel, each as its sign, with error feedback. 1: all, as float32."""
    residual_decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share that a miner keeps, from one task to the next, of what did not travel."""
    max_update_norm: Annotated[float, Field(gt=0)] = 10.0
    """An update that would move the parameters by more than this (L2 norm) is refused."""
    task_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A task that takes longer is refused as late."""
    score_examples: Annotated[int, Field(ge=0)] = 0
    """How many of the validation examples, drawn anew each cycle, updates are scored on. 0: all."""
    history: Count = 100
    """Of how many cycles the models and the miners' memories are kept, to be re-executed."""

    def __post_init__(self) -> None:
        """Refuse contradictions, by name; pydantic makes a ValidationError of them."""
        if bool(self.hash) != bool(self.hash_key):
            raise ValueError("hash and hash_key: each needs the other")
        named = [*self.inputs, self.target]
        for key in ("normalize", "hash"):
            if strangers := set(getattr(self, key)) - set(named):
                raise ValueError(f"{key}: {min(strangers)!r} is neither in inputs nor the target")
        if both := set(self.drop) & set(named):
            raise ValueError(f"drop: {min(both)!r} is also in inputs or the target")
        if both := set(self.hash) & set(self.normalize):
            raise ValueError(f"hash: {min(both)!r} is also in normalize")
        if self.warmup_cycles >= self.cycles:
            raise ValueError(f"warmup_cycles = {self.warmup_cycles}: should be less than cycles = {self.cycles}")

    @classmethod
    def load(cls, path: Path) -> "TrainingJob":
        """Read a job from a TOML file. Modules beside the file can be named in it: its folder is put on sys.path.

        Raises JobError, naming the file, the key, its value and what is allowed.
        """
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise JobError(f"{path}: cannot be read as TOML: {error}") from error
        folder = str(path.parent.absolute())
        for key in ("hash_key", "initial_model"):
            if values.get(key) and isinstance(values[key], str):
                values[key] = str(Path(folder, values[key]))
        try:
            job = cls(**values)
        except ValidationError as error:
            raise JobError(f"{path}: {_explain(error, values)}") from None
        except TypeError as error:
            raise JobError(f"{path}: {error}") from None
        if folder != str(_SHIPPED) and folder not in sys.path:
            sys.path.append(folder)  # last, so that a file beside the job hides nobody's module
        return job

    @classmethod
    def named(cls, name: str) -> "TrainingJob":
        """Read one of the jobs that come with the trainer, such as `digits`, or else the TOML file of that name.

        Raises JobError, listing those there are, if there is neither.
        """
        shipped = sorted(path.stem for path in _SHIPPED.glob("*.toml"))
        if name in shipped:
            return cls.load(_SHIPPED / f"{name}.toml")
        if not Path(name).is_file():
            raise JobError(f"no job {name!r}: neither a file, nor one of {', '.join(shipped)}")
        return cls.load(Path(name))

    def learning_rate_at(self, cycle: int) -> float:
        """Return the learning rate of a cycle, counted from 0; from `cycles` on, that of the last one."""
        place = min(cycle, self.cycles - 1)
        if place < self.warmup_cycles:
            return self.learning_rate * (place + 1) / (self.warmup_cycles + 1)
        done = (place - self.warmup_cycles) / (self.cycles - self.warmup_cycles)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate

    def to_toml(self) -> str:
        """Return a TOML file of this job: all keys, each with what it means, and those that are not set as comments."""
        document = tomlkit.document()
        properties = TypeAdapter(TrainingJob).json_schema()["properties"]
        for field in dataclasses.fields(self):
            for line in properties[field.name]["description"].splitlines():
                document.add(tomlkit.comment(line.strip()))
            value = getattr(self, field.name)
            if value is None:
                document.add(tomlkit.comment(f"{field.name} is not set"))
            else:
                item = tomlkit.item(value)
                if isinstance(item, tomlkit.items.Table):
                    table = tomlkit.inline_table()
                    table.update(value)
                    item = table
                document.add(field.name, item)
            document.add(tomlkit.nl())
        return tomlkit.dumps(document).rstrip("\n") + "\n"

    def digest(self) -> bytes:
        """Return a hash of all that is in the job, 32 bytes: equal for equal jobs."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).digest()


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """Import what a job's key names as `package.module:name`.

    Raises JobError if there is no such module or function; an error inside the module itself is not caught.
    """
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise JobError(f"{key} = {reference!r}: importing it failed: {error}") from error
        raise JobError(
            f"{key} = {reference!r}: no module {error.name!r}; it must be installed, or lie beside the job's file"
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        hint = _hint(name, functions)
        raise JobError(f"{key} = {reference!r}: the module {module.__file__} has no function {name!r}{hint}")
    return found  # type: ignore[no-any-return]


def call(reference: str, options: dict[str, Any], key: str) -> Any:
    """Import what a job's key names and call it with the job's options for it.

    Raises JobError if it cannot be called with them.
    """
    function = resolve(reference, key)
    try:
        return function(**options)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # a mistake inside the function, not in how it was called
        raise JobError(f"{key}_options = {options}: {error}; it takes {takes(function)}") from None


def takes(function: Callable[..., Any]) -> str:
    """Return a function's parameters, to be shown."""
    return ", ".join(str(parameter) for parameter in inspect.signature(function).parameters.values()) or "none"


def _explain(error: ValidationError, values: dict[str, Any]) -> str:
    """Say in one line what is wrong first: the key, its value and what is allowed."""
    first, *more = error.errors()
    others = f" (and {len(more)} more)" if more else ""
    key = ".".join(str(part) for part in first["loc"] if part != "function-after")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    names = [field.name for field in dataclasses.fields(TrainingJob)]
    match first["type"]:
        case "missing":
            return f"{key} is missing{others}"
        case "unexpected_keyword_argument" | "unexpected_property":
            hint = _hint(key, names) or f"; the keys are {', '.join(names)}"
            return f"{key} = {values.get(key)!r}: unknown key{hint}{others}"
    if not key:
        return f"{message}{others}"
    return f"{key} = {first['input']!r}: {message}{others}"


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
