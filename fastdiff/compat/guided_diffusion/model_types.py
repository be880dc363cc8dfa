"""What a model predicts and what it is trained for."""

import enum


class ModelMeanType(enum.Enum):
    """What the model predicts: the mean of x_{t-1}, x_0 or eps."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a step: its logarithm from the model, the posterior's, beta, or by v in [-1, 1] between them."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """The squared error (rescaled: a learned variance's term times N / 1000), or the bound (rescaled: times N)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """True for the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)
