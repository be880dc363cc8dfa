"""Whether a contender computes what the textbook does: asserted before anything is timed.

What is accepted is derived from the textbook's own rounding. It runs once in float64 and once in the arithmetic of the
contender; the difference of the two is its own error.

- bf16: twice that error. Sums are float32 in all of them, so what rounds are the tensors between the operations: a
  contender that fuses rounds less often, one that orders them otherwise gives other errors of the same size.
- TF32: a quarter of what bf16 is allowed: its significand is three bits longer, an eighth, but the units cut where bf16
  rounds, which errs twice as much.
- float32: eight times that error. Here the sums themselves round, and their order is free: a product over K terms errs
  by about sqrt(log2 K) units where it is summed in pairs and by sqrt(K / 3) in sequence: eight times as much at
  K = 2304, a 3x3 convolution of 256 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.numerics import BFLOAT16, FLOAT32, Numerics

BF16_MARGIN = 2
TF32_SHARE = 1 / 4
FLOAT32_MARGIN = 8


class NotEquivalentError(AssertionError):
    """A contender that computes something else is not measured."""


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest value expected; not finite where actual is not."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Oracle:
    """What is expected at one workload, and how far rounding may lead away from it.

    Args:
        textbook: the textbook's output in an arithmetic, called as textbook(numerics) under its switches.
        exact: the arithmetic of what is expected.
        distance: of an output from what is expected, a share of it.
    """

    def __init__(
        self,
        textbook: Callable[[Numerics], Tensor],
        *,
        exact: torch.dtype = torch.float64,
        distance: Callable[[Tensor, Tensor], float] = largest_error,
    ) -> None:
        self._textbook = textbook
        self._exact = Numerics(dtype=exact, state_dtype=exact)
        self._distance = distance
        self._made: dict[Any, Any] = {}

    @property
    def expected(self) -> Tensor:
        """On the CPU, so that it does not count as a contender's memory."""
        return self._once("expected", lambda: self._run(self._exact))

    def own_error(self, numerics: Numerics) -> float:
        """What the textbook's own rounding makes."""
        return self._once(numerics, lambda: self._distance(self._run(numerics), self.expected))

    def tolerance(self, numerics: Numerics) -> float:
        """The largest error that is accepted of a contender with this arithmetic."""
        if numerics.tf32:
            return TF32_SHARE * self.tolerance(BFLOAT16)
        if numerics.dtype == torch.float32:
            return FLOAT32_MARGIN * self.own_error(FLOAT32)
        return BF16_MARGIN * self.own_error(numerics)

    def check(self, actual: Tensor, numerics: Numerics) -> tuple[float, float]:
        """(error, tolerance) of a contender's output. Raises NotEquivalentError where it is too far, or not finite."""
        expected = self.expected
        if actual.shape != expected.shape:
            raise NotEquivalentError(f"the output has shape {list(actual.shape)}, not {list(expected.shape)}")
        error, tolerance = self._distance(actual.cpu(), expected), self.tolerance(numerics)
        if not math.isfinite(error) or error > tolerance:
            raise NotEquivalentError(f"the output is off by {error:.2e} of what is expected, more than {tolerance:.2e}")
        return error, tolerance

    def _run(self, numerics: Numerics) -> Tensor:
        with numerics.installed():
            return self._textbook(numerics).cpu()

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
