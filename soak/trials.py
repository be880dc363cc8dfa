"""All trials, in the order of the promises."""

from soak import (
    bulk,
    checkpoint_damage,
    checkpoint_writing,
    interruptions,
    kernels,
    noise,
    processes,
    programs,
    training,
)
from soak.trial import Trial

MODULES = (
    checkpoint_writing,
    checkpoint_damage,
    training,
    interruptions,
    processes,
    noise,
    bulk,
    kernels,
    programs,
)
TRIALS = tuple(value for module in MODULES for value in vars(module).values() if isinstance(value, Trial))
