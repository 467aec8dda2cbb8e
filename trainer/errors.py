"""The errors that the trainer raises on purpose.

TrainerError
├── JobError          a job's file, key or value, or what it names
├── IntegrityError    a stored file that is not what its name says
├── UpdateError       a miner's update (updates.py)
├── EngineError       a task that could not be run (engines/)
└── RunError          a run's folder that cannot be used (records.py)
"""


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class JobError(TrainerError):
    """A job cannot be used; the message names file, key, value and what is allowed."""


class IntegrityError(TrainerError):
    """A stored file is missing, or its bytes do not hash to its name."""


class EngineError(TrainerError):
    """A task could not be run, or the engine is closed."""


class RunError(TrainerError):
    """A run's folder cannot be used; the message says what to do."""
