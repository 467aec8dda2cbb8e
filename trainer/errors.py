"""The errors that the trainer raises on purpose.

TrainerError
├── JobError          a job cannot be used
├── IntegrityError    a stored file is missing or damaged
├── UpdateError       a miner's update is refused (updates.py)
├── EngineError       a task cannot be run (engines/)
└── RunError          a run folder cannot be used (records.py)
"""


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
