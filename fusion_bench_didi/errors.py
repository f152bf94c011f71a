"""The errors a user can meet; each message names the thing, what was found, what was expected and the way out."""


class DiDiError(ValueError):
    """Base of every error that this package raises on purpose."""


class ModelPoolError(DiDiError):
    """The pool cannot be merged as it is (no base model, too few models, duplicate names)."""


class CheckpointMismatchError(DiDiError):
    """Some checkpoint does not line up with the base model, or a file cannot be read."""


class NonFiniteError(DiDiError):
    """A checkpoint holds NaN or infinity."""


class SettingsError(DiDiError):
    """A setting is none of the values there are, or has no effect beside the others."""


class BudgetError(DiDiError):
    """The budget is not a budget, or cannot hold what must be stored."""


class UnknownTaskError(DiDiError):
    """A task was asked for that the merged model does not hold."""


class RankError(DiDiError):
    """Another process of the same merge failed, ended, or does not get on."""


class ResumeError(DiDiError):
    """What lies beside the output is of another merge, so that this one cannot go on from there."""
