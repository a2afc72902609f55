"""The errors that the user of a command can cause.

A command prints a `UserError` as one message and exits with code 2; every other exception is a defect of ours
and keeps its traceback. Library functions raise plain ValueError and TypeError for bad arguments.
"""


class UserError(Exception):
    """Something that the user of a command can cause and mend; the text says the fact, then the remedy."""


class ConfigError(UserError):
    """An unknown flag, key, preset or value, or settings that contradict each other."""


class DataError(UserError):
    """A data set that is missing, empty, corrupt or out of reach."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, of another model, or that could not be written."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose loss is no longer finite."""
