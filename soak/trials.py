"""All trials, in the order of the promises."""

from soak import checkpoint_damage, checkpoint_writing, kernels
from soak.trial import Trial

MODULES = (checkpoint_writing, checkpoint_damage, kernels)
TRIALS = tuple(value for module in MODULES for value in vars(module).values() if isinstance(value, Trial))
