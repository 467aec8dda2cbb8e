"""The errors that the trainer raises on purpose.

TrainerError
├── JobError          a job cannot be used
├── IntegrityError    a stored file is missing or damaged
├── UpdateError       a miner's update is refused (updates.py)
├── MonitorError      tasks cannot be monitored (monitoring.py)
├── EngineError       a task cannot be run (engines/)
│   ├── RefusedError  the coordinator refused a request (engines/broker.py)
│   └── StoppedError  the connection to the broker has ended (engines/broker.py)
└── RunError          a run folder cannot be used (records.py)
"""

from enum import StrEnum


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class JobError(TrainerError):
    """A job, or a file or function that it names, cannot be used. The message says what is allowed."""


class IntegrityError(TrainerError):
    """A stored file is missing, or its SHA-256 is not its name."""


class EngineError(TrainerError):
    """A task cannot be run, or the engine is closed."""


class RunError(TrainerError):
    """A run folder cannot be used. The message says what to do."""


class Reason(StrEnum):
    """Why a miner's update is not in a cycle's contributions."""

    WORKER_DIED = "worker-died"
    LATE = "late"
    ABSENT = "absent"
    WITHHELD = "withheld"
    BARRED = "barred"
    SPOT_CHECK_FAILED = "spot-check-failed"
    IMPOSSIBLE_RESOURCES = "impossible-resources"
    WRONG_MEMORY = "wrong-memory"
    TOO_LARGE = "too-large"
    MALFORMED = "malformed"
    WRONG_NAMES = "wrong-names"
    WRONG_DTYPE = "wrong-dtype"
    WRONG_SHAPE = "wrong-shape"
    NOT_CANONICAL = "not-canonical"
    NOT_FINITE = "not-finite"
    NORM_TOO_LARGE = "norm-too-large"
    COPY = "copy"
    NOT_ITS_SHARD = "not-its-shard"
    NO_IMPROVEMENT = "no-improvement"
    MEMORY_WITHHELD = "memory-withheld"
