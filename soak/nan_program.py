"""`fastdiff ...` with a NaN in the loss and the gradient of one image at one step.

Run in a process of its own: python -m soak.nan_program STEP train ...
"""

from __future__ import annotations

import itertools
import sys
from contextlib import AbstractContextManager
from unittest import mock

from fastdiff.cli import main
from fastdiff.loss import DiffusionLoss


def poisoned(step: int, image: int) -> AbstractContextManager[object]:
    """Within it the loss that is computed as the step-th, counted from 1, has a NaN."""
    genuine, calls = DiffusionLoss.__call__, itertools.count(1)

    def call(self, *args, **kwargs):
        loss, output, gradient = genuine(self, *args, **kwargs)
        if next(calls) == step:
            loss, gradient = loss.clone(), gradient.clone()
            loss[image % len(loss)] = gradient[image % len(loss)] = float("nan")
        return loss, output, gradient

    return mock.patch.object(DiffusionLoss, "__call__", call)


if __name__ == "__main__":
    with poisoned(int(sys.argv[1]), 0):
        sys.exit(main(sys.argv[2:]))
